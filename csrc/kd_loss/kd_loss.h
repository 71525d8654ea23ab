// What the CPU and the CUDA kernel of kd_loss share: the numbers of a call. No torch in here.
#pragma once

#include <cstdint>

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

}  // namespace kd
