// What the entry of the CPU kernel hands to the row functions.
#pragma once

#include <cstdint>

#include "gate_scores/gate_scores.h"

namespace kd {

// Rows that are one piece of work; of a shape alone, so that the number of threads changes no bit.
constexpr int64_t kGateRows = 128;
// Columns that are summed up at a time: their sums stay in the first-level cache.
constexpr int64_t kGateColumns = 1024;

// A call, resolved to raw memory. Strides in elements.
struct GateCall {
  GateSizes sizes;
  const char* activation;
  int64_t activation_stride;
  const char* grads[kMostGateGrads];
  int64_t grad_strides[kMostGateGrads];
  const bool* mask;  // [rows], or null
};

// Up to kGateRows rows of some whole groups.
struct GatePiece {
  int64_t row, rows;
  int64_t column, columns;  // one group, or several of at most kGateColumns columns together
  // Whole examples, whose absolute sums are added up; else a part of one, summed up with its sign.
  bool whole;
};

// Writes a value a group, `stride` apart for each gradient: float, double for double.
using GateFunction = void (*)(const GateCall&, const GatePiece&, void* out, int64_t stride);

}  // namespace kd
