// What the entry of the CPU kernel hands to the row functions.
#pragma once

#include <cstdint>

#include "domain_prototypes/domain_prototypes.h"

namespace kd {

// Positions that are one piece of work; of a shape alone, so that the number of threads changes no
// bit.
constexpr int64_t kPrototypeRows = 128;
// Columns that are summed up at a time: their sums stay in the first-level cache.
constexpr int64_t kPrototypeColumns = 1024;

// A call, resolved to raw memory. Strides in elements.
struct PrototypeCall {
  PrototypeSizes sizes;
  const char* hidden;
  int64_t example_stride, row_stride;
  const bool* mask;  // [batch, seq], or null
};

// Up to kPrototypeRows positions and kPrototypeColumns columns of an example.
struct PrototypePiece {
  int64_t example;
  int64_t row, rows;
  int64_t column, columns;
};

// Writes the sums of the columns over the positions that count: float, double for double.
using PrototypeFunction = void (*)(const PrototypeCall&, const PrototypePiece&, void* out);

}  // namespace kd
