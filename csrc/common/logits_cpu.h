// How the entry of a CPU kernel names rows of logits to the functions compiled per instruction set.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace kd {

enum class Dtype : int { kFloat, kBf16, kHalf };

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

inline Dtype row_dtype(torch::headeronly::ScalarType dtype) {
  if (dtype == torch::headeronly::ScalarType::BFloat16) return Dtype::kBf16;
  return dtype == torch::headeronly::ScalarType::Half ? Dtype::kHalf : Dtype::kFloat;
}

// Logits that are worked on at a time: as floats they stay in the first-level cache.
constexpr int kBlock = 1024;
inline int64_t blocks_of(int64_t classes) { return (classes + kBlock - 1) / kBlock; }

}  // namespace kd
