// One row of topk_logprobs on vectors; compiled once per instruction set by common/for_each_isa.h.
//
// The row is read once, in blocks that stay in the first-level cache. A logit above the threshold
// becomes a candidate; the exponentials of all others are summed up as what is left. Now and then
// all candidates but the k largest are thrown out, and add their exponentials too: the threshold is
// then the k-th largest so far. An equal logit that comes later has a larger id and stays out.

#include "common/logit_blocks.h"

namespace kd::KD_ISA {

// Whole numbers in the order of floats, and back; both zeros compare equal as floats.
static inline int32_t key_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
static inline float value_of(int32_t key) {
  const int32_t bits = key >= 0 ? key : key ^ 0x7fffffff;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

class TopkRow {
 public:
  TopkRow(const TopkCall& call, TopkScratch& scratch)
      : call_(call),
        values_(scratch.values.data()),
        ids_(scratch.ids.data()),
        sorted_(scratch.sorted.data()),
        most_(scratch.most),
        load_(loader(call.dtype)),
        capped_(call.spec.softcap != 0.0),
        // Without a cap the scale is a part of the exponent.
        per_logit_((capped_ ? 1.0 : call.spec.scale) / call.spec.temperature),
        to_exponent_(split(kLog2E * per_logit_)) {}

  void run(int64_t row) {
    count_ = 0;
    threshold_ = -__builtin_inff();
    ref_ = kLowest;
    rest_ = 0.0;
    const char* x = call_.x + row * call_.stride * bytes_of(call_.dtype);
    const int64_t classes = call_.spec.classes;
    for (int64_t at = 0; at < classes; at += kBlock) {
      alignas(64) float buffer[kBlock], scaled[kBlock];
      const int length = static_cast<int>(std::min<int64_t>(kBlock, classes - at));
      const int n = (length + kLanes - 1) / kLanes * kLanes;
      const float* logits = load_(x, at, length, 1.0f, 0.0f, buffer);
      const float* z = logits;
      if (capped_) {
        for (int i = 0; i < n; i += kLanes) store(scaled + i, to_z(load(logits + i)));
        z = scaled;
      }
      raise(max_of_block(z, n));
      add_block(logits, z, n, static_cast<int32_t>(at), x + at * bytes_of(call_.dtype) + kAhead);
      if (count_ > most_) shrink();
    }
    if (count_ > call_.k) shrink();
    finish(row);
  }

 private:
  // Finite: -inf less this must stay -inf.
  static constexpr float kLowest = -3.4028235e38f;

  Vec to_z(Vec x) const {
    return capped_ ? transform(x, static_cast<float>(call_.spec.scale),
                               static_cast<float>(call_.spec.softcap))
                   : x;
  }

  Vec exponentials(Vec z) const {
    Mask live;
    return exp2_scaled(z - splat(ref_), to_exponent_, &live);
  }

  void raise(float block_max) {
    if (!(block_max > ref_)) return;
    rest_ *= std::exp((static_cast<double>(ref_) - block_max) * per_logit_);
    ref_ = block_max;
  }

  void add_block(const float* logits, const float* z, int n, int32_t first_id, const char* ahead) {
    const int64_t step = bytes_of(call_.dtype);
    const Vec threshold = splat(threshold_);
    Vec rest{};
    for (int i = 0; i < n; i += kLanes) {
      __builtin_prefetch(ahead + i * step);
      const Vec x = load(logits + i);
      const Vec e = exponentials(load(z + i));
      const Mask chosen = above(x, threshold);
      if (const uint32_t lanes = bits(chosen)) {
        push(x, lane_numbers() + (first_id + i), lanes);
        rest += select(chosen, Vec{}, e);
      } else {
        rest += e;
      }
    }
    rest_ += sum(rest);
  }

  // Appends some lanes in their order.
  void push(Vec x, IntVec ids, uint32_t lanes) {
    count_ += compress(x, ids, lanes, values_ + count_, ids_ + count_);
  }

  // Throws out all candidates but the k largest; there are more than k.
  void shrink() {
    const int64_t n = pad();
    const int64_t k = call_.k;
    // The largest t for which at least k candidates are not below t.
    int64_t low = key_of(threshold_), high = int64_t{key_of(largest(n))} + 1;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      const int64_t found = not_below(n, value_of(static_cast<int32_t>(middle)));
      (found >= k ? low : high) = middle;
      if (found == k) break;
    }
    threshold_ = value_of(static_cast<int32_t>(low));
    keep_largest(n, threshold_);
  }

  // Makes whole vectors of the candidates, with lanes that are above and equal to nothing.
  int64_t pad() {
    const int64_t n = (count_ + kLanes - 1) / kLanes * kLanes;
    store(values_ + count_, splat(__builtin_nanf("")));
    return n;
  }

  float largest(int64_t n) const {
    Vec m = splat(kLowest);
    for (int64_t i = 0; i < n; i += kLanes) m = max(load(values_ + i), m);
    return max_lane(m);
  }

  int64_t not_below(int64_t n, float t) const {
    IntVec found{};
    const Vec limit = splat(t);
    for (int64_t i = 0; i < n; i += kLanes) found -= load(values_ + i) >= limit;
    return sum(found);
  }

  // Keeps those above t and the first of those equal to it, k in all; the rest is summed up.
  void keep_largest(int64_t n, float t) {
    const Vec limit = splat(t);
    int64_t equals = call_.k;
    for (int64_t i = 0; i < n; i += kLanes) {
      equals -= __builtin_popcount(bits(above(load(values_ + i), limit)));
    }
    const int64_t count = count_;
    Vec rest{};
    count_ = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec x = load(values_ + i);
      uint32_t kept = bits(above(x, limit));
      for (uint32_t ties = bits(same(x, limit)); ties != 0 && equals > 0; --equals) {
        kept |= ties & -ties;
        ties &= ties - 1;
      }
      const int inside = static_cast<int>(std::min<int64_t>(kLanes, count - i));
      const uint32_t dropped = ~kept & ((uint64_t{1} << inside) - 1);
      if (dropped != 0) rest += select(lanes_of(dropped), exponentials(to_z(x)), Vec{});
      // Behind what has been read already.
      if (kept != 0) push(x, load(ids_ + i), kept);
    }
    rest_ += sum(rest);
  }

  void finish(int64_t row) {
    const int64_t k = call_.k;
    double total = rest_;
    float* z = values_;
    // Largest first; equal ones have larger ids the later they come.
    for (int64_t i = 0; i < count_; ++i) {
      const uint32_t key = static_cast<uint32_t>(key_of(values_[i] + 0.0f)) ^ 0x80000000u;
      sorted_[i] = uint64_t{key} << 32 | (0xffffffffu - static_cast<uint32_t>(i));
    }
    std::sort(sorted_, sorted_ + count_, std::greater<uint64_t>());
    for (int64_t i = 0; i < count_; i += kLanes) {
      const Vec scaled = to_z(load(z + i));
      const int inside = static_cast<int>(std::min<int64_t>(kLanes, count_ - i));
      total += sum(select(first_lanes(inside), exponentials(scaled), Vec{}));
      store(z + i, scaled);
    }
    const double log_total = std::log(total);
    int64_t* ids = call_.ids + row * k;
    float* logprobs = call_.logprobs + row * k;
    for (int64_t i = 0; i < count_; ++i) {
      const uint32_t from = 0xffffffffu - static_cast<uint32_t>(sorted_[i]);
      ids[i] = ids_[from];
      logprobs[i] =
          static_cast<float>((static_cast<double>(z[from]) - ref_) * per_logit_ - log_total);
    }
    for (int64_t i = count_; i < k; ++i) {
      ids[i] = -1;
      logprobs[i] = -__builtin_inff();
    }
    // Without a live class nothing is left; of NaN everything is NaN.
    call_.tail[row] = total == 0.0 ? 0.0f : static_cast<float>(rest_ / total);
  }

  const TopkCall& call_;
  float* const values_;
  int32_t* const ids_;
  uint64_t* const sorted_;
  const int64_t most_;
  const LoadBlock load_;
  const bool capped_;
  const double per_logit_;
  const Split to_exponent_;
  int64_t count_ = 0;
  float threshold_ = 0.0f;  // at least k candidates are not below it, unless it is -inf
  float ref_ = 0.0f;        // the largest z so far, which exponentials are relative to
  double rest_ = 0.0;       // of the classes that are no candidates
};

void topk_rows(const TopkCall& call, int64_t begin, int64_t end, TopkScratch& scratch) {
  TopkRow job(call, scratch);
  for (int64_t row = begin; row < end; ++row) job.run(row);
}

}  // namespace kd::KD_ISA
