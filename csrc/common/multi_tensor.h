// Lists of tensors in one launch: a table on their device has a row of addresses for each tensor,
// and the work is cut into chunks. What the CPU and the CUDA kernels of such ops share.
//
// A row is a struct of int64 that ends with `size`, the elements of the tensor, and `chunks_end`,
// the chunks of all tensors up to and with this one; see kdkernels/ops/_shared/multi_tensor.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "common/check.h"

namespace kd {

// Elements that are one piece of work; as CHUNK in multi_tensor.py.
constexpr int64_t kTableChunk = int64_t{1} << 15;

// Places in DTYPES of multi_tensor.py.
enum class TableDtype : int { kNone = -1, kFloat = 0, kBf16 = 1, kHalf = 2 };

inline int64_t bytes_of(TableDtype dtype) { return dtype == TableDtype::kFloat ? 4 : 2; }

template <typename Row>
void check_table(const char* op, const Tensor& table) {
  constexpr int64_t kColumns = sizeof(Row) / sizeof(int64_t);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                      table.size(1) == kColumns && table.is_contiguous(),
                  op, ": table must be contiguous int64 [tensors, ", kColumns, "]");
}

// The number of a dtype; with `least` of -1 there may be none.
inline TableDtype check_table_dtype(const char* op, int64_t dtype, int64_t least) {
  STD_TORCH_CHECK(least <= dtype && dtype < 3, op, ": dtypes must be in [", least, ", 3), got ",
                  dtype);
  return static_cast<TableDtype>(dtype);
}

// A number that is read on the device.
inline void check_one_float(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.numel() == 1 && x.scalar_type() == ScalarType::Float, op, ": ", name,
                  " must be one float32, got ", x.numel(), " of dtype ",
                  static_cast<int>(x.scalar_type()));
}

}  // namespace kd
