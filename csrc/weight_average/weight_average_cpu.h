// What the entry of the CPU kernel hands to the functions compiled per instruction set.
#pragma once

#include <cstdint>

namespace kd {

// Some elements of one tensor of each list, from their first byte on.
struct AveragePiece {
  char* average;
  const char* param;
  char* compensation;  // or null
  char* copy;          // or null
  int64_t count;
};

using AverageFunction = void (*)(const AveragePiece&, float weight);
using SwapFunction = void (*)(char* average, char* param, int64_t count, bool back);

}  // namespace kd
