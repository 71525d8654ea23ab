// How threads of hidden_match walk over a row of the student and the same row of the teacher.
#pragma once

#include "common/rows.cuh"
#include "hidden_match/hidden_match_plan.h"

namespace kd {

// A row, and the threads that share it.
template <typename scalar_t>
struct MatchRow {
  const scalar_t* student;
  const scalar_t* teacher;
  scalar_t* grad;  // null: none
  int width;
  int thread, threads_log2;
  bool live;  // it counts: else nothing is read
};

// Walks in chunks of kHeld vectors a thread. The last chunk stays in registers, and a pass begins
// where the one before it has ended: a row of one chunk is read once.
//
// kAligned: every row lies on 16-byte boundaries and ends on one. Otherwise vectors lie on the
// boundaries of the student's memory, the first may begin before the row and the last end behind
// it (0 there, which adds nothing), and what lies otherwise is read and written by elements.
template <typename scalar_t, int kHeld, bool kAligned>
class MatchWalk {
 public:
  static constexpr int kSize = kVectorSize<scalar_t>;

  __device__ __forceinline__ explicit MatchWalk(const MatchRow<scalar_t>& row)
      : row_(row),
        shift_(kAligned ? 0 : misalignment(row.student)),
        vectors_((row.width + shift_ + kSize - 1) / kSize),
        threads_(1 << row.threads_log2),
        chunks_(row.live ? (vectors_ + kHeld * threads_ - 1) >> (row.threads_log2 + kLog2) : 0),
        student_(row.student, shift_),
        teacher_(row.teacher, shift_),
        grad_(row.grad, shift_) {}

  // Starts to load what the first pass begins with: the caller may wait for numbers meanwhile.
  __device__ __forceinline__ void start() {
    if (chunks_ == 0) return;
    load(row_.thread);
    held_ = 0;
  }

  // Calls body(vector, student, teacher) for the vectors of this thread.
  template <typename Body>
  __device__ __forceinline__ void pass(const Body& body) {
    const bool backwards = held_ > 0;
    for (int i = 0; i < chunks_; ++i) {
      const int chunk = backwards ? chunks_ - 1 - i : i;
      const int first = chunk * kHeld * threads_ + row_.thread;
      if (chunk != held_) load(first);
      held_ = chunk;
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int vector = first + k * threads_;
        if (vector >= vectors_) continue;
        float s[kSize], t[kSize];
        unpack<scalar_t>(kept_student_[k], s);
        unpack<scalar_t>(kept_teacher_[k], t);
        body(vector, s, t);
      }
    }
  }

  __device__ __forceinline__ void store(int vector, const float (&x)[kSize]) const {
    if constexpr (kAligned) {
      store_16(row_.grad + vector * kSize, pack<scalar_t>(x));
    } else {
      store_vector(grad_, vector * kSize - shift_, row_.width, x);
    }
  }

  // The gradient of a row that has none.
  __device__ __forceinline__ void store_zeros() const {
    const float zeros[kSize] = {};
    for (int vector = row_.thread; vector < vectors_; vector += threads_) store(vector, zeros);
  }

 private:
  static constexpr int kLog2 = kHeld == 4 ? 2 : 0;
  static_assert(1 << kLog2 == kHeld);

  // All loads are under way before the first result is used.
  __device__ __forceinline__ void load(int first) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int vector = first + k * threads_;
      if (vector >= vectors_) continue;
      if constexpr (kAligned) {
        kept_student_[k] = *reinterpret_cast<const uint4*>(row_.student + vector * kSize);
        kept_teacher_[k] = *reinterpret_cast<const uint4*>(row_.teacher + vector * kSize);
      } else {
        const int at = vector * kSize - shift_;
        kept_student_[k] = load_vector(student_, at, row_.width, 0.0f);
        kept_teacher_[k] = load_vector(teacher_, at, row_.width, 0.0f);
      }
    }
  }

  const MatchRow<scalar_t>& row_;
  const int shift_;  // elements of the first vector that lie before the row
  const int vectors_, threads_, chunks_;
  const RowView<const scalar_t> student_, teacher_;
  const RowView<scalar_t> grad_;
  int held_ = -1;  // the chunk in registers
  uint4 kept_student_[kHeld], kept_teacher_[kHeld];
};

}  // namespace kd
