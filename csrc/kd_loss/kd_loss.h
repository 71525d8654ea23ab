// What the CPU and the CUDA kernel of kd_loss share: the numbers of a call. No torch in here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kd {

// The teacher-student term D; numbers as in kdkernels/ops/kd_loss/spec.py.
enum class Divergence : int {
  kNone = 0,
  kForwardKl = 1,
  kSoftCe = 2,
  kReverseKl = 3,
  kJsd = 4,
  kTvd = 5,
  kSpike = 6,
  kNegEntropy = 7,
  // What the kernels make of a spec with a tail (topk_kd_loss): some classes are met one by one,
  // the others as one lot. With kListedEntropy their gradient takes more than their sum.
  kListed = 8,
  kListedEntropy = 9,
};

// What stands for the mass outside of a sparse teacher's list; numbers as in spec.py.
enum class Tail : int { kFull = 0, kBucket = 1, kRenorm = 2, kNone = 3, kUniform = 4 };

constexpr bool is_listed(Divergence d) {
  return d == Divergence::kListed || d == Divergence::kListedEntropy;
}

// The least tail mass of the teacher in reverse KL; as in topk_kd_loss/reference.py.
constexpr double kLeastTail = 1.0 / (1 << 24);

inline bool needs_teacher(Divergence d) {
  return Divergence::kForwardKl <= d && d <= Divergence::kTvd;
}

// See Spec in kdkernels/ops/kd_loss/spec.py for the meaning of each number.
struct KdLossSpec {
  Divergence divergence;
  double beta;
  double temperature;
  double ce_weight;
  double kd_weight;
  double label_smoothing;
  double z_loss;
  double student_scale;
  double teacher_scale;
  double student_softcap;
  double teacher_softcap;
  int64_t ignore_index;
  int64_t classes;  // never -1 here: resolved to the number of columns
  bool mean;
  bool want_ce;
  Tail tail;

  bool reverse() const { return divergence == Divergence::kReverseKl; }
  // The row kernel of a spec with a tail.
  Divergence listed() const {
    if (divergence == Divergence::kNone) return Divergence::kNone;
    return reverse() && tail == Tail::kUniform ? Divergence::kListedEntropy : Divergence::kListed;
  }
  bool needs_ce() const { return ce_weight != 0.0 || want_ce; }
  bool needs_labels() const { return needs_ce() || divergence == Divergence::kSpike; }
};

// The operators take the numbers of a call as one list, in the order of Spec's fields: a list costs
// 1.5 us less to pass than fifteen arguments (measured, torch 2.13).
constexpr size_t kSpecNumbers = 16;

inline KdLossSpec make_spec(const std::vector<double>& numbers, int64_t columns) {
  const int64_t classes = static_cast<int64_t>(numbers[12]);
  return {static_cast<Divergence>(static_cast<int>(numbers[0])),
          numbers[1],
          numbers[2],
          numbers[3],
          numbers[4],
          numbers[5],
          numbers[6],
          numbers[7],
          numbers[8],
          numbers[9],
          numbers[10],
          static_cast<int64_t>(numbers[11]),
          classes < 0 ? columns : classes,
          numbers[13] != 0.0,
          numbers[14] != 0.0,
          static_cast<Tail>(static_cast<int>(numbers[15]))};
}

// Where an operator's gradient goes.
enum class Gradient { kNone, kNew, kInPlace };

}  // namespace kd
