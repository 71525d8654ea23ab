// The CUDA execution model on the CPU, for g++: enough to run the project's kernels unchanged.
//
// Model. Every thread of a block is a fiber with its own stack; all of them run on the calling
// operating-system thread, one at a time. The blocks of one cluster are alive together; clusters
// run one after the other. A fiber runs until it meets a barrier (of block or cluster), a warp
// operation or its end; then the scheduler picks another that may run. A program whose result
// depends on that choice lacks a barrier, so the choice is an adversary's: the seed of
// emulated_device selects which block, warp and lane goes first, how long it is favoured (one lane,
// warp or block as far as it gets before any other starts), and when asynchronous copies happen (at
// the wait for them, at once, or in between).
//
// What is checked beyond results, each with kernel, block and thread in the error:
// - shared memory starts out as NaN, also between launches, and reading a byte that the block has
//   not written is an error;
// - loads and stores stay inside shared memory and the tensors whose address the call has asked
//   for, do not write to tensors asked for as const, and are aligned to their size;
// - a barrier is reached by all threads of the block, at one line of the source;
// - lanes of a warp meet at the same operation with the same mask; a shuffle reads from a lane that
//   takes part;
// - a store to another block's shared memory fails unless that block has started and not ended;
// - a thread waits for its asynchronous copies before it ends;
// - no fiber can run and some have not ended: deadlock, with the place of the first.
// What is not: memory ordering weaker than program order, races between blocks through global
// memory, timing, occupancy, tensor-core instructions, races that no order of fibers makes wrong.
//
// Dynamic shared memory comes from dynamic_shared(); static (__shared__) works too, but only its
// contents are guarded (NaN at the start), and only in functions with internal linkage. Launches
// run to their end before cudaLaunchKernelEx returns; an error in a kernel is a C++ exception from
// there.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section("kd_static_shared")))

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

enum class Meeting { kBlockBarrier, kClusterArrive, kClusterWait, kShuffle, kVote, kWarpBarrier };

// A line of the source: that of the caller, as the default of a parameter.
struct Place {
  const char* file = "";
  unsigned line = 0;
  static constexpr Place here(std::source_location at = std::source_location::current()) {
    return {at.file_name(), at.line()};
  }
  bool operator==(const Place&) const = default;
};

// Waits for the others. Gives back: for kShuffle the value of the lane `source`, for kVote a bit
// for each lane whose value is not 0, for kBlockBarrier the number of such threads.
uint32_t meet(Meeting kind, Place line, unsigned mask = 0, uint32_t value = 0, int source = 0);
// The shared memory of the fiber's block.
char* shared();
// That of another block of the cluster; fails unless that block is running.
char* shared_of(unsigned rank);
void check_aligned(const void* address, size_t bytes);
// At the latest done when the thread waits until at most `pending` groups of copies are unfinished.
void copy_later(void* to, const void* from, size_t bytes);
void close_copies();
void finish_copies(int pending);
// Global memory that kernels may touch from now on, and an end to all of that.
void allow(const void* begin, size_t bytes, bool writable);
void forget_memory();

// Runs call(parameters) in every thread; the name of `kernel` is that of errors.
void run(const void* kernel, dim3 grid, dim3 block, unsigned cluster, size_t shared,
         void (*call)(const void* parameters), const void* parameters);

// 32-bit words of a value, each sent by a shuffle of its own.
template <typename T>
T shuffle(Place line, unsigned mask, T value, int source) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  __builtin_memcpy(words, &value, sizeof(T));
  for (uint32_t& word : words) word = meet(Meeting::kShuffle, line, mask, word, source);
  __builtin_memcpy(&value, words, sizeof(T));
  return value;
}

}  // namespace cuda_emulation

// Of the fiber that runs.
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

#define KD_HERE cuda_emulation::Place line = cuda_emulation::Place::here()

inline int __syncthreads_count(int value, KD_HERE) {
  return cuda_emulation::meet(cuda_emulation::Meeting::kBlockBarrier, line, 0, value != 0);
}
inline void __syncthreads(KD_HERE) { __syncthreads_count(0, line); }
inline int __syncthreads_or(int value, KD_HERE) { return __syncthreads_count(value, line) != 0; }
inline int __syncthreads_and(int value, KD_HERE) { return __syncthreads_count(!value, line) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu, KD_HERE) {
  cuda_emulation::meet(cuda_emulation::Meeting::kWarpBarrier, line, mask);
}
inline unsigned __ballot_sync(unsigned mask, int value, KD_HERE) {
  return cuda_emulation::meet(cuda_emulation::Meeting::kVote, line, mask, value != 0);
}
inline int __any_sync(unsigned mask, int value, KD_HERE) {
  return __ballot_sync(mask, value, line) != 0;
}
inline int __all_sync(unsigned mask, int value, KD_HERE) {
  return __ballot_sync(mask, !value, line) == 0;
}

namespace cuda_emulation {

inline int lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}
// The lane at `target` inside the caller's group of `width` lanes; the caller itself outside of it.
inline int source_lane(int target, int width) {
  return target / width == lane() / width && target >= 0 ? target : lane();
}

}  // namespace cuda_emulation

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, KD_HERE) {
  using namespace cuda_emulation;
  return shuffle(line, mask, value, source_lane(lane() ^ lanes, width));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize, KD_HERE) {
  using namespace cuda_emulation;
  return shuffle(line, mask, value, source_lane(lane() + static_cast<int>(by), width));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize, KD_HERE) {
  using namespace cuda_emulation;
  return shuffle(line, mask, value, source_lane(lane() - static_cast<int>(by), width));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize, KD_HERE) {
  using namespace cuda_emulation;
  return shuffle(line, mask, value, lane() / width * width + from % width);
}

// One fiber runs at a time: plain operations are atomic.
template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <typename T>
T atomicMax(T* at, T value) {
  const T old = *at;
  *at = old > value ? old : value;
  return old;
}
template <typename T>
T atomicMin(T* at, T value) {
  const T old = *at;
  *at = old < value ? old : value;
  return old;
}
template <typename T>
T atomicOr(T* at, T value) {
  const T old = *at;
  *at = old | value;
  return old;
}
template <typename T>
T atomicExch(T* at, T value) {
  const T old = *at;
  *at = value;
  return old;
}
template <typename T>
T atomicCAS(T* at, T compare, T value) {
  const T old = *at;
  if (old == compare) *at = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Loads and stores with a hint for the caches.
template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcs(const T* at) {
  return *at;
}
template <typename T>
void __stcs(T* at, T value) {
  *at = value;
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
inline int __ffs(int x) { return __builtin_ffs(x); }
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
  const dim3 block = config->blockDim, grid = config->gridDim;
  const unsigned threads = block.x * block.y * block.z;
  int major = 0, most = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  const bool valid = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x % cluster == 0 &&
                     threads > 0 && threads <= 1024 && cluster <= 8 &&
                     (cluster == 1 || major >= 9) &&
                     config->dynamicSmemBytes <= static_cast<size_t>(most);
  if (!valid) return cudaErrorInvalidConfiguration;
  using Call = std::pair<decltype(kernel), std::tuple<std::decay_t<Params>...>>;
  const Call call{kernel, {args...}};
  cuda_emulation::allow(&call, sizeof call, false);
  const auto in_thread = [](const void* parameters) {
    const Call& call = *static_cast<const Call*>(parameters);
    std::apply(call.first, call.second);
  };
  cuda_emulation::run(reinterpret_cast<const void*>(kernel), grid, block, cluster,
                      config->dynamicSmemBytes, in_thread, &call);
  return cudaSuccess;
}
