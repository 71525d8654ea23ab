// kd_shard on the CPU: checks, row loop, registration. The arithmetic of a row is that of kd_loss
// (kd_loss/kd_loss_row.h), taken up and left between its passes (kd_shard_rows.h).

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "kd_loss/kd_loss_entry.h"
#include "kd_shard/kd_shard_check.h"
#include "kd_shard/kd_shard_cpu.h"

#define KD_PER_ISA_FILE "kd_shard/kd_shard_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

using ShardRows = void (*)(const KdShardCall&, ShardStep, int64_t, int64_t, float*);

KdShardCall open_shard(const ShardInputs& in) {
  const Tensor& student = in.student;
  KdShardCall call{};
  KdLossCall& loss = call.loss;
  loss.spec = checked_shard(in);
  STD_TORCH_CHECK(student.scalar_type() != ScalarType::Double, kShardOp,
                  ": student must be float32, bfloat16 or float16, got float64");
  call.rows = student.size(0);
  loss.columns = student.size(1);
  loss.student = static_cast<const char*>(student.const_data_ptr());
  loss.student_stride = student.stride(0);
  loss.student_dtype = row_dtype(student.scalar_type());
  open_teacher(kShardOp, student, in.teacher, loss);
  loss.labels = data_or_null<int64_t>(in.places);
  for (int64_t row = 0; loss.labels != nullptr && row < call.rows; ++row) {
    STD_TORCH_CHECK(kIgnored <= loss.labels[row] && loss.labels[row] < loss.columns, kShardOp,
                    ": places must be in [-2, ", loss.columns, "), got ", loss.labels[row],
                    " in row ", row);
  }
  return call;
}

void run_step(const KdShardCall& call, ShardStep step) {
  static const ShardRows function = KD_BEST_ISA(kd_shard_rows);
  const int64_t floats = scratch_floats(call.loss.columns);
  torch::stable::parallel_for(0, call.rows, grain_of(call.loss), [&](int64_t begin, int64_t end) {
    function(call, step, begin, end, thread_scratch(floats));
  });
}

Tensor numbers(KdShardCall& call, ShardStep step, int64_t count) {
  Tensor result = empty_cpu(std::array<int64_t, 2>{count, call.rows}, ScalarType::Float);
  call.numbers = data<float>(result);
  run_step(call, step);
  return result;
}

Tensor kd_shard_found(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& places,
                      const std::vector<double>& spec) {
  KdShardCall call = open_shard({student, teacher, places, spec});
  return numbers(call, ShardStep::kFound, kFoundNumbers);
}

Tensor kd_shard_middle(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& places,
                       const Tensor& merged, const std::vector<double>& spec) {
  KdShardCall call = open_shard({student, teacher, places, spec});
  check_middle(call.loss.spec);
  call.merged = checked_merged(merged, call.rows);
  return numbers(call, ShardStep::kMiddle, kMiddleNumbers);
}

void write_gradient(const ShardInputs& in, const Tensor& merged, const Tensor& grad) {
  KdShardCall call = open_shard(in);
  call.merged = checked_merged(merged, call.rows);
  check_gradient(in.student, grad);
  open_gradient(in.student, grad, call.loss);
  run_step(call, ShardStep::kGradient);
}

Tensor kd_shard_grad(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& places,
                     const Tensor& merged, const std::vector<double>& spec) {
  check_rows(student, kShardOp, "student");
  Tensor grad = pooled_empty(student.size(0), student.size(1), student);
  write_gradient({student, teacher, places, spec}, merged, grad);
  return grad;
}

void kd_shard_grad_into(const Tensor& student, const MaybeTensor& teacher,
                        const MaybeTensor& places, const Tensor& merged,
                        const std::vector<double>& spec, Tensor grad) {
  write_gradient({student, teacher, places, spec}, merged, grad);
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("kd_shard_found", TORCH_BOX(&kd::kd_shard_found));
  m.impl("kd_shard_middle", TORCH_BOX(&kd::kd_shard_middle));
  m.impl("kd_shard_grad", TORCH_BOX(&kd::kd_shard_grad));
  m.impl("kd_shard_grad_", TORCH_BOX(&kd::kd_shard_grad_into));
}
