// What the entry of the CPU kernel hands to the row functions.
#pragma once

#include <cstdint>

#include "hidden_match/hidden_match.h"

namespace kd {

// A layer of a call, resolved to raw memory. Strides in elements.
struct MatchLayer {
  const char* student;  // [rows, width]
  const char* teacher;
  char* grad;  // [rows, width], contiguous; or null: loss only
  int64_t student_stride, teacher_stride, width;
  float scale;   // of the gradient: the layer's weight over the denominator
  float* terms;  // [rows]: the unweighted distance of each row
};

struct MatchCall {
  MatchKind kind;
  float beta;
  const bool* mask;          // [rows], or null
  const float* row_weights;  // [rows], or null
  bool stream;               // store the gradient past the cache
};

using MatchRows = void (*)(const MatchCall&, const MatchLayer&, int64_t begin, int64_t end);

}  // namespace kd
