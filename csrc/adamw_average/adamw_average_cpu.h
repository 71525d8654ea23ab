// What the entry of the CPU kernel hands to the functions compiled per instruction set.
#pragma once

#include <cstdint>

namespace kd {

// Some elements of one tensor of each list, from the first on.
struct AdamwPiece {
  char* param;
  const char* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* average;  // or null
  float* master;   // or null
  int64_t count;
};

// What is the same for all elements of a tensor.
struct AdamwNumbers {
  float factor;  // of the gradient, with its sign
  float decay;   // lr * weight_decay
  float beta1_rest, beta2, beta2_rest;
  float step_size;   // lr / (1 - beta1^t)
  float root_scale;  // 1 / sqrt(1 - beta2^t)
  float eps, weight;
};

using AdamwFunction = void (*)(const AdamwPiece&, const AdamwNumbers&);

}  // namespace kd
