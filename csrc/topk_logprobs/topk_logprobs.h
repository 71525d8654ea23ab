// What the CPU and the CUDA kernel of topk_logprobs share: the numbers of a call. No torch in here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kd {

// See Spec in kdkernels/ops/topk_logprobs/spec.py for the meaning of each number.
struct TopkSpec {
  double temperature;
  double scale;
  double softcap;
  int64_t classes;  // never -1 here: resolved to the number of columns
};

constexpr size_t kTopkSpecNumbers = 4;

inline TopkSpec make_topk_spec(const std::vector<double>& numbers, int64_t columns) {
  const int64_t classes = static_cast<int64_t>(numbers[3]);
  return {numbers[0], numbers[1], numbers[2], classes < 0 ? columns : classes};
}

}  // namespace kd
