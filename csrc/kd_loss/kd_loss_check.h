// Argument checks that the CUDA entries of kd_loss, topk_kd_loss and kd_shard share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "kd_loss/kd_loss.h"

namespace kd {

constexpr int64_t kMostColumns = int64_t{1} << 30;  // columns are counted in 32 bits

// The teacher, where the divergence has one.
inline void check_teacher(const char* op, const Tensor& student, const MaybeTensor& teacher,
                          const KdLossSpec& spec) {
  if (!needs_teacher(spec.divergence)) return;
  const int64_t rows = student.size(0);
  STD_TORCH_CHECK(teacher.has_value(), op, ": teacher must be given for this divergence, got None");
  check_rows(*teacher, op, "teacher");
  STD_TORCH_CHECK(teacher->size(0) == rows && teacher->size(1) >= spec.classes, op,
                  ": teacher must be [", rows, ", at least ", spec.classes, "], got [",
                  teacher->size(0), ", ", teacher->size(1), "]");
  STD_TORCH_CHECK(teacher->scalar_type() == student.scalar_type(), op,
                  ": teacher must have the dtype of student, got dtype ",
                  static_cast<int>(teacher->scalar_type()));
}

}  // namespace kd
