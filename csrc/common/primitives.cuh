// The device primitives that are no plain CUDA C++: every line of PTX of the project is in here.
//
// tests/emulation/include/common/primitives.cuh defines the same functions for the host emulation,
// which finds it first on its include path; kernels are written against this list.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dispatch.h"

namespace kd {

// ---- arithmetic -------------------------------------------------------------------------------

// 2^x, 2 ulp; exactly 1 at 0, exactly 0 at -inf; subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) for normal x, error 2^-22 (absolute in [0.5, 2], else relative); exactly 0 at 1.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The two 16-bit floats of a word, low half first, and back (to nearest even).
template <typename scalar_t>
__device__ __forceinline__ float2 unpack_pair(uint32_t word);
template <typename scalar_t>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);

template <>
__device__ __forceinline__ float2 unpack_pair<bf16_t>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack_pair<half_t>(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <>
__device__ __forceinline__ uint32_t pack_pair<bf16_t>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<half_t>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// ---- memory ----------------------------------------------------------------------------

// Stores 16 bytes to an aligned address in global memory. (The compiler splits a plain store of a
// uint4 that it could take apart.)
__device__ __forceinline__ void store_16(void* global, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

// Loads 16 bytes from an aligned address in global memory. (The compiler splits the plain load of a
// uint4 by an address that was itself loaded.)
__device__ __forceinline__ uint4 load_16(const void* global) {
  uint4 value;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global)
               : "memory");
  return value;
}

// All shared memory of the project's kernels is the dynamic one, aligned to 16 bytes.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(16) char kd_dynamic_shared[];
  return kd_dynamic_shared;
}

// Starts copying 16 bytes, both addresses aligned; only the calling thread may read them, and only
// after its copy_async_wait (other threads: after a barrier behind that).
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// Closes a group of the copies started so far.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's newest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- clusters: sm_90 and later, no plan asks for one elsewhere ----------------------------------

// Barrier of all threads of the cluster, in two halves. What a thread wrote before cluster_arrive
// is visible to all after cluster_wait; what it wrote before cluster_arrive_relaxed need not be,
// which saves a fence over all of its memory.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  __trap();
#endif
}
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#else
  __trap();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// Stores value at the place of `to` in the shared memory of another block of the cluster, which
// must have started and must not have ended.
__device__ __forceinline__ void store_to_block(float4* to, uint32_t block, float4 value) {
#if __CUDA_ARCH__ >= 900
  const uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(block));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
#else
  __trap();
#endif
}

}  // namespace kd
