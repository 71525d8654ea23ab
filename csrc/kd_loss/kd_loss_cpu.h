// What the entry of the CPU kernel hands to the row functions.
#pragma once

#include <cstdint>

#include "common/logits_cpu.h"
#include "kd_loss/kd_loss.h"

namespace kd {

// A call, resolved to raw memory. Strides in elements.
struct KdLossCall {
  KdLossSpec spec;
  int64_t columns;  // of student and gradient; those from spec.classes on get gradient 0
  Dtype student_dtype, teacher_dtype;
  const char* student;  // [rows, columns]
  const char* teacher;  // [rows, >= classes], or null
  char* grad;           // [rows, columns], or null: loss only
  int64_t student_stride, teacher_stride, grad_stride;
  const int64_t* topk_ids;  // [rows, topk], of a sparse teacher
  const float* topk_logprobs;
  int64_t topk;
  const int64_t* labels;     // [rows], or null
  const float* row_weights;  // [rows], or null
  double scale;              // 1 / denominator
  bool stream;               // store the gradient past the cache
};

// Unweighted terms of one row.
struct RowTerms {
  double ce, divergence, lse_squared;
};

// Floats of scratch a row needs: three values a class, and the reference of each block.
inline int64_t scratch_floats(int64_t classes) { return blocks_of(classes) * (3 * kBlock + 2); }

}  // namespace kd
