// Packed rows of a teacher's top-k: ids and log-probabilities in a fixed number of bytes.
//
// A row is a header of 8 bytes, then one stream of bits, least significant first (little-endian):
//   float32   log-probability of the largest entry
//   bfloat16  largest minus smallest log-probability, rounded up
//   uint16    number of entries; the rest of the k is padding
//   k x l     low bits of the ids, entries in ascending order of id (Elias-Fano)
//   k + h     high parts of the ids: bit (id >> l) + i is set for entry i
//   k x bits  steps below the largest log-probability; all ones is -inf
//   q x 4     sixteenths of a step for the q = ceil(k / 4) largest entries, 8 is none
//
// The few largest entries hold nearly all of the mass, so their rounding is what a loss sees. Mean
// error of the KL at k = 64: 1.6 % with 8 bits, 0.8 % with 9, 0.17 % with 8 and the last line
// above, which takes no more than 9. The first number is chosen after rounding, so that the decoded
// probabilities have the mass of the encoded ones: the tail is not what rounding leaves over (that
// alone gave 4 %). Zero bytes are a row of padding.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kd {

struct TopKFormat {
  int64_t k;
  int64_t vocab;
  int bits;

  static constexpr int kHeader = 8;
  static constexpr int kFineBits = 4;

  // floor(log2(vocab / k)): the split of the ids that takes the fewest bits.
  int low_bits() const {
    int count = 0;
    while ((vocab / k) >> (count + 1)) ++count;
    return count;
  }
  int64_t high_size() const { return k + ((vocab - 1) >> low_bits()) + 1; }
  int64_t fine_entries() const { return (k + 3) / 4; }
  // Where each part of the stream starts, in bits from the start of the row.
  int64_t low_start() const { return 8 * kHeader; }
  int64_t high_start() const { return low_start() + k * low_bits(); }
  int64_t code_start() const { return high_start() + high_size(); }
  int64_t fine_start() const { return code_start() + k * bits; }
  int64_t row_bytes() const { return (fine_start() + fine_entries() * kFineBits + 7) / 8; }

  // Steps from the largest to the smallest entry.
  uint32_t levels() const { return (1u << bits) - 2; }
  uint32_t minus_infinity() const { return (1u << bits) - 1; }
};

// Encodes and decodes rows, one at a time. Holds working memory: one codec a thread.
class TopKCodec {
 public:
  explicit TopKCodec(const TopKFormat& format);

  // Both return what is wrong with the row; empty when nothing is.
  std::string encode(const int64_t* ids, const float* logprobs, uint8_t* row);
  std::string decode(const uint8_t* row, int64_t* ids, float* logprobs);

 private:
  uint64_t read(int64_t position, int count) const;
  void write(int64_t position, uint64_t value);

  std::string gather(const int64_t* ids, const float* logprobs);
  void quantise();
  float first_logprob() const;
  bool read_ids(int64_t count);
  void rank_codes(int64_t count);

  const TopKFormat format_;
  const int low_bits_;
  const int64_t high_start_, code_start_, fine_start_, row_bytes_;
  std::vector<uint8_t> buffer_;  // one row, and 8 bytes for whole words at its end
  std::vector<uint64_t> ranking_, scratch_;
  // Of the entries in ascending order of id:
  std::vector<int64_t> ids_;
  std::vector<float> values_;
  std::vector<uint32_t> codes_;  // whole steps
  std::vector<int32_t> steps_;   // sixteenths of a step
  int64_t count_ = 0;
  float range_ = 0.0f;
};

}  // namespace kd
