// The list of a sparse teacher in the row kernel of kd_loss.
//
// A bit for each class hides the listed ones from the passes over the row, so that the student's
// mass outside of the list is a sum and not a difference from 1. Each block of a cluster keeps the
// listed classes of its own part of the row, where they are met one by one.
#pragma once

#include "kd_loss/kd_loss_device.cuh"

namespace kd {

struct ListCall {
  const int64_t* ids;     // [rows, size] or null
  const float* logprobs;  // [rows, size], natural
  int size;
};

// What the listed classes add up to; exponents relative to the row's maximum, in units of log2.
struct alignas(16) ListSums {
  float student_sum = 0.0f, hard_sum = 0.0f;
  float live = 0.0f, exponent_sum = 0.0f;  // of the student's logits that are not -inf
  float mass = 0.0f;                       // of the teacher
  float value = 0.0f;                      // sum of p (log p - a), in reverse KL of e (a - log p)
  float count = 0.0f;                      // entries that count
  float wrong = 0.0f;                      // ids out of range
};

static_assert(sizeof(ListSums) == kKdLossListBytes);

__device__ __forceinline__ ListSums list_across_warp(ListSums x) {
  return {warp_sum(x.student_sum),  warp_sum(x.hard_sum), warp_sum(x.live),
          warp_sum(x.exponent_sum), warp_sum(x.mass),     warp_sum(x.value),
          warp_sum(x.count),        warp_sum(x.wrong)};
}

// A block's part of the list, in shared memory.
template <typename scalar_t>
class ListSpace {
 public:
  __device__ __forceinline__ ListSpace(char* begin, const ListCall& call, int64_t row, int columns,
                                       int first)
      : size_(call.size),
        columns_(columns),
        first_(first),
        logprobs_(call.logprobs + row * call.size),
        z_(reinterpret_cast<float*>(begin)),
        id_(reinterpret_cast<int*>(z_ + call.size)),
        bits_(reinterpret_cast<uint32_t*>(id_ + call.size)) {}

  // Finds the entries of this block's columns, of a repeated class the first. The row is
  // `student`, of `classes`; there is a barrier at the end.
  __device__ __forceinline__ void open(const int64_t* ids, const scalar_t* student,
                                       const LogitRule& rule, int classes, ListSums& sums,
                                       bool count_wrong) {
    for (int k = threadIdx.x; k < (columns_ + 31) / 32; k += blockDim.x) bits_[k] = 0u;
    for (int k = threadIdx.x; k < size_; k += blockDim.x) {
      const int64_t id = ids[k];
      const bool wrong = id < -1 || id >= classes;
      if (wrong && count_wrong) sums.wrong += 1.0f;
      id_[k] = wrong || id < 0 ? -1 : static_cast<int>(id);
    }
    __syncthreads();
    for (int k = threadIdx.x; k < size_; k += blockDim.x) {
      const int id = id_[k], at = id - first_;
      bool mine = id >= 0 && at >= 0 && at < columns_;
      for (int before = 0; mine && before < k; ++before) mine = id_[before] != id;
      float z[1] = {kMinusInf};
      if (mine) {
        atomicOr(&bits_[at / 32], 1u << (at % 32));
        z[0] = static_cast<float>(student[id]);
        to_z(rule, z);
      }
      // NaN: no entry of this block. A logit that is NaN makes the row NaN by itself.
      z_[k] = mine ? z[0] : kNan;
    }
    __syncthreads();
  }

  // Makes the listed ones of some classes, the first of them `column`, -inf.
  template <int kSize>
  __device__ __forceinline__ void hide(int column, float (&x)[kSize]) const {
    const int at = column - first_;
    const uint32_t listed = bits_[at / 32] >> (at % 32);
    if ((listed & ((1u << kSize) - 1u)) == 0u) return;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if ((listed >> i & 1u) != 0u) x[i] = kMinusInf;
    }
  }

  // Calls body(class, logit, log-probability) for the entries of this thread.
  template <typename Body>
  __device__ __forceinline__ void each(const Body& body) const {
    for (int k = threadIdx.x; k < size_; k += blockDim.x) {
      if (z_[k] == z_[k]) body(id_[k], z_[k], logprobs_[k]);
    }
  }

 private:
  int size_, columns_, first_;
  const float* logprobs_;
  float* z_;  // NaN: not of this block, or no entry
  int* id_;
  uint32_t* bits_;
};

// Adds an entry; z relative to the row's maximum.
__device__ __forceinline__ void add_entry(const RowNumbers& n, ListSums& sums, float max, float z,
                                          float log_p) {
  const float a = exponent(n.student, z, max);
  const float e = exp2_approx(a);
  const float p = exp2_approx(log_p * static_cast<float>(kLog2E));
  sums.student_sum += e;
  if (n.heat == Heat::kSquared) sums.hard_sum = fmaf(e, e, sums.hard_sum);
  if (n.heat == Heat::kOther) sums.hard_sum += exp2_approx(n.temperature * a);
  if (z > kMinusInf) {
    sums.live += 1.0f;
    sums.exponent_sum += a;
  }
  sums.mass += p;
  sums.count += 1.0f;
  if (n.reverse) {
    if (e > 0.0f) sums.value = fmaf(e, fmaf(kLn2, a, -log_p), sums.value);
  } else {
    if (p > 0.0f) sums.value = fmaf(p, fmaf(-kLn2, a, log_p), sums.value);
  }
}

__device__ __forceinline__ float log_or_minus_inf(float x) {
  return x > 0.0f ? logf(x) : kMinusInf;
}

// D of a row and its gradient for z / T, from the sums over the listed classes and the others.
struct ListMath {
  float divergence = 0.0f;
  // Of a class outside: slope * q - uniform; with an entropy q ln2 (a - expectation).
  float slope = 0.0f, uniform = 0.0f, expectation = 0.0f;

  float log_total;  // natural, of all the student's exponentials
  float per_total;
  float scale, off;   // of a listed class, see entry()
  float log_divisor;  // what the teacher's log-probabilities are lowered by

  // `tail` is the student's of the classes outside, `total` of all.
  __device__ __forceinline__ ListMath(const RowNumbers& n, const RowStats& tail,
                                      const ListSums& list, float total, int classes) {
    per_total = 1.0f / total;
    log_total = logf(total);
    const float divisor = fmaxf(list.mass, 1.0f);
    log_divisor = logf(divisor);
    const float mass = list.mass / divisor;
    const bool others = list.count < static_cast<float>(classes);
    const float rest = others ? fmaxf(1.0f - list.mass, 0.0f) : 0.0f;
    const float tail_q = tail.student_sum * per_total;
    const float listed_q = list.student_sum * per_total;
    if (n.reverse) {
      reverse(n, tail, list.value * per_total + listed_q * (log_divisor - log_total), mass, rest,
              listed_q, tail_q);
    } else {
      const float value = (list.value + list.mass * (log_total - log_divisor)) / divisor;
      forward(n, tail, value, mass, rest, listed_q, tail_q);
    }
  }

  // The gradient for a listed class.
  __device__ __forceinline__ float entry(const RowNumbers& n, float max, float z,
                                         float log_p) const {
    const float a = exponent(n.student, z, max);
    const float q = exp2_approx(a) * per_total;
    const float known = log_p - log_divisor;
    if (n.reverse) {
      const float difference = fmaf(kLn2, a, -log_total) - known;
      return q > 0.0f ? scale * q * (difference - off) : 0.0f;
    }
    return scale * q - off * exp2_approx(known * static_cast<float>(kLog2E));
  }

 private:
  __device__ __forceinline__ void forward(const RowNumbers& n, const RowStats& tail, float value,
                                          float mass, float rest, float listed_q, float tail_q) {
    scale = mass;
    off = 1.0f;
    if (n.tail == Tail::kRenorm) {
      const bool some = mass > 0.0f;
      divergence = some ? value / mass + logf(listed_q) - logf(mass) : 0.0f;
      scale = some ? 1.0f / listed_q : 0.0f;
      off = some ? 1.0f / mass : 0.0f;
      return;
    }
    divergence = value;
    slope = mass;
    if (n.tail == Tail::kNone) return;
    scale = slope = mass + rest;
    if (!(rest > 0.0f)) return;
    if (n.tail == Tail::kBucket) {
      divergence += rest * (logf(rest) - log_or_minus_inf(tail_q));
      slope = tail_q > 0.0f ? slope - rest / tail_q : 0.0f;
    } else if (tail.live > 0.0f) {
      uniform = rest / tail.live;
      const float log_q = fmaf(kLn2, tail.exponent_sum, -tail.live * log_total);
      divergence += rest * logf(uniform) - uniform * log_q;
    } else {
      divergence = -kMinusInf;
    }
  }

  __device__ __forceinline__ void reverse(const RowNumbers& n, const RowStats& tail, float value,
                                          float mass, float rest, float listed_q, float tail_q) {
    const float log_rest = logf(fmaxf(rest, static_cast<float>(kLeastTail)));
    scale = 1.0f;
    divergence = value;
    if (n.tail == Tail::kRenorm) {
      const bool some = listed_q > 0.0f;
      scale = some ? 1.0f / listed_q : 0.0f;
      off = value * scale;
      divergence = some ? off - (logf(listed_q) - log_or_minus_inf(mass)) : 0.0f;
    } else if (n.tail == Tail::kNone) {
      off = value + listed_q - 1.0f;
      slope = -(value + listed_q);
    } else if (n.tail == Tail::kBucket) {
      const float ratio = tail_q > 0.0f ? logf(tail_q) - log_rest : 0.0f;
      divergence += tail_q * ratio;
      off = divergence;
      slope = ratio - divergence;
    } else {
      const float log_each = tail.live > 0.0f ? log_rest - logf(tail.live) : 0.0f;
      const float entropy = fmaf(kLn2 * tail.cross, per_total, -tail_q * log_total);
      divergence += entropy - tail_q * log_each;
      off = divergence;
      slope = 1.0f;
      expectation = (log_total + log_each + divergence) / kLn2;
    }
  }
};

}  // namespace kd
