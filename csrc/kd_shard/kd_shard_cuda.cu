// kd_shard on the GPU: launches and registration. The kernels are in kd_shard_kernel.cuh.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/dispatch.h"
#include "common/launch.h"
#include "kd_loss/kd_loss_check.h"
#include "kd_shard/kd_shard_check.h"
#include "kd_shard/kd_shard_kernel.cuh"

namespace kd {

namespace {

// Calls body with the divergence as a template argument. Two of them have the second step.
template <ShardStep kStep, typename Body>
void dispatch_divergence(Divergence divergence, const Body& body) {
  if (divergence == Divergence::kJsd) return body.template operator()<Divergence::kJsd>();
  if (divergence == Divergence::kTvd) return body.template operator()<Divergence::kTvd>();
  if constexpr (kStep != ShardStep::kMiddle) {
    switch (divergence) {
      case Divergence::kForwardKl:
        return body.template operator()<Divergence::kForwardKl>();
      case Divergence::kSoftCe:
        return body.template operator()<Divergence::kSoftCe>();
      case Divergence::kReverseKl:
        return body.template operator()<Divergence::kReverseKl>();
      default:
        return body.template operator()<Divergence::kNone>();
    }
  }
}

template <ShardStep kStep, typename scalar_t, Divergence kD>
constexpr auto kernel_of() {
  if constexpr (kStep == ShardStep::kFound) {
    return &kd_shard_found_rows<scalar_t, kD>;
  } else if constexpr (kStep == ShardStep::kMiddle) {
    return &kd_shard_middle_rows<scalar_t, kD>;
  } else {
    return &kd_shard_gradient_rows<scalar_t, kD>;
  }
}

KdLossSpec open_shard(const ShardInputs& in) {
  const KdLossSpec spec = checked_shard(in);
  check_teacher(kShardOp, in.student, in.teacher, spec);
  const int64_t rows = in.student.size(0), columns = in.student.size(1);
  STD_TORCH_CHECK(columns < kMostColumns && rows <= INT32_MAX, kShardOp,
                  ": student must have at most ", INT32_MAX, " rows and below ", kMostColumns,
                  " classes, got [", rows, ", ", columns, "]");
  return spec;
}

// What a step reads and writes beside its inputs.
struct ShardSpace {
  const float* merged;  // null in the first step
  float* numbers;       // null in the last
  const Tensor* grad;   // of the last
};

template <ShardStep kStep>
void run_step(const ShardInputs& in, const KdLossSpec& spec, const ShardSpace& space) {
  const int64_t rows = in.student.size(0);
  if (rows == 0) return;
  const LaunchScope scope(in.student);
  dispatch_float(in.student.scalar_type(), kShardOp, "student", [&]<typename scalar_t>() {
    const auto matrix = [](const Tensor& x) {
      return Matrix<const scalar_t>{static_cast<const scalar_t*>(x.const_data_ptr()), x.stride(0)};
    };
    ShardCall<scalar_t> call{};
    call.student = matrix(in.student);
    if (needs_teacher(spec.divergence)) call.teacher = matrix(*in.teacher);
    if (space.grad != nullptr) {
      call.grad = {static_cast<scalar_t*>(space.grad->mutable_data_ptr()), space.grad->stride(0)};
    }
    call.places = data_or_null<int64_t>(in.places);
    call.merged = space.merged;
    call.numbers = space.numbers;
    call.rows = rows;
    call.row_numbers = row_numbers(spec);
    const int size = sizeof(scalar_t);
    const bool aligned = misalignment(call.student.data) == 0 &&
                         (rows <= 1 || call.student.stride * size % kVectorBytes == 0);
    const KdLossPlan plan = plan_one_pass({spec.classes, size, aligned, false, spec.divergence});
    call.classes = static_cast<int>(spec.classes);
    call.vectors = plan.vectors;
    const LaunchShape shape{rows, plan.threads, 1, static_cast<size_t>(plan.shared_bytes)};
    dispatch_divergence<kStep>(spec.divergence, [&]<Divergence kD>() {
      launch_kernel(kShardOp, scope, shape, kernel_of<kStep, scalar_t, kD>(), call);
    });
  });
}

Tensor new_numbers(const Tensor& student, int64_t count) {
  return torch::stable::new_empty(student, {count, student.size(0)}, ScalarType::Float);
}

Tensor kd_shard_found(Tensor student, MaybeTensor teacher, MaybeTensor places,
                      std::vector<double> numbers) {
  const ShardInputs in{student, teacher, places, numbers};
  const KdLossSpec spec = open_shard(in);
  const Tensor found = new_numbers(student, kFoundNumbers);
  run_step<ShardStep::kFound>(in, spec,
                              {nullptr, static_cast<float*>(found.mutable_data_ptr()), nullptr});
  return found;
}

Tensor kd_shard_middle(Tensor student, MaybeTensor teacher, MaybeTensor places, Tensor merged,
                       std::vector<double> numbers) {
  const ShardInputs in{student, teacher, places, numbers};
  const KdLossSpec spec = open_shard(in);
  check_middle(spec);
  const float* all = checked_merged(merged, student.size(0));
  const Tensor sums = new_numbers(student, kMiddleNumbers);
  run_step<ShardStep::kMiddle>(in, spec,
                               {all, static_cast<float*>(sums.mutable_data_ptr()), nullptr});
  return sums;
}

void write_gradient(const ShardInputs& in, const Tensor& merged, const Tensor& grad) {
  const KdLossSpec spec = open_shard(in);
  const float* all = checked_merged(merged, in.student.size(0));
  check_gradient(in.student, grad);
  run_step<ShardStep::kGradient>(in, spec, {all, nullptr, &grad});
}

Tensor kd_shard_grad(Tensor student, MaybeTensor teacher, MaybeTensor places, Tensor merged,
                     std::vector<double> numbers) {
  check_rows(student, kShardOp, "student");
  const Tensor grad = torch::stable::new_empty(student, {student.size(0), student.size(1)});
  write_gradient({student, teacher, places, numbers}, merged, grad);
  return grad;
}

void kd_shard_grad_into(Tensor student, MaybeTensor teacher, MaybeTensor places, Tensor merged,
                        std::vector<double> numbers, Tensor grad) {
  write_gradient({student, teacher, places, numbers}, merged, grad);
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("kd_shard_found", TORCH_BOX(&kd::kd_shard_found));
  m.impl("kd_shard_middle", TORCH_BOX(&kd::kd_shard_middle));
  m.impl("kd_shard_grad", TORCH_BOX(&kd::kd_shard_grad));
  m.impl("kd_shard_grad_", TORCH_BOX(&kd::kd_shard_grad_into));
}
