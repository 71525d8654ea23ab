// Argument checks of operators, in the error form of the project:
// "<op>: <argument> must <contract>, got <fact>".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace kd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename T>
const T* data_or_null(const MaybeTensor& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// A tensor of rows whose columns are contiguous: what every row kernel reads.
inline void check_rows(const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": ", name, " must be [rows, classes], got ", x.dim(),
                  " dimensions");
  STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) <= 1, op, ": ", name,
                  " must have unit column stride, got ", x.stride(1));
}

// One value a row, contiguous.
inline void check_per_row(const MaybeTensor& x, int64_t rows, ScalarType dtype, const char* op,
                          const char* name) {
  if (!x.has_value()) return;
  STD_TORCH_CHECK(x->scalar_type() == dtype, op, ": ", name, " must have dtype ",
                  static_cast<int>(dtype), ", got dtype ", static_cast<int>(x->scalar_type()));
  STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == rows && x->is_contiguous(), op, ": ", name,
                  " must be contiguous [", rows, "], got ", x->dim(), " dimensions, first size ",
                  x->dim() > 0 ? x->size(0) : 0);
}

}  // namespace kd
