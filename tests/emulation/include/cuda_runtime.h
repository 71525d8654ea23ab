// The CUDA execution model on the CPU, for g++: enough to run the project's kernels unchanged.
//
// Model. Every thread of a block is a fiber with its own stack; all of them run on the calling
// operating-system thread, one at a time. The blocks of one cluster are alive together; clusters
// run one after the other. A fiber runs until it meets a barrier (of block or cluster), a warp
// shuffle or its end; then the scheduler picks another that may run. A program whose result
// depends on that choice lacks a barrier, so the choice is an adversary's: emulated_seed selects
// which block, warp and lane goes first, and how long it is favoured (one lane, warp or block as
// far as it gets before any other starts).
//
// What is checked beyond results:
// - dynamic shared memory starts out as NaN, also between launches: a read before the write shows;
// - asynchronous copies happen at the wait for them, not before (primitives.cuh);
// - a store to another block's shared memory fails unless that block has started and not ended;
// - lanes of a warp must meet at the same kind of operation with all lanes present;
// - no fiber can run and some have not ended: deadlock, an error with the place of each.
// What is not: memory ordering weaker than program order, timing, occupancy, alignment of plain
// vector loads (compile with -fsanitize=alignment), races that no order of fibers makes wrong.
//
// Only dynamic shared memory exists (the project's kernels use no other). Launches run to their
// end before cudaLaunchKernelEx returns; an error in a kernel is a C++ exception from there.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// ---- types --------------------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- the engine (emulation.cpp) -------------------------------------------------------------

namespace cuda_emulation {

enum class Meeting { kBlockBarrier, kClusterArrive, kClusterWait, kShuffle, kWarpBarrier };

// Waits for the others; for kShuffle gives back the value of the lane `source`.
uint32_t meet(Meeting kind, unsigned mask = 0, uint32_t value = 0, int source = 0);
// The shared memory of the fiber's block.
char* shared();
// That of another block of the cluster; fails unless that block is running.
char* shared_of(unsigned rank);
void check_aligned(const void* address, size_t bytes);
// Runs when the thread waits until at most `pending` groups of copies are unfinished.
void copy_later(void* to, const void* from, size_t bytes);
void close_copies();
void finish_copies(int pending);

void run(dim3 grid, dim3 block, unsigned cluster, size_t shared, const std::function<void()>& body);

}  // namespace cuda_emulation

// Of the fiber that runs.
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { cuda_emulation::meet(cuda_emulation::Meeting::kBlockBarrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulation::meet(cuda_emulation::Meeting::kWarpBarrier, mask);
}
inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return std::bit_cast<float>(cuda_emulation::meet(
      cuda_emulation::Meeting::kShuffle, mask, std::bit_cast<uint32_t>(value), lane ^ lane_mask));
}

// ---- arithmetic -----------------------------------------------------------------------------

// The rounded operations that a compiler must not contract into an fma.
inline float __fmul_rn(float a, float b) {
  float r = a * b;
  asm("" : "+m"(r));
  return r;
}
inline float __fadd_rn(float a, float b) {
  asm("" : "+m"(a), "+m"(b));
  return a + b;
}
inline float __fsub_rn(float a, float b) { return __fadd_rn(a, -b); }
inline float __fdividef(float a, float b) { return std::fabs(b) > 0x1p126f ? 0.0f * a : a / b; }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// ---- the run-time library -------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess             ? "no error"
         : status == cudaErrorInvalidValue ? "invalid argument"
                                           : "invalid configuration argument";
}
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  return bytes <= most ? cudaSuccess : cudaErrorInvalidValue;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const unsigned cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  const unsigned threads = config->blockDim.x;
  int major = 0, most = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  const bool valid = config->gridDim.x > 0 && config->gridDim.x % cluster == 0 && threads > 0 &&
                     threads <= 1024 && threads % 32 == 0 && cluster <= 8 &&
                     (cluster == 1 || major >= 9) &&
                     config->dynamicSmemBytes <= static_cast<size_t>(most);
  if (!valid) return cudaErrorInvalidConfiguration;
  cuda_emulation::run(config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes,
                      [&] { kernel(args...); });
  return cudaSuccess;
}
