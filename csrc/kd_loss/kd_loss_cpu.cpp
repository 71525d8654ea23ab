// kd_loss on the CPU: entry, row loop and registration; the arithmetic of a row is in
// kd_loss_rows.h (float32, bfloat16, float16) and kd_loss_f64.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/buffer_pool.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/empty.h"
#include "common/isa.h"
#include "kd_loss/kd_loss_cpu.h"
#include "kd_loss/kd_loss_f64.h"

#define KD_PER_ISA_FILE "kd_loss/kd_loss_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "kd_loss";
// Below this a gradient is left in the cache for whoever reads it next; above, it would only evict.
constexpr int64_t kStreamBytes = 4 << 20;
// Work worth a thread, in logits.
constexpr int64_t kGrain = 16384;

using Rows = void (*)(const KdLossCall&, int64_t, int64_t, float*, RowTerms*);

Rows rows_function() {
#if defined(__x86_64__)
  if (current_isa() == Isa::kAvx512) return &avx512::kd_loss_rows;
  if (current_isa() == Isa::kAvx2) return &avx2::kd_loss_rows;
#endif
  return &baseline::kd_loss_rows;
}

// Scratch of the calling thread, kept between calls and 64-byte aligned.
float* thread_scratch(int64_t floats) {
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

double to_double(const char* p, ScalarType dtype) {
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

int64_t bytes_of(ScalarType dtype) {
  if (dtype == ScalarType::Double) return 8;
  return dtype == ScalarType::Float ? 4 : 2;
}

void rows_f64(const KdLossCall& call, ScalarType teacher_dtype, const double* row_weights,
              int64_t begin, int64_t end, RowTerms* terms) {
  RowF64 job(call);
  std::vector<double> teacher(call.spec.classes);
  for (int64_t row = begin; row < end; ++row) {
    double* grad = call.grad == nullptr
                       ? nullptr
                       : reinterpret_cast<double*>(call.grad) + row * call.grad_stride;
    const int64_t label = call.labels == nullptr ? -1 : call.labels[row];
    if (call.labels != nullptr && label == call.spec.ignore_index) {
      terms[row] = {0, 0, 0};
      if (grad != nullptr) std::fill(grad, grad + call.columns, 0.0);
      continue;
    }
    if (call.teacher != nullptr) {
      const int64_t step = bytes_of(teacher_dtype);
      const char* from = call.teacher + row * call.teacher_stride * step;
      for (size_t i = 0; i < teacher.size(); ++i) {
        teacher[i] = to_double(from + i * step, teacher_dtype);
      }
    }
    const double* student =
        reinterpret_cast<const double*>(call.student) + row * call.student_stride;
    const double weight = row_weights == nullptr ? 1.0 : row_weights[row];
    terms[row] = job.run(student, teacher.data(), label, weight * call.scale, grad);
  }
}

int64_t count_valid(const KdLossCall& call, int64_t rows) {
  if (call.labels == nullptr) return rows;
  int64_t valid = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t label = call.labels[row];
    if (label == call.spec.ignore_index) continue;
    ++valid;
    STD_TORCH_CHECK(!call.spec.needs_labels() || (0 <= label && label < call.spec.classes), kOp,
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

using MaybeTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> run(const Tensor& student,           // [rows, columns]
                               const MaybeTensor& teacher,      // the same rows
                               const MaybeTensor& labels,       // [rows] int64
                               const MaybeTensor& row_weights,  // [rows]
                               const MaybeTensor& denominator,  // []
                               const std::vector<double>& numbers, Tensor* grad,
                               Tensor* row_losses = nullptr) {
  check_rows(student, kOp, "student");
  const int64_t rows = student.size(0), columns = student.size(1);
  STD_TORCH_CHECK(numbers.size() == kSpecNumbers, kOp, ": spec must have ", kSpecNumbers,
                  " numbers, got ", numbers.size());
  const KdLossSpec spec = make_spec(numbers, columns);
  const ScalarType dtype = student.scalar_type();
  const bool f64 = dtype == ScalarType::Double;
  const ScalarType acc = f64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(1 <= spec.classes && spec.classes <= columns, kOp,
                  ": student must have at least ", std::max<int64_t>(spec.classes, 1),
                  " classes, got ", columns);
  check_per_row(labels, rows, ScalarType::Long, kOp, "labels");
  check_per_row(row_weights, rows, acc, kOp, "row_weights");
  STD_TORCH_CHECK(labels.has_value() || !spec.needs_labels(), kOp,
                  ": labels must be given for a loss on labels, got None");
  KdLossCall call{};
  call.spec = spec;
  call.columns = columns;
  call.student = static_cast<const char*>(student.const_data_ptr());
  call.student_stride = student.stride(0);
  call.student_dtype = row_dtype(dtype);
  ScalarType teacher_dtype = dtype;
  if (needs_teacher(spec.divergence)) {
    STD_TORCH_CHECK(teacher.has_value(), kOp,
                    ": teacher must be given for this divergence, got None");
    check_rows(*teacher, kOp, "teacher");
    STD_TORCH_CHECK(teacher->size(0) == rows && teacher->size(1) >= spec.classes, kOp,
                    ": teacher must have ", rows, " rows and at least ", spec.classes,
                    " classes, got [", teacher->size(0), ", ", teacher->size(1), "]");
    teacher_dtype = teacher->scalar_type();
    STD_TORCH_CHECK(f64 || teacher_dtype != ScalarType::Double, kOp,
                    ": teacher must not be float64 unless student is, got float64");
    call.teacher = static_cast<const char*>(teacher->const_data_ptr());
    call.teacher_stride = teacher->stride(0);
    call.teacher_dtype = row_dtype(teacher_dtype);
  }
  if (grad != nullptr) {
    call.grad = static_cast<char*>(grad->mutable_data_ptr());
    call.grad_stride = grad->stride(0);
    // Written over the student, the lines are in the cache already.
    call.stream = call.grad != call.student && rows * columns * bytes_of(dtype) > kStreamBytes;
  }
  if (labels.has_value()) call.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  const int64_t valid = count_valid(call, rows);
  call.scale = 1.0;
  if (denominator.has_value()) {
    const double divisor = to_double(static_cast<const char*>(denominator->const_data_ptr()),
                                     denominator->scalar_type());
    if (divisor != 0.0) call.scale = 1.0 / divisor;
  } else if (spec.mean) {
    call.scale = valid > 0 ? 1.0 / valid : 1.0;
  }

  std::vector<RowTerms> terms(rows);
  const void* weights = row_weights.has_value() ? row_weights->const_data_ptr() : nullptr;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, spec.classes));
  if (f64) {
    const auto* w = static_cast<const double*>(weights);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      rows_f64(call, teacher_dtype, w, begin, end, terms.data());
    });
  } else {
    call.row_weights = static_cast<const float*>(weights);
    static const Rows function = rows_function();
    const int64_t floats = scratch_floats(spec.classes);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      function(call, begin, end, thread_scratch(floats), terms.data());
    });
  }

  Tensor loss = empty_cpu(std::array<int64_t, 0>{}, acc);
  Tensor parts = empty_cpu(std::array<int64_t, 1>{4}, acc);
  if (row_losses != nullptr) *row_losses = empty_cpu(std::array<int64_t, 1>{rows}, acc);
  if (f64) {
    reduce(call, terms, static_cast<const double*>(weights), valid, loss, parts, row_losses);
  } else {
    reduce(call, terms, static_cast<const float*>(weights), valid, loss, parts, row_losses);
  }
  return {loss, parts};
}

std::tuple<Tensor, Tensor, Tensor> kd_loss(const Tensor& student, const MaybeTensor& teacher,
                                           const MaybeTensor& labels,
                                           const MaybeTensor& row_weights,
                                           const MaybeTensor& denominator,
                                           const std::vector<double>& spec) {
  Tensor rows;
  auto [loss, parts] =
      run(student, teacher, labels, row_weights, denominator, spec, nullptr, &rows);
  return {loss, parts, rows};
}

std::tuple<Tensor, Tensor, Tensor> kd_loss_grad(const Tensor& student, const MaybeTensor& teacher,
                                                const MaybeTensor& labels,
                                                const MaybeTensor& row_weights,
                                                const MaybeTensor& denominator,
                                                const std::vector<double>& spec) {
  check_rows(student, kOp, "student");
  Tensor grad = pooled_empty(student.size(0), student.size(1), student);
  auto [loss, parts] = run(student, teacher, labels, row_weights, denominator, spec, &grad);
  return {loss, parts, grad};
}

std::tuple<Tensor, Tensor> kd_loss_grad_(Tensor student, const MaybeTensor& teacher,
                                         const MaybeTensor& labels, const MaybeTensor& row_weights,
                                         const MaybeTensor& denominator,
                                         const std::vector<double>& spec) {
  return run(student, teacher, labels, row_weights, denominator, spec, &student);
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("kd_loss", TORCH_BOX(&kd::kd_loss));
  m.impl("kd_loss_grad", TORCH_BOX(&kd::kd_loss_grad));
  m.impl("kd_loss_grad_", TORCH_BOX(&kd::kd_loss_grad_));
}
