// What the CPU and the CUDA kernels of kd_shard share. No torch in here.
#pragma once

#include "kd_loss/kd_loss.h"

namespace kd {

// Where the label of a row is among the classes here; as in kdkernels/ops/kd_shard/spec.py.
constexpr int64_t kElsewhere = -1;
constexpr int64_t kIgnored = -2;  // ignore_index of the spec

// The rows of what is found of the classes here, and of what all processes have merged; see
// spec.py.
enum Found : int {
  kFoundStudentTop,
  kFoundStudentSum,
  kFoundTeacherTop,
  kFoundTeacherSum,
  kFoundGap,
  kFoundStudentSum1,
  kFoundLive,
  kFoundLogits,
  kFoundLabel,
  kFoundNumbers
};

enum Merged : int {
  kMergedStudentTop,
  kMergedStudentSum,
  kMergedTeacherTop,
  kMergedTeacherSum,
  kMergedMean,
  kMergedStudentSum1,
  kMergedLive,
  kMergedWeight,
  kMergedNumbers
};

constexpr int kMiddleNumbers = 2;

enum class ShardStep { kFound, kMiddle, kGradient };

}  // namespace kd
