// The functions of csrc/common/primitives.cuh for the host emulation of CUDA.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common/dispatch.h"

namespace kd {

// Like the GPU: subnormal results and arguments count as 0.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float log2_approx(float x) { return std::log2(std::fabs(x) < 0x1p-126f ? 0.0f * x : x); }

template <typename scalar_t>
float2 unpack_pair(uint32_t word) {
  scalar_t pair[2];
  std::memcpy(pair, &word, sizeof word);
  return {static_cast<float>(pair[0]), static_cast<float>(pair[1])};
}
template <typename scalar_t>
uint32_t pack_pair(float low, float high) {
  const scalar_t pair[2] = {static_cast<scalar_t>(low), static_cast<scalar_t>(high)};
  uint32_t word;
  std::memcpy(&word, pair, sizeof word);
  return word;
}

inline uint4 load_16(const void* global) {
  cuda_emulation::check_aligned(global, sizeof(uint4));
  return *static_cast<const uint4*>(global);
}

inline void store_16(void* global, uint4 value) {
  cuda_emulation::check_aligned(global, sizeof value);
  *static_cast<uint4*>(global) = value;
}

inline char* dynamic_shared() { return cuda_emulation::shared(); }

inline void copy_async_16(void* shared, const void* global) {
  cuda_emulation::copy_later(shared, global, 16);
}
inline void copy_async_commit() { cuda_emulation::close_copies(); }
template <int kPending>
void copy_async_wait() {
  cuda_emulation::finish_copies(kPending);
}

inline void cluster_arrive(KD_HERE) {
  cuda_emulation::meet(cuda_emulation::Meeting::kClusterArrive, line);
}
inline void cluster_arrive_relaxed(KD_HERE) { cluster_arrive(line); }
inline void cluster_wait(KD_HERE) {
  cuda_emulation::meet(cuda_emulation::Meeting::kClusterWait, line);
}
inline void store_to_block(float4* to, uint32_t block, float4 value) {
  const ptrdiff_t offset = reinterpret_cast<char*>(to) - dynamic_shared();
  *reinterpret_cast<float4*>(cuda_emulation::shared_of(block) + offset) = value;
}

}  // namespace kd
