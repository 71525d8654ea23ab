// Sixteen bytes of a row: the unit in which kernels move memory.
#pragma once

#include "common/primitives.cuh"

namespace kd {

constexpr int kVectorBytes = 16;

template <typename scalar_t>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(scalar_t));

template <typename scalar_t>
__device__ __forceinline__ void unpack(uint4 raw, float (&x)[kVectorSize<scalar_t>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(scalar_t) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack_pair<scalar_t>(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

template <typename scalar_t>
__device__ __forceinline__ uint4 pack(const float (&x)[kVectorSize<scalar_t>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(scalar_t) == 4) {
      words[i] = __float_as_uint(x[i]);
    } else {
      words[i] = pack_pair<scalar_t>(x[2 * i], x[2 * i + 1]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Elements that lie between the 16-byte boundary at or before p and p.
template <typename scalar_t>
__host__ __device__ __forceinline__ int misalignment(const scalar_t* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % kVectorBytes / sizeof(scalar_t));
}

}  // namespace kd
