// What the CPU and the CUDA kernels of weight_average share: the table of the tensors, checks.
#pragma once

#include <cstdint>
#include <vector>

#include "common/multi_tensor.h"

namespace kd {

// A row of the table; see Plan in kdkernels/ops/weight_average/plan.py.
struct AverageRow {
  int64_t average, param, compensation, copy;  // addresses; 0: none
  int64_t size;                                // elements
  int64_t chunks_end;                          // of all tensors up to and with this one
};
static_assert(sizeof(AverageRow) == 6 * sizeof(int64_t));

struct AverageDtypes {
  TableDtype average, param, copy;
};

inline AverageDtypes check_average_table(const char* op, const Tensor& table,
                                         const std::vector<int64_t>& dtypes) {
  check_table<AverageRow>(op, table);
  STD_TORCH_CHECK(dtypes.size() == 3, op, ": dtypes must be three numbers, got ", dtypes.size());
  // There may be no copy.
  return {check_table_dtype(op, dtypes[0], 0), check_table_dtype(op, dtypes[1], 0),
          check_table_dtype(op, dtypes[2], -1)};
}

}  // namespace kd
