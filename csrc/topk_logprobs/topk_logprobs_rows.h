// One row of topk_logprobs on vectors; compiled once per instruction set by common/for_each_isa.h.
//
// A look ahead over the first logits finds the maxima of groups of them. At least k are not smaller
// than the k-th largest maximum, and hardly more are: those are the first candidates. Then the row
// is gone through once, in blocks that stay in the first-level cache: a logit above the bound
// becomes a candidate, the exponentials of all others are summed up as what is left. Where
// candidates grow too many, all but the k largest are thrown out and add their exponentials too;
// the bound is then the k-th largest so far, and an equal logit that comes later has a larger id
// and stays out.

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

// Sorts by the upper halves, byte by byte; equal ones keep their order. Returns where the result
// is: in `a` or in `b`, which has room for it.
static inline const uint64_t* radix_sort(uint64_t* a, uint64_t* b, int64_t n) {
  uint32_t places[4][256] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int byte = 0; byte < 4; ++byte) ++places[byte][a[i] >> (32 + 8 * byte) & 255];
  }
  for (int byte = 0; byte < 4; ++byte) {
    uint32_t before = 0;
    for (uint32_t& place : places[byte]) before += std::exchange(place, before);
    for (int64_t i = 0; i < n; ++i) b[places[byte][a[i] >> (32 + 8 * byte) & 255]++] = a[i];
    std::swap(a, b);
  }
  return a;
}

class TopkRow {
 public:
  TopkRow(const TopkCall& call, TopkScratch& scratch)
      : call_(call),
        values_(scratch.values.data()),
        ids_(scratch.ids.data()),
        groups_(scratch.groups.data()),
        sorted_(scratch.sorted.data()),
        most_(scratch.most),
        ahead_(scratch.ahead),
        group_(scratch.group * kLanes),
        load_(loader(call.dtype)),
        capped_(call.spec.softcap != 0.0),
        // Without a cap the scale is a part of the exponent.
        per_logit_((capped_ ? 1.0 : call.spec.scale) / call.spec.temperature),
        to_exponent_(split(kLog2E * per_logit_)) {}

  void run(int64_t row) {
    count_ = 0;
    ref_ = kLowest;
    rest_ = 0.0;
    x_ = call_.x + row * call_.stride * bytes_of(call_.dtype);
    look_ahead();
    for (int64_t at = 0; at < call_.spec.classes; at += kBlock) {
      alignas(64) float buffer[kBlock], scaled[kBlock];
      const int n = padded(length(at));
      const float* logits = load_(x_, at, length(at), 1.0f, 0.0f, buffer);
      const float* z = logits;
      if (capped_) {
        for (int i = 0; i < n; i += kLanes) store(scaled + i, to_z(load(logits + i)));
        z = scaled;
      }
      raise(max_of_block(z, n));
      add_block(logits, z, n, static_cast<int32_t>(at));
      if (count_ > most_) shrink();
    }
    if (count_ > call_.k) shrink();
    finish(row);
  }

 private:
  // So many are sorted by counting for each the ones before it, more by distributing them.
  static constexpr int64_t kFewToSort = 128;
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

  int length(int64_t at) const {
    return static_cast<int>(std::min<int64_t>(kBlock, call_.spec.classes - at));
  }
  static int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

  // Finds the bound of the first candidates.
  void look_ahead() {
    const int64_t step = bytes_of(call_.dtype);
    int64_t count = 0;
    Vec largest = splat(-__builtin_inff());
    for (int64_t at = 0; at < std::min(call_.spec.classes, ahead_); at += kBlock) {
      alignas(64) float buffer[kBlock];
      const int n = padded(length(at));
      const char* ahead = x_ + at * step + kAhead;
      const float* logits = load_(x_, at, length(at), 1.0f, 0.0f, buffer);
      for (int begin = 0; begin < n; begin += group_) {
        const int end = std::min(begin + group_, n);
        Vec group = splat(-__builtin_inff());
        for (int i = begin; i < end; i += kLanes) {
          __builtin_prefetch(ahead + i * step);
          group = max(load(logits + i), group);
        }
        store(groups_ + count, group);
        count += kLanes;
        largest = max(group, largest);
      }
    }
    bound_ = -__builtin_inff();
    if (above_bound(groups_, count, bound_) >= call_.k) {
      bound_ = value_of(search(groups_, count, bound_, max_lane(largest)));
    }
  }

  void raise(float block_max) {
    if (!(block_max > ref_)) return;
    rest_ *= std::exp((static_cast<double>(ref_) - block_max) * per_logit_);
    ref_ = block_max;
  }

  static int64_t above_bound(const float* values, int64_t n, float bound) {
    int64_t found = 0;
    const Vec limit = splat(bound);
    for (int64_t i = 0; i < n; i += kLanes) {
      found += __builtin_popcount(bits(above(load(values + i), limit)));
    }
    return found;
  }

  // A bound, as a key, above which there are k values or, because of equal ones, the fewest that
  // are more; so many are above `low`, and none above `high`.
  int32_t search(const float* values, int64_t n, float low, float high) const {
    int64_t begin = key_of(low), end = key_of(high);
    while (end - begin > 1) {
      const int64_t middle = begin + (end - begin) / 2;
      const int64_t found = above_bound(values, n, value_of(static_cast<int32_t>(middle)));
      (found >= call_.k ? begin : end) = middle;
      if (found == call_.k) break;
    }
    return static_cast<int32_t>(begin);
  }

  void add_block(const float* logits, const float* z, int n, int32_t first_id) {
    const int64_t step = bytes_of(call_.dtype);
    const char* ahead = x_ + first_id * step + kAhead;
    // Copies: what is stored below could change a member.
    const Split to_exponent = to_exponent_;
    const Vec bound = splat(bound_), ref = splat(ref_);
    Vec rest{};
    for (int i = 0; i < n; i += kLanes) {
      __builtin_prefetch(ahead + i * step);
      const Vec x = load(logits + i);
      Mask live;
      const Vec e = exp2_scaled(load(z + i) - ref, to_exponent, &live);
      const Mask chosen = above(x, bound);
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
    const int64_t n = (count_ + kLanes - 1) / kLanes * kLanes;
    store(values_ + count_, splat(__builtin_nanf("")));  // above and equal to nothing
    Vec largest = splat(kLowest);
    for (int64_t i = 0; i < n; i += kLanes) largest = max(load(values_ + i), largest);
    // The k-th largest follows the key found; none is above the largest, whose key is not found.
    bound_ = value_of(search(values_, n, bound_, max_lane(largest)) + 1);
    keep_largest(n);
  }

  // Keeps those above the bound and the first of those equal to it, k in all; sums up the others.
  void keep_largest(int64_t n) {
    const Vec limit = splat(bound_);
    int64_t equals = call_.k - above_bound(values_, n, bound_);
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

  // The places of the candidates, largest first and equal ones as they came, in the lower halves.
  const uint64_t* sort() {
    if (count_ > kFewToSort) {
      for (int64_t i = 0; i < count_; ++i) {
        // Both zeros are one. The complement of the unsigned key: the largest comes first.
        const uint32_t key = 0x7fffffffu - static_cast<uint32_t>(key_of(values_[i] + 0.0f));
        sorted_[i] = uint64_t{key} << 32 | static_cast<uint32_t>(i);
      }
      return radix_sort(sorted_, sorted_ + call_.k, count_);
    }
    store(values_ + count_, splat(__builtin_nanf("")));
    for (int64_t i = 0; i < count_; ++i) {
      const Vec x = splat(values_[i]);
      int before = 0;
      for (int64_t j = 0; j < count_; j += kLanes) {
        const Vec others = load(values_ + j);
        const int64_t earlier = std::clamp<int64_t>(i - j, 0, kLanes);
        const uint32_t ties = bits(same(others, x)) & ((uint64_t{1} << earlier) - 1);
        before += __builtin_popcount(bits(above(others, x)) | ties);
      }
      sorted_[before] = static_cast<uint32_t>(i);
    }
    return sorted_;
  }

  void finish(int64_t row) {
    const int64_t k = call_.k;
    double total = rest_;
    float* z = values_;
    const uint64_t* sorted = sort();
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
      const uint32_t from = static_cast<uint32_t>(sorted[i]);
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
  float* const groups_;
  uint64_t* const sorted_;
  const int64_t most_;
  const int64_t ahead_;
  const int group_;  // logits of a group in each lane, times lanes
  const LoadBlock load_;
  const bool capped_;
  const double per_logit_;
  const Split to_exponent_;
  int64_t count_ = 0;
  const char* x_ = nullptr;  // the row
  float bound_ = 0.0f;       // candidates are above it
  float ref_ = 0.0f;         // the largest z, which exponentials are relative to
  double rest_ = 0.0;        // of the classes that are no candidates
};

void topk_rows(const TopkCall& call, int64_t begin, int64_t end, TopkScratch& scratch) {
  TopkRow job(call, scratch);
  for (int64_t row = begin; row < end; ++row) job.run(row);
}

}  // namespace kd::KD_ISA
