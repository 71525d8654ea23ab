// Argument checks of kd_shard, the same for the CPU and the CUDA kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/check.h"
#include "kd_shard/kd_shard.h"

namespace kd {

constexpr const char* kShardOp = "kd_shard";

// What every step takes.
struct ShardInputs {
  const Tensor& student;       // [rows, classes here]
  const MaybeTensor& teacher;  // the same
  const MaybeTensor& places;   // [rows] int64
  const std::vector<double>& numbers;
};

// Checks them, except for the teacher and the dtype of the student.
inline KdLossSpec checked_shard(const ShardInputs& in) {
  check_rows(in.student, kShardOp, "student");
  STD_TORCH_CHECK(in.numbers.size() == kSpecNumbers, kShardOp, ": spec must have ", kSpecNumbers,
                  " numbers, got ", in.numbers.size());
  const int64_t columns = in.student.size(1);
  const KdLossSpec spec = make_spec(in.numbers, columns);
  STD_TORCH_CHECK(spec.classes == columns && columns > 0, kShardOp, ": student must have the ",
                  spec.classes, " classes of the spec, got ", columns);
  STD_TORCH_CHECK(Divergence::kNone <= spec.divergence && spec.divergence <= Divergence::kTvd,
                  kShardOp, ": divergence must be one of 0 to 5, got ",
                  static_cast<int>(spec.divergence));
  check_per_row(in.places, in.student.size(0), ScalarType::Long, kShardOp, "places");
  STD_TORCH_CHECK(in.places.has_value() || !spec.needs_labels(), kShardOp,
                  ": places must be given for a loss on labels, got None");
  return spec;
}

// The second step is that of JSD and TVD.
inline void check_middle(const KdLossSpec& spec) {
  STD_TORCH_CHECK(spec.divergence >= Divergence::kJsd, kShardOp,
                  ": divergence must be JSD or TVD, got ", static_cast<int>(spec.divergence));
}

inline const float* checked_merged(const Tensor& merged, int64_t rows) {
  STD_TORCH_CHECK(merged.dim() == 2 && merged.size(0) == kMergedNumbers && merged.size(1) == rows &&
                      merged.is_contiguous() && merged.scalar_type() == ScalarType::Float,
                  kShardOp, ": merged must be contiguous float32 [",
                  static_cast<int>(kMergedNumbers), ", ", rows, "]");
  return static_cast<const float*>(merged.const_data_ptr());
}

inline void check_gradient(const Tensor& student, const Tensor& grad) {
  check_rows(grad, kShardOp, "grad");
  STD_TORCH_CHECK(grad.size(0) == student.size(0) && grad.size(1) == student.size(1) &&
                      grad.scalar_type() == student.scalar_type(),
                  kShardOp, ": grad must have the shape and dtype of student [", student.size(0),
                  ", ", student.size(1), "], got [", grad.size(0), ", ", grad.size(1),
                  "] of dtype ", static_cast<int>(grad.scalar_type()));
}

}  // namespace kd
