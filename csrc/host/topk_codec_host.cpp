#include "host/topk_codec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace kd {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Of a sum of probabilities above 1: what a softmax in half precision may leave.
constexpr double kMassTolerance = 0.01;
// Below it a float32 probability is 0. One such number (a class masked by -1e9, say) would
// otherwise stretch the steps of the whole row.
constexpr float kZeroProbability = -100.0f;
constexpr int kFineNone = 8;  // what is added to sixteenths of a step, which may be negative
constexpr int kIndexBits = 16;
constexpr uint64_t kIndexMask = (1u << kIndexBits) - 1;

float bfloat16_above(float x) {  // x >= 0
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if (bits & 0xffffu) bits += 0x10000u;
  return std::bit_cast<float>(bits & 0xffff0000u);
}

// One sixteenth of a step. Encoder and decoder must round alike, here and in value_of.
float step_of(float range, const TopKFormat& format) {
  return range / static_cast<float>(format.levels() * 16);
}

float value_of(float first, float step, int32_t steps) {
  return first - step * static_cast<float>(steps);
}

}  // namespace

TopKCodec::TopKCodec(const TopKFormat& format)
    : format_(format),
      low_bits_(format.low_bits()),
      high_start_(format.high_start()),
      code_start_(format.code_start()),
      fine_start_(format.fine_start()),
      row_bytes_(format.row_bytes()),
      buffer_(row_bytes_ + 8),
      ranking_(format.k),
      scratch_(format.k),
      ids_(format.k),
      values_(format.k),
      codes_(format.k),
      steps_(format.k) {}

// Up to 57 bits anywhere.
uint64_t TopKCodec::read(int64_t position, int count) const {
  uint64_t word;
  std::memcpy(&word, buffer_.data() + (position >> 3), sizeof word);
  return (word >> (position & 7)) & ((uint64_t{1} << count) - 1);
}

// The bits there must be zero.
void TopKCodec::write(int64_t position, uint64_t value) {
  uint64_t word;
  std::memcpy(&word, buffer_.data() + (position >> 3), sizeof word);
  word |= value << (position & 7);
  std::memcpy(buffer_.data() + (position >> 3), &word, sizeof word);
}

// Checks a row and brings its entries into the order of their ids.
std::string TopKCodec::gather(const int64_t* ids, const float* logprobs) {
  count_ = 0;
  double mass = 0.0;
  for (int64_t i = 0; i < format_.k; ++i) {
    const float value = logprobs[i];
    if (ids[i] == -1) {
      if (value == kMinusInfinity) continue;
      return "logprobs must be -inf where the id is -1, got " + std::to_string(value);
    }
    if (ids[i] < 0 || ids[i] >= format_.vocab) {
      return "ids must be -1 or in [0, " + std::to_string(format_.vocab) + "), got " +
             std::to_string(ids[i]);
    }
    if (std::isnan(value)) return "logprobs must not be NaN, got NaN";
    mass += std::exp(static_cast<double>(value));
    ranking_[count_++] = static_cast<uint64_t>(ids[i]) << kIndexBits | static_cast<uint64_t>(i);
  }
  if (mass > 1.0 + kMassTolerance) {
    return "logprobs must be of probabilities whose sum is at most 1, got a sum of " +
           std::to_string(mass);
  }
  std::sort(ranking_.begin(), ranking_.begin() + count_);
  for (int64_t i = 0; i < count_; ++i) {
    ids_[i] = static_cast<int64_t>(ranking_[i] >> kIndexBits);
    const float value = logprobs[ranking_[i] & kIndexMask];
    values_[i] = value < kZeroProbability ? kMinusInfinity : value;
    if (i > 0 && ids_[i] == ids_[i - 1]) {
      return "ids must differ within a row, got " + std::to_string(ids_[i]) + " twice";
    }
  }
  return {};
}

// Ranks the entries: few whole steps first, of equal ones the smaller id. A radix sort: decoding
// was half as fast with std::sort.
void TopKCodec::rank_codes(int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    ranking_[i] = uint64_t{codes_[i]} << kIndexBits | static_cast<uint64_t>(i);
  }
  constexpr int kDigit = 4;
  for (int shift = 0; shift < format_.bits; shift += kDigit) {
    const auto digit = [shift](uint64_t key) {
      return (key >> (kIndexBits + shift)) & ((1u << kDigit) - 1);
    };
    int64_t places[1 << kDigit] = {};
    for (int64_t i = 0; i < count; ++i) ++places[digit(ranking_[i])];
    int64_t start = 0;
    for (int64_t& place : places) start += std::exchange(place, start);
    for (int64_t i = 0; i < count; ++i) scratch_[places[digit(ranking_[i])]++] = ranking_[i];
    ranking_.swap(scratch_);
  }
}

// Rounds log-probabilities to steps, those of the largest entries to sixteenths of a step.
void TopKCodec::quantise() {
  float largest = kMinusInfinity, smallest = -kMinusInfinity;
  for (int64_t i = 0; i < count_; ++i) {
    if (values_[i] == kMinusInfinity) continue;
    largest = std::max(largest, values_[i]);
    smallest = std::min(smallest, values_[i]);
  }
  range_ = largest == kMinusInfinity ? 0.0f : bfloat16_above(largest - smallest);
  const double step = step_of(range_, format_);
  const auto exact = [&](int64_t i) {
    return step > 0.0 ? (static_cast<double>(largest) - values_[i]) / step : 0.0;
  };
  for (int64_t i = 0; i < count_; ++i) {
    const bool finite = values_[i] != kMinusInfinity;
    codes_[i] = finite ? std::min<uint32_t>(format_.levels(), std::lround(exact(i) / 16.0))
                       : format_.minus_infinity();
    steps_[i] = static_cast<int32_t>(codes_[i] * 16);
  }
  rank_codes(count_);
  const int64_t fine = std::min(count_, format_.fine_entries());
  for (int64_t rank = 0; rank < fine; ++rank) {
    const int64_t i = static_cast<int64_t>(ranking_[rank] & kIndexMask);
    if (codes_[i] == format_.minus_infinity()) break;
    const long offset = std::lround(exact(i)) - steps_[i];
    steps_[i] += static_cast<int32_t>(std::clamp<long>(offset, -kFineNone, kFineNone - 1));
  }
}

// The first log-probability with which the decoded ones have the mass of the encoded ones, and
// never more: as float32 they are rounded once again.
float TopKCodec::first_logprob() const {
  const float step = step_of(range_, format_);
  float largest = kMinusInfinity;
  for (int64_t i = 0; i < count_; ++i) largest = std::max(largest, values_[i]);
  if (largest == kMinusInfinity) return kMinusInfinity;
  double given = 0.0;
  for (int64_t i = 0; i < count_; ++i) {
    given += std::exp(static_cast<double>(values_[i]) - largest);
  }
  const double log_mass = std::min(0.0, largest + std::log(given));
  // Too much at first, as if the largest entry had all of the mass; two or three rounds.
  float first = static_cast<float>(log_mass);
  for (;;) {
    double sum = 0.0;
    for (int64_t i = 0; i < count_; ++i) {
      if (values_[i] == kMinusInfinity) continue;
      sum += std::exp(static_cast<double>(value_of(first, step, steps_[i])));
    }
    const double excess = sum > 0.0 ? std::log(sum) - log_mass : 0.0;
    if (excess <= 0.0) return first;
    first = std::nextafter(static_cast<float>(first - excess), kMinusInfinity);
  }
}

std::string TopKCodec::encode(const int64_t* ids, const float* logprobs, uint8_t* row) {
  if (std::string wrong = gather(ids, logprobs); !wrong.empty()) return wrong;
  std::fill(buffer_.begin(), buffer_.end(), uint8_t{0});
  if (count_ > 0) {
    quantise();
    const float first = first_logprob();
    const auto range = static_cast<uint16_t>(std::bit_cast<uint32_t>(range_) >> 16);
    const auto count = static_cast<uint16_t>(count_);
    std::memcpy(buffer_.data(), &first, 4);
    std::memcpy(buffer_.data() + 4, &range, 2);
    std::memcpy(buffer_.data() + 6, &count, 2);
    const uint64_t low_mask = (uint64_t{1} << low_bits_) - 1;
    for (int64_t i = 0; i < count_; ++i) {
      write(format_.low_start() + i * low_bits_, ids_[i] & low_mask);
      write(high_start_ + (ids_[i] >> low_bits_) + i, 1);
      write(code_start_ + i * format_.bits, codes_[i]);
    }
    const int64_t fine = std::min(count_, format_.fine_entries());
    for (int64_t rank = 0; rank < fine; ++rank) {
      const int64_t i = static_cast<int64_t>(ranking_[rank] & kIndexMask);
      const int32_t offset = steps_[i] - static_cast<int32_t>(codes_[i] * 16) + kFineNone;
      write(fine_start_ + rank * TopKFormat::kFineBits, static_cast<uint64_t>(offset));
    }
  }
  std::memcpy(row, buffer_.data(), row_bytes_);
  return {};
}

// False when the bits are no ids, which only damage explains.
bool TopKCodec::read_ids(int64_t count) {
  constexpr int kWord = 56;
  const int64_t size = format_.high_size();
  int64_t i = 0;
  for (int64_t base = 0; base < size && i < count; base += kWord) {
    const int width = static_cast<int>(std::min<int64_t>(kWord, size - base));
    uint64_t word = read(high_start_ + base, width);
    for (; word != 0 && i < count; word &= word - 1, ++i) {
      const int64_t high = base + std::countr_zero(word) - i;
      const uint64_t low = read(format_.low_start() + i * low_bits_, low_bits_);
      ids_[i] = high << low_bits_ | static_cast<int64_t>(low);
      if (ids_[i] >= format_.vocab) return false;
    }
  }
  return i == count;
}

std::string TopKCodec::decode(const uint8_t* row, int64_t* ids, float* logprobs) {
  std::memcpy(buffer_.data(), row, row_bytes_);
  float first;
  uint16_t range, count;
  std::memcpy(&first, buffer_.data(), 4);
  std::memcpy(&range, buffer_.data() + 4, 2);
  std::memcpy(&count, buffer_.data() + 6, 2);
  if (count > format_.k || !(first <= 0.0f) || !read_ids(count)) {
    return "rows must be what encode() made, got a damaged one";
  }
  const float step = step_of(std::bit_cast<float>(uint32_t{range} << 16), format_);
  const uint32_t none = format_.minus_infinity();
  for (int64_t i = 0; i < count; ++i) {
    codes_[i] = static_cast<uint32_t>(read(code_start_ + i * format_.bits, format_.bits));
  }
  rank_codes(count);
  const int64_t fine = std::min<int64_t>(count, format_.fine_entries());
  int64_t rank = 0;
  uint64_t last = 0;  // code of the last refined entry
  for (; rank < fine; ++rank) {
    const uint64_t code = ranking_[rank] >> kIndexBits;
    if (code == none) break;
    const auto offset = static_cast<int64_t>(
        read(fine_start_ + rank * TopKFormat::kFineBits, TopKFormat::kFineBits));
    const int64_t steps =
        std::max<int64_t>(0, static_cast<int64_t>(code) * 16 + offset - kFineNone);
    ranking_[rank] = static_cast<uint64_t>(steps) << kIndexBits | (ranking_[rank] & kIndexMask);
    last = code;
  }
  const int64_t refined = rank;
  int64_t mixed = refined;  // the refined ones and those of the same whole step may change places
  for (; rank < count; ++rank) {
    const uint64_t code = ranking_[rank] >> kIndexBits;
    if (code == last) mixed = rank + 1;
    ranking_[rank] = (code * 16) << kIndexBits | (ranking_[rank] & kIndexMask);
  }
  std::sort(ranking_.begin(), ranking_.begin() + mixed);
  for (rank = 0; rank < count; ++rank) {
    const auto steps = static_cast<int32_t>(ranking_[rank] >> kIndexBits);
    const auto i = static_cast<int64_t>(ranking_[rank] & kIndexMask);
    ids[rank] = ids_[i];
    logprobs[rank] = codes_[i] == none ? kMinusInfinity : value_of(first, step, steps);
  }
  std::fill(ids + count, ids + format_.k, int64_t{-1});
  std::fill(logprobs + count, logprobs + format_.k, kMinusInfinity);
  return {};
}

}  // namespace kd
