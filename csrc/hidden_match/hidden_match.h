// What the CPU and the CUDA kernel of hidden_match share: the numbers of a call. No torch in here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kd {

// How two rows are compared; see Kind in kdkernels/ops/hidden_match/spec.py.
enum class MatchKind : int { kMse = 0, kSmoothL1 = 1, kCosine = 2, kPkd = 3 };

constexpr bool is_direction(MatchKind kind) {
  return kind == MatchKind::kCosine || kind == MatchKind::kPkd;
}

struct MatchSpec {
  MatchKind kind;
  double beta;
  bool mean;
};

constexpr size_t kMatchSpecNumbers = 3;
constexpr int kMatchKinds = 4;

inline MatchSpec make_match_spec(const std::vector<double>& numbers) {
  return {static_cast<MatchKind>(static_cast<int>(numbers[0])), numbers[1], numbers[2] != 0.0};
}

}  // namespace kd
