// A gate_scores call as the CPU and the GPU see it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "common/check.h"

namespace kd {

constexpr int kMostGateGrads = 2;

struct GateSizes {
  int64_t rows, columns;
  int64_t width;     // columns of a group
  int64_t examples;  // runs of rows, of which the absolute value is taken one by one
  int grads;

  int64_t groups() const { return columns / width; }
  int64_t example_rows() const { return rows / examples; }
};

inline GateSizes check_gates(const char* op, const Tensor& activation,
                             const std::vector<Tensor>& grads, const MaybeTensor& mask,
                             int64_t width, int64_t examples) {
  check_rows(activation, op, "activation");
  const GateSizes n{activation.size(0), activation.size(1), width, examples,
                    static_cast<int>(grads.size())};
  STD_TORCH_CHECK(1 <= n.grads && n.grads <= kMostGateGrads, op,
                  ": grads must be one or two tensors, got ", n.grads);
  for (const Tensor& grad : grads) {
    check_rows(grad, op, "grads");
    STD_TORCH_CHECK(grad.scalar_type() == activation.scalar_type() && grad.size(0) == n.rows &&
                        grad.size(1) == n.columns,
                    op, ": grads must have shape and dtype of activation, [", n.rows, ", ",
                    n.columns, "], got [", grad.size(0), ", ", grad.size(1), "], dtype ",
                    static_cast<int>(grad.scalar_type()));
  }
  STD_TORCH_CHECK(width >= 1 && n.columns % width == 0, op, ": width must divide the ", n.columns,
                  " columns, got ", width);
  STD_TORCH_CHECK(examples >= 1 && n.rows % examples == 0, op, ": examples must divide the ",
                  n.rows, " rows, got ", examples);
  check_per_row(mask, n.rows, ScalarType::Bool, op, "mask");
  return n;
}

}  // namespace kd
