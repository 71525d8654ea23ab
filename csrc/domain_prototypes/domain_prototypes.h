// A domain_prototypes call as the CPU and the GPU see it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "common/check.h"

namespace kd {

struct PrototypeSizes {
  int64_t batch, seq, columns;
  int64_t groups;
};

inline PrototypeSizes check_prototypes(const char* op, const Tensor& hidden, const Tensor& groups,
                                       const MaybeTensor& mask, int64_t n_groups) {
  STD_TORCH_CHECK(hidden.dim() == 3, op, ": hidden must be [batch, seq, hidden], got ",
                  hidden.dim(), " dimensions");
  const PrototypeSizes n{hidden.size(0), hidden.size(1), hidden.size(2), n_groups};
  STD_TORCH_CHECK(hidden.stride(2) == 1 || n.columns <= 1, op,
                  ": hidden must have unit column stride, got ", hidden.stride(2));
  STD_TORCH_CHECK(n_groups >= 1, op, ": n_groups must be at least 1, got ", n_groups);
  check_per_row(groups, n.batch, ScalarType::Long, op, "groups");
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                        mask->size(0) == n.batch && mask->size(1) == n.seq && mask->is_contiguous(),
                    op, ": mask must be contiguous bool [", n.batch, ", ", n.seq, "], got ",
                    mask->dim(), " dimensions, dtype ", static_cast<int>(mask->scalar_type()));
  }
  return n;
}

}  // namespace kd
