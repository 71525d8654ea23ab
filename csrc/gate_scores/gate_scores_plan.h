// How the rows of a gate_scores call are cut up on a GPU: a pure function of the shape, so that
// every GPU adds up in the same order.
#pragma once

#include <cstdint>

#include "gate_scores/gate_scores.h"

namespace kd {

constexpr int kGateWarps = 8;  // of a block; they take turns at its rows
constexpr int kGateThreads = 32 * kGateWarps;

struct GatePlan {
  int64_t part_rows;  // rows of a block
  int64_t parts;      // blocks that share the rows of an example
  int64_t tiles;      // blocks that share the columns: a vector of 16 bytes a lane

  int64_t blocks(const GateSizes& n) const { return n.examples * parts * tiles; }
};

inline GatePlan plan_gates(const GateSizes& n, int64_t vector_size) {
  // Fewer blocks leave multiprocessors idle; of more, each writes sums that must be read again.
  constexpr int64_t kBlocks = 1024;
  // A warp sums up to 32 rows one after the other: more would lose digits.
  constexpr int64_t kLeastRows = 4 * kGateWarps, kMostRows = 32 * kGateWarps;
  GatePlan plan{kLeastRows, 0, (n.columns + 32 * vector_size - 1) / (32 * vector_size)};
  while (plan.part_rows < kMostRows && n.rows / plan.part_rows * plan.tiles > kBlocks) {
    plan.part_rows *= 2;
  }
  plan.parts = (n.example_rows() + plan.part_rows - 1) / plan.part_rows;
  return plan;
}

}  // namespace kd
