// What the entry of the CPU kernels hands to the row functions.
#pragma once

#include "kd_loss/kd_loss_cpu.h"
#include "kd_shard/kd_shard.h"

namespace kd {

// A step of a call, resolved to raw memory. Of the tensors [numbers, rows] the rows are contiguous.
struct KdShardCall {
  KdLossCall loss;      // labels: places; grad of the last step
  const float* merged;  // [kMergedNumbers, rows], of the second and the last step
  float* numbers;       // [kFoundNumbers, rows] or [kMiddleNumbers, rows], of the others
  int64_t rows;
};

}  // namespace kd
