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
};

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

  bool needs_ce() const { return ce_weight != 0.0 || want_ce; }
  bool needs_labels() const { return needs_ce() || divergence == Divergence::kSpike; }
};

// The operators take the numbers of a call as one list, in the order of Spec's fields: a list costs
// 1.5 us less to pass than fifteen arguments (measured, torch 2.13).
constexpr size_t kSpecNumbers = 15;

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
          numbers[14] != 0.0};
}

}  // namespace kd
