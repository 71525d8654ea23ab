// What the entry of the CPU kernel hands to the row functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/logits_cpu.h"
#include "topk_logprobs/topk_logprobs.h"

namespace kd {

// A call, resolved to raw memory. Strides in elements.
struct TopkCall {
  TopkSpec spec;
  int64_t k;
  Dtype dtype;
  const char* x;  // [rows, >= classes]
  int64_t stride;
  int64_t* ids;     // [rows, k]
  float* logprobs;  // [rows, k]
  float* tail;      // [rows]
};

// Candidates of a row, in the order of their ids.
struct TopkScratch {
  // So many may wait before all but k of them are thrown out: throwing out costs a dozen passes
  // over them, and a tighter threshold saves candidates.
  explicit TopkScratch(int64_t k)
      : most(std::max<int64_t>(2 * k, 256)),
        values(most + kBlock + kSlack),
        ids(values.size()),
        sorted(k) {}

  static constexpr int64_t kSlack = 64;  // whole vectors are stored
  int64_t most;
  std::vector<float> values;
  std::vector<int32_t> ids;
  std::vector<uint64_t> sorted;
};

}  // namespace kd
