// The kernels of kd_shard: the passes of kd_loss over a row (kd_loss_device.cuh), each a kernel of
// its own, between which processes merge what they found. None reads a logit twice, so a block
// takes a row and walks over it in global memory. Of the tensors [numbers, rows] the rows are
// contiguous.
#pragma once

#include <cfloat>

#include "kd_loss/kd_loss_device.cuh"
#include "kd_loss/kd_loss_logits.cuh"
#include "kd_shard/kd_shard.h"

namespace kd {

// Blocks that share an SM: the logits on their way to a block are few, as it computes at once.
constexpr int kShardBlocks = 4;

// What the kernels receive.
template <typename scalar_t>
struct ShardCall {
  Matrix<const scalar_t> student, teacher;  // [rows, classes]
  Matrix<scalar_t> grad;                    // [rows, classes], of the last step
  const int64_t* places;                    // [rows] or null: every row counts
  const float* merged;                      // [kMergedNumbers, rows], of the steps after the first
  float* numbers;                           // [kFoundNumbers or kMiddleNumbers, rows]
  int64_t rows;
  int classes, vectors;
  RowNumbers row_numbers;
};

// A row, and how its logits are walked.
template <typename scalar_t, Divergence kD>
struct ShardRow {
  using Math = RowMath<kD>;
  static constexpr int kSize = kVectorSize<scalar_t>;

  const ShardCall<scalar_t>& call;
  int64_t row, place;
  Walk walk;
  RowView<const scalar_t> student;

  __device__ __forceinline__ ShardRow(const ShardCall<scalar_t>& shard, int64_t row)
      : call(shard),
        row(row),
        place(shard.places != nullptr ? shard.places[row] : kElsewhere),
        walk{static_cast<int>(threadIdx.x), shard.vectors,
             misalignment(shard.student.data + row * shard.student.stride), shard.classes},
        student(shard.student, row, walk.shift) {}

  // Whether the row counts, and if not what is written for each of its numbers and logits: NaN
  // where the place is none.
  __device__ __forceinline__ bool counts() const {
    return kElsewhere <= place && place < call.classes;
  }
  __device__ __forceinline__ float instead() const { return place == kIgnored ? 0.0f : kNan; }

  // Calls body(first class, student's z, teacher's z) for the vectors of this thread.
  template <typename Body>
  __device__ __forceinline__ void each(bool backwards, const Body& body) const {
    constexpr bool kTeacher = Math::kTeacher;
    const RowNumbers& n = call.row_numbers;
    const RowView<const scalar_t> teacher =
        kTeacher ? RowView<const scalar_t>(call.teacher, row, walk.shift) : student;
    const LoopedLogits<scalar_t, kTeacher> logits{student, teacher, walk};
    logits.each(backwards, [&](int first, uint4 raw_student, uint4 raw_teacher) {
      float s[kSize], t[kSize];
      open_vector<scalar_t>(n.student, raw_student, s);
      if constexpr (kTeacher) open_vector<scalar_t>(n.teacher, raw_teacher, t);
      body(first, s, t);
    });
  }

  __device__ __forceinline__ void put(int number, float value) const {
    call.numbers[number * call.rows + row] = value;
  }

  // Of a row that does not count; by the first threads.
  __device__ __forceinline__ void put_instead(int numbers) const {
    if (static_cast<int>(threadIdx.x) < numbers) put(threadIdx.x, instead());
  }

  // What all processes have merged, as the passes over the classes here take it.
  __device__ __forceinline__ float merged(Merged number) const {
    return call.merged[number * call.rows + row];
  }
  __device__ __forceinline__ Math merged_math() const {
    const RowNumbers& n = call.row_numbers;
    // Without a live class the lowest float; the quotient must stay finite.
    const auto stored = [](const LogitRule& rule, float top) {
      return top <= kLowest ? kLowest : top / rule.natural;
    };
    RowStats stats;
    stats.student_max = stored(n.student, merged(kMergedStudentTop));
    stats.student_sum = merged(kMergedStudentSum);
    if constexpr (Math::kTeacher) {
      stats.teacher_max = stored(n.teacher, merged(kMergedTeacherTop));
      stats.teacher_sum = merged(kMergedTeacherSum);
    }
    stats.hard_sum = merged(kMergedStudentSum1);
    stats.live = merged(kMergedLive);
    return Math(n, stats);
  }
};

template <typename scalar_t, Divergence kD>
__global__ void __launch_bounds__(kKdLossOnePassThreads, kShardBlocks)
    kd_shard_found_rows(const ShardCall<scalar_t> call) {
  using Math = RowMath<kD>;
  const RowNumbers& n = call.row_numbers;
  const ShardRow<scalar_t, kD> row(call, blockIdx.x);
  if (!row.counts()) return row.put_instead(kFoundNumbers);

  RowStats stats;
  row.each(false, [&](int, const auto& s, const auto& t) { Math::add(n, stats, s, t); });
  stats = reduce_row(stats, RowStats{}, ReduceSpace<RowStats>(dynamic_shared()), 0, 1,
                     [&](const RowStats& x) { return Math::across_warp(n, x); });
  if (threadIdx.x != 0) return;

  const auto top = [](const LogitRule& rule, float largest) {
    return largest <= kLowest ? -FLT_MAX : rule.natural * largest;
  };
  // From exponents of 2 at the temperature to logits.
  const float unit = kLn2 * n.temperature;
  row.put(kFoundStudentTop, top(n.student, stats.student_max));
  row.put(kFoundStudentSum, stats.student_sum);
  row.put(kFoundTeacherTop, Math::kTeacher ? top(n.teacher, stats.teacher_max) : 0.0f);
  row.put(kFoundTeacherSum, stats.teacher_sum);
  row.put(kFoundGap, (kD == Divergence::kSoftCe ? -unit : unit) * stats.cross);
  row.put(kFoundStudentSum1, n.heat == Heat::kSame ? stats.student_sum : stats.hard_sum);
  row.put(kFoundLive, stats.live);
  row.put(kFoundLogits, unit * stats.exponent_sum);
  float label[1] = {0.0f};
  if (n.want_ce && row.place >= 0) {
    label[0] = static_cast<float>(row.student.data[row.place]);
    to_z(n.student, label);
    label[0] *= n.student.natural;
  }
  row.put(kFoundLabel, label[0]);
}

// JSD and TVD. It begins with the row that the first step has left in the caches.
template <typename scalar_t, Divergence kD>
__global__ void __launch_bounds__(kKdLossOnePassThreads, kShardBlocks)
    kd_shard_middle_rows(const ShardCall<scalar_t> call) {
  using Math = RowMath<kD>;
  const RowNumbers& n = call.row_numbers;
  const ShardRow<scalar_t, kD> row(call, call.rows - 1 - blockIdx.x);
  if (!row.counts()) return row.put_instead(kMiddleNumbers);

  const Math math = row.merged_math();
  RowSums sums;
  row.each(true, [&](int, const auto& s, const auto& t) { math.add_middle(n, sums, s, t); });
  sums = reduce_row(sums, RowSums{}, ReduceSpace<RowSums>(dynamic_shared()), 0, 1,
                    [](const RowSums& x) { return Math::sums_across_warp(x); });
  if (threadIdx.x != 0) return;
  row.put(0, math.divergence(n, 0.0f, sums));
  row.put(1, kD == Divergence::kJsd ? kLn2 * sums.mean : sums.mean);
}

// May write over the student: a thread has read what lies where it writes.
template <typename scalar_t, Divergence kD>
__global__ void __launch_bounds__(kKdLossOnePassThreads, kShardBlocks)
    kd_shard_gradient_rows(const ShardCall<scalar_t> call) {
  using Math = RowMath<kD>;
  constexpr int kSize = kVectorSize<scalar_t>;
  constexpr bool kBackwards = !Math::kMiddle;  // from what the step before has left in the caches
  const RowNumbers& n = call.row_numbers;
  const ShardRow<scalar_t, kD> row(call, kBackwards ? call.rows - 1 - blockIdx.x : blockIdx.x);
  const RowView<scalar_t> grad(call.grad, row.row, row.walk.shift);
  if (!row.counts()) return fill_gradient(grad, row.walk, row.instead());

  Math math = row.merged_math();
  math.expectation = row.merged(kMergedMean);
  // These meet it in exponents of 2.
  if constexpr (kD == Divergence::kReverseKl || kD == Divergence::kJsd) math.expectation /= kLn2;
  const typename Math::Slope slopes = math.slopes(n, row.merged(kMergedWeight));
  const int labelled = row.place >= 0 ? static_cast<int>(row.place) : -kSize;
  row.each(kBackwards, [&](int first, const auto& s, const auto& t) {
    float g[kSize];
    math.gradient(n, slopes, s, t, g);
    finish_gradient(n, first, labelled, slopes.label, s, g);
    store_vector(grad, first, call.classes, g);
  });
}

}  // namespace kd
