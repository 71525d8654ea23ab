// How the positions of a domain_prototypes call are cut up on a GPU: a pure function of the shape,
// so that every GPU adds up in the same order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "domain_prototypes/domain_prototypes.h"

namespace kd {

constexpr int kPrototypeWarps = 8;  // of a block; they take turns at its positions
constexpr int kPrototypeThreads = 32 * kPrototypeWarps;

struct PrototypePlan {
  int64_t part_rows;  // positions of a block
  int64_t parts;      // blocks that share the positions of an example
  int64_t tiles;      // blocks that share the columns: a vector of 16 bytes a lane

  int64_t blocks(const PrototypeSizes& n) const { return n.batch * parts * tiles; }
};

inline PrototypePlan plan_prototypes(const PrototypeSizes& n, int64_t vector_size) {
  // Fewer blocks leave multiprocessors idle; of more, each writes sums that must be read again.
  constexpr int64_t kBlocks = 1024;
  // A warp sums up to 32 positions one after the other: more would lose digits.
  constexpr int64_t kLeastRows = 4 * kPrototypeWarps, kMostRows = 32 * kPrototypeWarps;
  PrototypePlan plan{kLeastRows, 0, (n.columns + 32 * vector_size - 1) / (32 * vector_size)};
  const auto parts = [&] {
    return std::max<int64_t>(1, (n.seq + plan.part_rows - 1) / plan.part_rows);
  };
  while (plan.part_rows < kMostRows && n.batch * parts() * plan.tiles > kBlocks) {
    plan.part_rows *= 2;
  }
  plan.parts = parts();
  return plan;
}

}  // namespace kd
