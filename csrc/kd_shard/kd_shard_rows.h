// The rows of kd_shard: the passes of a row of kd_loss, each begun with what other processes have
// found. Compiled once per instruction set by common/for_each_isa.h.

#include "kd_loss/kd_loss_row.h"

namespace kd::KD_ISA {

template <Divergence D, Softmax M>
class ShardRow : Row<D, M> {
 public:
  ShardRow(const KdShardCall& shard, float* scratch)
      : Row<D, M>(shard.loss, scratch), shard_(shard) {}

  void found(int64_t row) {
    this->open(row);
    this->template read<false>();
    const Sums& sums = this->sums_;
    float* out = shard_.numbers + row;
    const auto put = [&](Found number, double value) {
      out[number * shard_.rows] = static_cast<float>(value);
    };
    put(kFoundStudentTop, sums.student_ref);
    put(kFoundStudentSum, sums.student);
    put(kFoundTeacherTop, sums.teacher_ref);
    put(kFoundTeacherSum, sums.teacher);
    // Of the others what it holds is of no use.
    constexpr bool kGap =
        D == Divergence::kForwardKl || D == Divergence::kSoftCe || D == Divergence::kReverseKl;
    put(kFoundGap, kGap ? sums.cross : 0.0);
    put(kFoundStudentSum1, sums.student_ce);
    put(kFoundLive, static_cast<double>(sums.live));
    put(kFoundLogits, sums.logits);
    put(kFoundLabel, this->label_ < 0 ? 0.0 : this->label_logit() + sums.student_ref);
  }

  void middle(int64_t row) {
    this->open(row);
    this->template read<true>();
    merge(row);
    float* out = shard_.numbers + row;
    out[0] = static_cast<float>(Row<D, M>::middle());
    out[shard_.rows] = static_cast<float>(this->mean_);
  }

  void gradient(int64_t row) {
    this->open(row);
    this->template read<true>();
    merge(row);
    if constexpr (D == Divergence::kJsd) Row<D, M>::middle();  // leaves log ratios in scratch
    this->mean_ = merged(row, kMergedMean);
    this->write(row, merged(row, kMergedWeight));
  }

 private:
  double merged(int64_t row, Merged number) const {
    return shard_.merged[number * shard_.rows + row];
  }

  // Makes the sums those of all classes. What is kept of a block is relative to the largest logit
  // here until then, which the pass over scratch allows for.
  void merge(int64_t row) {
    Sums& sums = this->sums_;
    sums.student_ref = merged(row, kMergedStudentTop);
    sums.student = merged(row, kMergedStudentSum);
    sums.student_ce = merged(row, kMergedStudentSum1);
    sums.teacher_ref = merged(row, kMergedTeacherTop);
    sums.teacher = merged(row, kMergedTeacherSum);
    sums.cross = merged(row, kMergedMean) / this->inv_t_ * sums.student;
    sums.live = static_cast<int64_t>(merged(row, kMergedLive));
    this->lse_ = sums.student_ref + std::log(sums.student_ce);
  }

  const KdShardCall& shard_;
};

template <ShardStep S, Divergence D, Softmax M>
static void shard_rows(const KdShardCall& call, int64_t begin, int64_t end, float* scratch) {
  ShardRow<D, M> job(call, scratch);
  const KdLossCall& loss = call.loss;
  constexpr int kNumbers = S == ShardStep::kFound ? kFoundNumbers : kMiddleNumbers;
  for (int64_t row = begin; row < end; ++row) {
    if (loss.labels != nullptr && loss.labels[row] == kIgnored) {
      if constexpr (S == ShardStep::kGradient) {
        const int64_t bytes = bytes_of(loss.student_dtype);
        std::memset(loss.grad + row * loss.grad_stride * bytes, 0, loss.columns * bytes);
      } else {
        for (int number = 0; number < kNumbers; ++number)
          call.numbers[number * call.rows + row] = 0;
      }
      continue;
    }
    if constexpr (S == ShardStep::kFound) job.found(row);
    if constexpr (S == ShardStep::kMiddle) job.middle(row);
    if constexpr (S == ShardStep::kGradient) job.gradient(row);
  }
  if (loss.stream) stream_fence();
}

template <ShardStep S, Divergence D>
static void shard_softmax(const KdShardCall& call, int64_t begin, int64_t end, float* scratch) {
  if constexpr (S != ShardStep::kMiddle) {
    switch (softmax_of<D>(call.loss.spec)) {
      case Softmax::kSquare:
        return shard_rows<S, D, Softmax::kSquare>(call, begin, end, scratch);
      case Softmax::kSeparate:
        return shard_rows<S, D, Softmax::kSeparate>(call, begin, end, scratch);
      case Softmax::kShared:
        break;
    }
  }
  return shard_rows<S, D, Softmax::kShared>(call, begin, end, scratch);
}

template <ShardStep S>
static void shard_divergence(const KdShardCall& call, int64_t begin, int64_t end, float* scratch) {
  switch (call.loss.spec.divergence) {
    case Divergence::kJsd:
      return shard_softmax<S, Divergence::kJsd>(call, begin, end, scratch);
    case Divergence::kTvd:
      return shard_softmax<S, Divergence::kTvd>(call, begin, end, scratch);
    default:
      break;
  }
  if constexpr (S != ShardStep::kMiddle) {
    switch (call.loss.spec.divergence) {
      case Divergence::kForwardKl:
        return shard_softmax<S, Divergence::kForwardKl>(call, begin, end, scratch);
      case Divergence::kSoftCe:
        return shard_softmax<S, Divergence::kSoftCe>(call, begin, end, scratch);
      case Divergence::kReverseKl:
        return shard_softmax<S, Divergence::kReverseKl>(call, begin, end, scratch);
      default:
        return shard_softmax<S, Divergence::kNone>(call, begin, end, scratch);
    }
  }
}

// Rows [begin, end) of a step; `scratch` holds scratch_floats(classes), 64-byte aligned.
void kd_shard_rows(const KdShardCall& call, ShardStep step, int64_t begin, int64_t end,
                   float* scratch) {
  switch (step) {
    case ShardStep::kFound:
      return shard_divergence<ShardStep::kFound>(call, begin, end, scratch);
    case ShardStep::kMiddle:
      return shard_divergence<ShardStep::kMiddle>(call, begin, end, scratch);
    case ShardStep::kGradient:
      return shard_divergence<ShardStep::kGradient>(call, begin, end, scratch);
  }
}

}  // namespace kd::KD_ISA
