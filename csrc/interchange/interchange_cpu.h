// What the entries of the CPU kernels take from an instruction set.
#pragma once

#include <cstdint>

namespace kd {

// The functions of a dtype; rows as bytes, counts in elements.
struct SwapRows {
  int64_t element_bytes;
  void (*move)(char* to, const char* from, int64_t bytes, bool stream);  // from: null for zeros
  void (*fence)();                                                       // after streaming
  void (*add)(char* out, const char* a, const char* b, int64_t count, float sign);
  void (*sum)(char* out, const char* const* rows, int64_t n, int64_t count, float sign);
};

inline void add_doubles(char* out, const char* a, const char* b, int64_t count, float sign) {
  double* to = reinterpret_cast<double*>(out);
  const double *x = reinterpret_cast<const double*>(a), *y = reinterpret_cast<const double*>(b);
  for (int64_t i = 0; i < count; ++i) to[i] = x[i] + sign * y[i];
}

inline void sum_doubles(char* out, const char* const* rows, int64_t n, int64_t count, float sign) {
  double* to = reinterpret_cast<double*>(out);
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0.0;
    for (int64_t r = 0; r < n; ++r) sum += reinterpret_cast<const double*>(rows[r])[i];
    to[i] = sign * sum;
  }
}

}  // namespace kd
