// The host side of the kernels of kd_loss and topk_kd_loss: checks, numbers, launches.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/launch.h"
#include "kd_loss/kd_loss_check.h"
#include "kd_loss/kd_loss_kernel.cuh"

namespace kd {

struct Inputs {
  const char* op;
  Tensor student;             // [rows, columns]
  MaybeTensor teacher;        // [rows, >= classes]
  MaybeTensor topk_ids;       // [rows, k] int64
  MaybeTensor topk_logprobs;  // [rows, k] float32
  MaybeTensor labels;         // [rows] int64
  MaybeTensor row_weights;    // [rows] float32
  MaybeTensor denominator;    // [] float32
  KdLossSpec spec;

  // The row kernel.
  Divergence kind() const { return topk_ids.has_value() ? spec.listed() : spec.divergence; }
};

inline void check_list(const Inputs& in) {
  const int64_t rows = in.student.size(0), size = in.topk_ids->size(1);
  const auto fits = [&](const Tensor& x, ScalarType dtype) {
    return x.dim() == 2 && x.size(0) == rows && x.size(1) == size && x.is_contiguous() &&
           x.scalar_type() == dtype;
  };
  STD_TORCH_CHECK(fits(*in.topk_ids, ScalarType::Long), in.op,
                  ": topk_ids must be contiguous int64 [", rows, ", k]");
  STD_TORCH_CHECK(fits(*in.topk_logprobs, ScalarType::Float), in.op,
                  ": topk_logprobs must be contiguous float32 of the shape of topk_ids");
  STD_TORCH_CHECK(size <= kKdLossMostEntries, in.op, ": topk_ids must have at most ",
                  kKdLossMostEntries, " entries a row, got ", size);
}

inline void check_inputs(const Inputs& in) {
  const char* op = in.op;
  const int64_t rows = in.student.size(0), columns = in.student.size(1);
  STD_TORCH_CHECK(1 <= in.spec.classes && in.spec.classes <= columns && columns < kMostColumns, op,
                  ": student must have at least ", in.spec.classes, " and below ", kMostColumns,
                  " classes, got ", columns);
  check_per_row(in.labels, rows, ScalarType::Long, op, "labels");
  check_per_row(in.row_weights, rows, ScalarType::Float, op, "row_weights");
  STD_TORCH_CHECK(in.labels.has_value() || !in.spec.needs_labels(), op,
                  ": labels must be given for a loss on labels, got None");
  if (in.denominator.has_value()) {
    STD_TORCH_CHECK(
        in.denominator->numel() == 1 && in.denominator->scalar_type() == ScalarType::Float, op,
        ": denominator must be one float32, got ", in.denominator->numel(), " of dtype ",
        static_cast<int>(in.denominator->scalar_type()));
  }
  if (in.topk_ids.has_value()) return check_list(in);
  check_teacher(op, in.student, in.teacher, in.spec);
}

// Fills rows and row_parts, and grad where there is one.
template <typename scalar_t, typename Dispatch>
void launch_rows(const LaunchScope& scope, const Inputs& in, Tensor* grad, RowsCall<scalar_t> call,
                 const Dispatch& dispatch) {
  const auto matrix = [](const Tensor& x) {
    return Matrix<const scalar_t>{static_cast<const scalar_t*>(x.const_data_ptr()), x.stride(0)};
  };
  call.student = matrix(in.student);
  const Divergence kind = in.kind();
  if (needs_teacher(kind)) call.teacher = matrix(*in.teacher);
  if (is_listed(kind)) {
    call.list = {data_or_null<int64_t>(in.topk_ids), data_or_null<float>(in.topk_logprobs),
                 static_cast<int>(in.topk_ids->size(1))};
  }
  if (grad != nullptr) {
    call.grad = {static_cast<scalar_t*>(grad->mutable_data_ptr()), grad->stride(0)};
  }
  const int size = sizeof(scalar_t);
  const bool aligned = misalignment(call.student.data) == 0 &&
                       (call.row_count <= 1 || call.student.stride * size % kVectorBytes == 0);
  const KdLossPlan plan =
      plan_kd_loss({in.spec.classes, size, aligned, grad != nullptr, kind, call.list.size},
                   {scope.attribute(cudaDevAttrComputeCapabilityMajor, in.op),
                    scope.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, in.op)});
  call.ranks = plan.cluster;
  call.vectors = plan.vectors;
  call.vectors_a_rank = plan.vectors_a_rank;
  const int64_t blocks = call.row_count * plan.cluster;
  STD_TORCH_CHECK(blocks <= INT32_MAX, in.op, ": student must have at most ",
                  INT32_MAX / plan.cluster, " rows, got ", call.row_count);
  const LaunchShape shape{blocks, plan.threads, plan.cluster,
                          static_cast<size_t>(plan.shared_bytes)};
  dispatch(kind, [&]<Divergence kD>() {
    launch_kernel(
        in.op, scope, shape,
        plan.on_chip ? &kd_loss_rows<scalar_t, kD, true> : &kd_loss_rows<scalar_t, kD, false>,
        call);
  });
}

// Loss, parts and row losses; fills the gradient where there is one. dispatch(divergence, body)
// calls body with the row kernel's divergence as a template argument.
template <typename Dispatch>
std::tuple<Tensor, Tensor, Tensor> run_on_gpu(const Inputs& in, Tensor* grad,
                                              const Dispatch& dispatch) {
  check_inputs(in);
  const LaunchScope scope(in.student);
  const int64_t rows = in.student.size(0);
  const auto floats = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(in.student, size, ScalarType::Float);
  };
  const auto data = [](const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); };
  const Tensor loss = floats({}), parts = floats({4}), row_losses = floats({rows});
  const Tensor work = floats({3 * rows + 1});  // the rows' parts, the number of valid rows
  float* row_parts = data(work);
  float* count = row_parts + 3 * rows;
  const int64_t* labels = data_or_null<int64_t>(in.labels);
  const float* denominator = data_or_null<float>(in.denominator);
  const bool by_count = in.spec.mean && denominator == nullptr;
  const LaunchShape one_block{1, kTotalThreads, 1, sizeof(Totals) * (kTotalThreads / kWarpSize)};

  // Only a gradient has to know the number of valid rows beforehand.
  const bool count_first = grad != nullptr && by_count && labels != nullptr && rows > 0;
  if (count_first) {
    launch_kernel(in.op, scope, one_block, &kd_loss_count, labels, rows, in.spec.ignore_index,
                  count);
  }
  if (rows > 0) {
    dispatch_float(in.student.scalar_type(), in.op, "student", [&]<typename scalar_t>() {
      RowsCall<scalar_t> call{};
      call.labels = labels;
      call.row_weights = data_or_null<float>(in.row_weights);
      call.denominator = denominator;
      call.count = count_first ? count : nullptr;
      call.rows = data(row_losses);
      call.row_parts = row_parts;
      call.row_count = rows;
      call.ignore_index = in.spec.ignore_index;
      call.columns = static_cast<int>(in.student.size(1));
      call.classes = static_cast<int>(in.spec.classes);
      call.scale = by_count ? 1.0f / static_cast<float>(rows) : 1.0f;
      call.needs_labels = in.spec.needs_labels();
      call.numbers = row_numbers(in.spec);
      launch_rows(scope, in, grad, call, dispatch);
    });
  }
  launch_kernel(in.op, scope, one_block, &kd_loss_totals,
                TotalsCall{data(row_losses), row_parts, labels, denominator, data(loss),
                           data(parts), rows, in.spec.ignore_index, in.spec.mean});
  return {loss, parts, row_losses};
}

// The three operators of a loss, by where the gradient goes.
template <Gradient kGradient, typename Dispatch>
auto run_operator(Inputs in, const Dispatch& dispatch) {
  if constexpr (kGradient == Gradient::kNew) {
    Tensor grad = torch::stable::new_empty(in.student, {in.student.size(0), in.student.size(1)});
    auto [loss, parts, rows] = run_on_gpu(in, &grad, dispatch);
    return std::make_tuple(loss, parts, grad);
  } else if constexpr (kGradient == Gradient::kInPlace) {
    Tensor grad = in.student;
    auto [loss, parts, rows] = run_on_gpu(in, &grad, dispatch);
    return std::make_tuple(loss, parts);
  } else {
    return run_on_gpu(in, nullptr, dispatch);
  }
}

inline KdLossSpec checked_spec(const char* op, const Tensor& student,
                               const std::vector<double>& numbers) {
  check_rows(student, op, "student");
  STD_TORCH_CHECK(numbers.size() == kSpecNumbers, op, ": spec must have ", kSpecNumbers,
                  " numbers, got ", numbers.size());
  return make_spec(numbers, student.size(1));
}

}  // namespace kd
