// Reductions over the threads of a block and the blocks of a cluster, always in the same order:
// the same input gives the same bits.
#pragma once

#include "common/primitives.cuh"

namespace kd {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kFullWarp, x, mask);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, mask));
  }
  return x;
}

// Shared memory of one reduction of values of type Value (a multiple of 16 bytes): one for each
// warp of the block and one for each block of the cluster.
template <typename Value>
struct ReduceSpace {
  Value* warps;
  Value* ranks;

  __device__ __forceinline__ explicit ReduceSpace(char* begin)
      : warps(reinterpret_cast<Value*>(begin)), ranks(warps + blockDim.x / kWarpSize) {}
};

// Combines `value` over all threads of all `ranks` blocks that share a row; everyone gets the
// result. `across_warp(value)` combines over a warp and leaves the result in every lane;
// `neutral` changes nothing. The space serves one reduction only. With ranks > 1 the caller has
// passed a cluster barrier since the kernel began: every block has started, none has ended.
template <typename Value, typename AcrossWarp>
__device__ __forceinline__ Value reduce_row(Value value, Value neutral,
                                            const ReduceSpace<Value>& space, int rank, int ranks,
                                            const AcrossWarp& across_warp) {
  static_assert(sizeof(Value) % sizeof(float4) == 0);
  const int warps = blockDim.x / kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  value = across_warp(value);
  if (warps > 1) {
    if (lane == 0) space.warps[warp] = value;
    __syncthreads();
    // Every warp combines for itself where that is the end of it.
    if (warp == 0 || ranks == 1) {
      value = across_warp(lane < warps ? space.warps[lane] : neutral);
    }
  } else {
    __syncwarp();  // a barrier for the memory of the row too, as above
  }
  if (ranks == 1) return value;
  if (warp == 0 && lane < ranks) {
    const float4* from = reinterpret_cast<const float4*>(&value);
    float4* to = reinterpret_cast<float4*>(&space.ranks[rank]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Value) / sizeof(float4)); ++i) {
      store_to_block(to + i, lane, from[i]);
    }
  }
  // Only the first warp has sent anything.
  if (warp == 0) {
    cluster_arrive();
  } else {
    cluster_arrive_relaxed();
  }
  cluster_wait();
  return across_warp(lane < ranks ? space.ranks[lane] : neutral);
}

}  // namespace kd
