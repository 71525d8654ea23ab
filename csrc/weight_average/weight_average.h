// What the CPU and the CUDA kernels of weight_average share: the table of the tensors, checks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "common/check.h"

namespace kd {

// A row of the table; see Group in kdkernels/ops/weight_average/plan.py.
struct AverageRow {
  int64_t average, param, compensation, copy;  // addresses; 0: none
  int64_t size;                                // elements
  int64_t chunks_end;                          // of all tensors up to and with this one
};
static_assert(sizeof(AverageRow) == 6 * sizeof(int64_t));

// Elements that are one piece of work; as CHUNK in plan.py.
constexpr int64_t kAverageChunk = int64_t{1} << 15;

// Places in DTYPES of plan.py.
enum class AverageDtype : int { kNone = -1, kFloat = 0, kBf16 = 1, kHalf = 2 };

inline int64_t bytes_of(AverageDtype dtype) { return dtype == AverageDtype::kFloat ? 4 : 2; }

struct AverageDtypes {
  AverageDtype average, param, copy;
};

inline AverageDtypes check_average_table(const char* op, const Tensor& table,
                                         const std::vector<int64_t>& dtypes) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                      table.size(1) == 6 && table.is_contiguous(),
                  op, ": table must be contiguous int64 [tensors, 6]");
  STD_TORCH_CHECK(dtypes.size() == 3, op, ": dtypes must be three numbers, got ", dtypes.size());
  for (size_t i = 0; i < 3; ++i) {
    const int64_t least = i == 2 ? -1 : 0;  // there may be no copy
    STD_TORCH_CHECK(least <= dtypes[i] && dtypes[i] < 3, op, ": dtypes must be in [", least,
                    ", 3), got ", dtypes[i]);
  }
  return {static_cast<AverageDtype>(dtypes[0]), static_cast<AverageDtype>(dtypes[1]),
          static_cast<AverageDtype>(dtypes[2])};
}

inline void check_average_weight(const char* op, const Tensor& weight) {
  STD_TORCH_CHECK(weight.numel() == 1 && weight.scalar_type() == ScalarType::Float, op,
                  ": weight must be one float32, got ", weight.numel(), " of dtype ",
                  static_cast<int>(weight.scalar_type()));
}

}  // namespace kd
