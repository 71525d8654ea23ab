// How a hidden_match call is laid out on a GPU: a pure function, so that it is tested without one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kd {

constexpr int kMatchThreads = 256;
// Vectors of 16 bytes that a thread keeps of each of the two rows: with four a block keeps rows of
// 16 KB, and three blocks of 80 registers a thread have 96 KB under way on an SM.
constexpr int kMatchHeld = 4;
// Layers are described in the kernel's arguments, of which every GPU takes 4 KB.
constexpr int kMatchMostLayers = 64;

struct MatchLayerPlan {
  int launch;        // that the layer belongs to
  int first_block;   // of the layer in its launch
  int blocks;        // of the layer
  int warps_log2;    // of the warps that share a row
  int rows_a_block;  // which fill the block
  bool once;         // rows on 16-byte boundaries stay in registers: no pass reads memory again
};

namespace match_plan_detail {

constexpr int kWarpThreads = 32;
constexpr int kBytes = 16;

// As few warps as keep the row; a block where it cannot be kept. A power of two: kernels shift
// where they would have to divide.
inline int warps_log2_for(int64_t vectors) {
  int log2 = 0;
  while (kWarpThreads << log2 < kMatchThreads && (kWarpThreads << log2) * kMatchHeld < vectors) {
    ++log2;
  }
  return log2;
}

}  // namespace match_plan_detail

// Of layers of the given widths; rows must be below 2^31.
inline std::vector<MatchLayerPlan> plan_match(int64_t rows, const std::vector<int64_t>& widths,
                                              int element_size) {
  using namespace match_plan_detail;
  std::vector<MatchLayerPlan> plans;
  int launch = 0, layers = 0;
  int64_t blocks = 0;  // of the launch so far
  for (const int64_t width : widths) {
    const int64_t vectors = (width * element_size + kBytes - 1) / kBytes;
    const int log2 = warps_log2_for(vectors);
    const int threads = kWarpThreads << log2, rows_a_block = kMatchThreads / threads;
    const int64_t more = (rows + rows_a_block - 1) / rows_a_block;
    if (layers == kMatchMostLayers || blocks + more > INT32_MAX) {
      ++launch;
      layers = 0;
      blocks = 0;
    }
    plans.push_back({launch, static_cast<int>(blocks), static_cast<int>(more), log2, rows_a_block,
                     vectors <= threads * kMatchHeld});
    blocks += more;
    ++layers;
  }
  return plans;
}

}  // namespace kd
