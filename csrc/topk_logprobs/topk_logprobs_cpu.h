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

// Memory of a row's candidates, in the order of their ids, and of the maxima of its groups.
struct TopkScratch {
  static constexpr int64_t kSlack = 64;  // whole vectors are stored
  static constexpr int kLongest = 32;    // logits of a group; divides those of a block in a lane

  TopkScratch(int64_t k, int64_t classes)
      : most(std::max<int64_t>(2 * k, 256)),
        // The more, the tighter the first bound; up to what the second-level cache keeps.
        ahead(std::max(std::clamp<int64_t>(256 * k, 4096, 16384), 8 * k)),
        group(kLongest),
        values(most + kBlock + kSlack),
        ids(values.size()),
        sorted(2 * k) {
    // Twice as many groups as classes wanted: then a class in seven shares its group with one.
    const int64_t looked_at = std::min(ahead, classes);
    while (group > 1 && looked_at / group < 2 * k) group /= 2;
    groups.resize(looked_at / group + 2 * kBlock);
  }

  int64_t most;  // candidates that may wait before all but k are thrown out
  int64_t ahead;
  int group;
  std::vector<float> values, groups;
  std::vector<int32_t> ids;
  std::vector<uint64_t> sorted;
};

}  // namespace kd
