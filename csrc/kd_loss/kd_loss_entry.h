// The CPU entry of kd_loss and topk_kd_loss: checks, row loop, sums. The arithmetic of a row is in
// kd_loss_row.h; which rows of it a call runs is handed in.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "common/buffer_pool.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/empty.h"
#include "kd_loss/kd_loss_cpu.h"

namespace kd {

// Below this a gradient is left in the cache for whoever reads it next; above, it would only evict.
constexpr int64_t kStreamBytes = 4 << 20;
// Work worth a thread, in logits.
constexpr int64_t kGrain = 16384;

using Rows = void (*)(const KdLossCall&, int64_t, int64_t, float*, RowTerms*);

// Scratch of the calling thread, kept between calls and 64-byte aligned.
inline float* thread_scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<float[], Free> scratch;
  thread_local int64_t size = 0;
  if (size < floats) {
    scratch.reset(static_cast<float*>(::operator new[](floats * 4, std::align_val_t{64})));
    size = floats;
  }
  return scratch.get();
}

inline double to_double(const char* p, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return *reinterpret_cast<const double*>(p);
    case ScalarType::BFloat16:
      return *reinterpret_cast<const bf16_t*>(p);
    case ScalarType::Half:
      return *reinterpret_cast<const half_t*>(p);
    default:
      return *reinterpret_cast<const float*>(p);
  }
}

inline int64_t bytes_of(ScalarType dtype) {
  if (dtype == ScalarType::Double) return 8;
  return dtype == ScalarType::Float ? 4 : 2;
}

inline int64_t count_valid(const KdLossCall& call, int64_t rows, const char* op) {
  if (call.labels == nullptr) return rows;
  int64_t valid = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t label = call.labels[row];
    if (label == call.spec.ignore_index) continue;
    ++valid;
    STD_TORCH_CHECK(!call.spec.needs_labels() || (0 <= label && label < call.spec.classes), op,
                    ": labels must be in [0, ", call.spec.classes, ") or ignore_index ",
                    call.spec.ignore_index, ", got ", label, " in row ", row);
  }
  return valid;
}

template <typename acc_t>
acc_t* data(const Tensor& x) {
  return reinterpret_cast<acc_t*>(x.mutable_data_ptr());
}

// The weighted row losses, and their scaled sums, added in the order of the rows.
template <typename acc_t>
void reduce(const KdLossCall& call, const std::vector<RowTerms>& terms, const acc_t* row_weights,
            int64_t valid, const Tensor& loss, const Tensor& parts, const Tensor* row_losses) {
  double ce = 0, divergence = 0, lse_squared = 0, total = 0;
  acc_t* row_out = row_losses == nullptr ? nullptr : data<acc_t>(*row_losses);
  for (size_t row = 0; row < terms.size(); ++row) {
    const bool skip = call.labels != nullptr && call.labels[row] == call.spec.ignore_index;
    const double weight = skip ? 0.0 : row_weights == nullptr ? 1.0 : row_weights[row];
    const RowTerms& term = terms[row];
    double value = 0.0;
    // An infinite term whose weight is 0 must not turn the loss into NaN.
    if (call.spec.ce_weight != 0.0) value += call.spec.ce_weight * term.ce;
    if (call.spec.kd_weight != 0.0) value += call.spec.kd_weight * term.divergence;
    if (call.spec.z_loss != 0.0) value += call.spec.z_loss * term.lse_squared;
    if (row_out != nullptr) row_out[row] = static_cast<acc_t>(weight * value);
    total += weight * value;
    ce += weight * term.ce;
    divergence += weight * term.divergence;
    lse_squared += weight * term.lse_squared;
  }
  *data<acc_t>(loss) = static_cast<acc_t>(total * call.scale);
  acc_t* out = data<acc_t>(parts);
  out[0] = static_cast<acc_t>(ce * call.scale);
  out[1] = static_cast<acc_t>(divergence * call.scale);
  out[2] = static_cast<acc_t>(lse_squared * call.scale);
  out[3] = static_cast<acc_t>(valid);
}

// What both operators take beside the student and the teacher.
struct RowInputs {
  const MaybeTensor& labels;       // [rows] int64
  const MaybeTensor& row_weights;  // [rows]
  const MaybeTensor& denominator;  // []
};

// Checks them and the student, and fills all of the call that is not the teacher's nor the
// gradient's. Returns the number of valid rows.
inline int64_t open_call(const char* op, const Tensor& student, const RowInputs& in,
                         const std::vector<double>& numbers, KdLossCall& call) {
  check_rows(student, op, "student");
  const int64_t rows = student.size(0), columns = student.size(1);
  STD_TORCH_CHECK(numbers.size() == kSpecNumbers, op, ": spec must have ", kSpecNumbers,
                  " numbers, got ", numbers.size());
  const KdLossSpec spec = make_spec(numbers, columns);
  const ScalarType dtype = student.scalar_type();
  const ScalarType acc = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(1 <= spec.classes && spec.classes <= columns, op, ": student must have at least ",
                  std::max<int64_t>(spec.classes, 1), " classes, got ", columns);
  check_per_row(in.labels, rows, ScalarType::Long, op, "labels");
  check_per_row(in.row_weights, rows, acc, op, "row_weights");
  STD_TORCH_CHECK(in.labels.has_value() || !spec.needs_labels(), op,
                  ": labels must be given for a loss on labels, got None");
  call.spec = spec;
  call.columns = columns;
  call.student = static_cast<const char*>(student.const_data_ptr());
  call.student_stride = student.stride(0);
  call.student_dtype = row_dtype(dtype);
  if (in.labels.has_value()) {
    call.labels = static_cast<const int64_t*>(in.labels->const_data_ptr());
  }
  const int64_t valid = count_valid(call, rows, op);
  call.scale = 1.0;
  if (in.denominator.has_value()) {
    const double divisor = to_double(static_cast<const char*>(in.denominator->const_data_ptr()),
                                     in.denominator->scalar_type());
    if (divisor != 0.0) call.scale = 1.0 / divisor;
  } else if (spec.mean) {
    call.scale = valid > 0 ? 1.0 / valid : 1.0;
  }
  return valid;
}

// Checks the teacher, where the divergence has one, and fills its part of the call. `student` has
// been opened.
inline void open_teacher(const char* op, const Tensor& student, const MaybeTensor& teacher,
                         KdLossCall& call) {
  if (!needs_teacher(call.spec.divergence)) return;
  const int64_t rows = student.size(0);
  STD_TORCH_CHECK(teacher.has_value(), op, ": teacher must be given for this divergence, got None");
  check_rows(*teacher, op, "teacher");
  STD_TORCH_CHECK(teacher->size(0) == rows && teacher->size(1) >= call.spec.classes, op,
                  ": teacher must have ", rows, " rows and at least ", call.spec.classes,
                  " classes, got [", teacher->size(0), ", ", teacher->size(1), "]");
  STD_TORCH_CHECK(
      student.scalar_type() == ScalarType::Double || teacher->scalar_type() != ScalarType::Double,
      op, ": teacher must not be float64 unless student is, got float64");
  call.teacher = static_cast<const char*>(teacher->const_data_ptr());
  call.teacher_stride = teacher->stride(0);
  call.teacher_dtype = row_dtype(teacher->scalar_type());
}

inline void open_gradient(const Tensor& student, const Tensor& grad, KdLossCall& call) {
  call.grad = static_cast<char*>(grad.mutable_data_ptr());
  call.grad_stride = grad.stride(0);
  // Written over the student, the lines are in the cache already.
  call.stream = call.grad != call.student &&
                student.size(0) * call.columns * bytes_of(student.scalar_type()) > kStreamBytes;
}

// Rows worth a thread.
inline int64_t grain_of(const KdLossCall& call) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, call.spec.classes));
}

// Runs float32, bfloat16 or float16 rows.
inline void run_rows(KdLossCall& call, const MaybeTensor& row_weights, Rows function,
                     std::vector<RowTerms>& terms) {
  if (row_weights.has_value()) {
    call.row_weights = static_cast<const float*>(row_weights->const_data_ptr());
  }
  const int64_t floats = scratch_floats(call.spec.classes), rows = terms.size();
  torch::stable::parallel_for(0, rows, grain_of(call), [&](int64_t begin, int64_t end) {
    function(call, begin, end, thread_scratch(floats), terms.data());
  });
}

// Loss, parts and, where wanted, the rows' losses, from the terms of the rows.
template <typename acc_t>
std::tuple<Tensor, Tensor> close_call(const KdLossCall& call, const std::vector<RowTerms>& terms,
                                      const MaybeTensor& row_weights, int64_t valid,
                                      Tensor* row_losses) {
  const ScalarType acc = sizeof(acc_t) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = terms.size();
  Tensor loss = empty_cpu(std::array<int64_t, 0>{}, acc);
  Tensor parts = empty_cpu(std::array<int64_t, 1>{4}, acc);
  if (row_losses != nullptr) *row_losses = empty_cpu(std::array<int64_t, 1>{rows}, acc);
  const void* weights = row_weights.has_value() ? row_weights->const_data_ptr() : nullptr;
  reduce(call, terms, static_cast<const acc_t*>(weights), valid, loss, parts, row_losses);
  return {loss, parts};
}

// The three operators of a loss, by where the gradient goes: run(gradient, row losses) fills those
// that are there and returns loss and parts.
template <Gradient kGradient, typename Run>
auto run_operator(const char* op, const Tensor& student, const Run& run) {
  if constexpr (kGradient == Gradient::kNew) {
    check_rows(student, op, "student");
    Tensor grad = pooled_empty(student.size(0), student.size(1), student);
    auto [loss, parts] = run(&grad, nullptr);
    return std::make_tuple(loss, parts, grad);
  } else if constexpr (kGradient == Gradient::kInPlace) {
    return run(&student, nullptr);
  } else {
    Tensor rows;
    auto [loss, parts] = run(nullptr, &rows);
    return std::make_tuple(loss, parts, rows);
  }
}

}  // namespace kd
