// How a kd_loss call is laid out on a GPU: a pure function, so that it is tested without one.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kd_loss/kd_loss.h"

namespace kd {

constexpr int kKdLossMaxThreads = 384;
constexpr int kKdLossOnePassThreads = 256;  // at most, where a row is read once
// Bytes of what a row is reduced to (asserted by the kernel).
constexpr int kKdLossStatsBytes = 32;
constexpr int kKdLossSumsBytes = 16;
constexpr int kKdLossListBytes = 32;
// Entries of a sparse teacher's list; as MOST_ENTRIES in topk_kd_loss/op.py.
constexpr int kKdLossMostEntries = 1024;

// What the plan has to know about the GPU.
struct KdLossDevice {
  int major;             // of the compute capability
  int shared_per_block;  // dynamic shared memory a block may ask for, bytes
};

struct KdLossProblem {
  int64_t classes;
  int element_size;  // bytes of a logit
  bool aligned;      // every row starts on a 16-byte boundary
  bool want_grad;
  Divergence divergence;  // of the row kernel
  int entries = 0;        // of a sparse teacher's list
};

struct KdLossPlan {
  // true: the logits of a row are read once and stay in the shared memory of its cluster.
  // false: a block walks over its row, and does so again for each further pass.
  bool on_chip;
  int threads;         // of a block
  int cluster;         // blocks that share a row
  int vectors;         // 16-byte vectors of a row, the first and the last perhaps partly outside
  int vectors_a_rank;  // of them in one block
  int shared_bytes;    // dynamic shared memory of a block
};

// Whether the divergence itself needs the normalised probabilities: one more pass.
constexpr bool has_middle_pass(Divergence d) {
  return d == Divergence::kJsd || d == Divergence::kTvd;
}

// Shared memory of a list over `columns` classes: logit and id of each entry, a bit for each class.
constexpr int list_space_bytes(int entries, int columns) {
  return (8 * entries + (columns + 31) / 32 * 4 + 15) / 16 * 16;
}

namespace plan_detail {

constexpr int kBytes = 16;
constexpr int kWarpThreads = 32;
constexpr int kReservedBytes = 1024;  // of a resident block, by the driver
constexpr int kManyThreads = kKdLossMaxThreads;
constexpr int kFewThreads = 256;  // three blocks of them fit an SM

// Threads so that each has about two vectors of a short row, and not more than `most`.
inline int threads_for(int64_t vectors, int most) {
  const int64_t warps = (vectors + 2 * kWarpThreads - 1) / (2 * kWarpThreads);
  return static_cast<int>(std::clamp<int64_t>(warps * kWarpThreads, kWarpThreads, most));
}

// Shared memory of the reductions: an entry for each warp and for each block of the cluster.
inline int reduce_bytes(int threads, int ranks, bool listed) {
  return (threads / kWarpThreads + ranks) *
         (kKdLossStatsBytes + kKdLossSumsBytes + (listed ? kKdLossListBytes : 0));
}

// The plan in which `ranks` blocks share a row. The bytes of shared memory may be more than a plan
// holds.
inline KdLossPlan lay_out(const KdLossProblem& problem, bool on_chip, int ranks, int most_threads,
                          int64_t* bytes) {
  const int per_vector = kBytes / problem.element_size;
  const int models = needs_teacher(problem.divergence) ? 2 : 1;
  const bool listed = is_listed(problem.divergence);
  // A row that starts off the boundary may touch one vector more.
  const int64_t slack = problem.aligned ? per_vector - 1 : 2 * (per_vector - 1);
  const int64_t vectors = (problem.classes + slack) / per_vector;
  const int64_t a_rank = (vectors + ranks - 1) / ranks;
  KdLossPlan plan{};
  plan.on_chip = on_chip;
  plan.cluster = ranks;
  plan.vectors = static_cast<int>(vectors);
  plan.vectors_a_rank = static_cast<int>(a_rank);
  plan.threads = threads_for(a_rank, most_threads);
  *bytes = reduce_bytes(plan.threads, ranks, listed);
  if (listed) *bytes += list_space_bytes(problem.entries, static_cast<int>(a_rank * per_vector));
  if (on_chip) *bytes += a_rank * models * kBytes;
  plan.shared_bytes = static_cast<int>(std::min<int64_t>(*bytes, INT32_MAX));
  return plan;
}

}  // namespace plan_detail

// One pass over the logits needs no place to keep them.
inline KdLossPlan plan_one_pass(const KdLossProblem& problem) {
  int64_t bytes = 0;
  return plan_detail::lay_out(problem, false, 1, kKdLossOnePassThreads, &bytes);
}

inline KdLossPlan plan_kd_loss(const KdLossProblem& problem, const KdLossDevice& device) {
  using namespace plan_detail;
  if (!problem.want_grad && !has_middle_pass(problem.divergence)) return plan_one_pass(problem);
  int64_t bytes = 0;
  // The smallest cluster with which three blocks share an SM: one loads while one computes and
  // one stores. Failing that the largest cluster, as long as a block fits at all.
  const int64_t third = (device.shared_per_block + kReservedBytes) / 3 - kReservedBytes;
  const int most_ranks = device.major >= 9 ? 8 : 1;
  for (int ranks = 1; ranks <= most_ranks; ranks *= 2) {
    const KdLossPlan plan = lay_out(problem, true, ranks, kFewThreads, &bytes);
    if (bytes <= third) return plan;
  }
  const KdLossPlan plan = lay_out(problem, true, most_ranks, kManyThreads, &bytes);
  return bytes <= device.shared_per_block ? plan : plan_one_pass(problem);
}

}  // namespace kd
