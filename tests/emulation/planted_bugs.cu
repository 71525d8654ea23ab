// Kernels with one bug each, and sound ones that use all that the emulation offers: see
// test_planted_bugs.py, which names what must be reported. Never part of the package.

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/primitives.cuh"

using namespace kd;

namespace {

constexpr unsigned kAll = 0xffffffffu;

// ---- bugs: each is launched with two blocks of 64 threads on 128 floats -------------------------

__global__ void barrier_in_a_branch(const float* in, float* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void barriers_in_both_branches(const float* in, float* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void barrier_after_an_early_return(const float* in, float* out) {
  if (threadIdx.x == 63) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void shuffle_from_an_absent_lane(const float* in, float* out) {
  float x = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) x += __shfl_down_sync(0x0000ffffu, x, 8);
  out[threadIdx.x] = x;
}

__global__ void shuffle_in_a_branch(const float* in, float* out) {
  float x = in[threadIdx.x];
  if (threadIdx.x % 32 != 5) x += __shfl_xor_sync(kAll, x, 1);
  out[threadIdx.x] = x;
}

__global__ void mask_without_the_caller(const float* in, float* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, in[threadIdx.x], 0);
}

__global__ void different_warp_operations(const float* in, float* out) {
  float x = in[threadIdx.x];
  if (threadIdx.x % 2 == 0) {
    x = __shfl_sync(kAll, x, 0);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = x;
}

__global__ void unwritten_shared(const float* in, float* out) {
  float* row = reinterpret_cast<float*>(dynamic_shared());
  if (threadIdx.x != 40) row[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = row[63 - threadIdx.x];
}

__global__ void write_behind_shared(const float* in, float* out) {
  float* row = reinterpret_cast<float*>(dynamic_shared());
  row[threadIdx.x + 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x + 1];
}

__global__ void read_behind_global(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = in[i] + in[i + 1];
}

__global__ void write_before_global(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i - 1] = in[i];
}

__global__ void misaligned_vector(const float* in, float* out) {
  float4* row = reinterpret_cast<float4*>(dynamic_shared());
  if (threadIdx.x < 16) row[threadIdx.x] = *reinterpret_cast<const float4*>(in + threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x / 4].x;
}

__global__ void read_before_the_copy(const float* in, float* out) {
  float* row = reinterpret_cast<float*>(dynamic_shared());
  if (threadIdx.x < 16) copy_async_16(row + 4 * threadIdx.x, in + 4 * threadIdx.x);
  copy_async_commit();
  if (threadIdx.x == 3) out[0] = row[12];
  copy_async_wait<0>();
}

__global__ void copy_without_a_wait(const float* in, float* out) {
  float* row = reinterpret_cast<float*>(dynamic_shared());
  if (threadIdx.x == 7) copy_async_16(row, in);
  out[threadIdx.x] = in[threadIdx.x];
}

// Two blocks are one cluster.
__global__ void store_to_an_ended_block(const float* in, float* out) {
  if (blockIdx.x == 1) return;
  if (threadIdx.x == 0) {
    store_to_block(reinterpret_cast<float4*>(dynamic_shared()), 1, make_float4(1, 2, 3, 4));
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void cluster_barrier_of_one_block(const float* in, float* out) {
  if (blockIdx.x == 1) {
    cluster_arrive();
    cluster_wait();
    cluster_arrive();
    cluster_wait();
  } else {
    cluster_arrive();
    cluster_wait();
    __syncthreads();
    if (threadIdx.x != 0) __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void write_to_an_input(const float* in, float* out) {
  const_cast<float*>(in)[threadIdx.x] = 0.0f;
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void missing_barrier(const float* in, float* out) {
  float* row = reinterpret_cast<float*>(dynamic_shared());
  row[threadIdx.x] = 0.0f;
  __syncthreads();
  row[threadIdx.x] = in[threadIdx.x];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = row[63 - threadIdx.x];
}

// ---- sound kernels ------------------------------------------------------------------------------

__global__ void sum_in_static_shared(const float* in, float* out) {
  __shared__ float row[64];
  __shared__ float total[1];
  row[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  for (int width = 32; width > 0; width /= 2) {
    if (threadIdx.x < width) row[threadIdx.x] += row[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) total[0] = row[0];
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = total[0];
}

__global__ void votes_and_shuffles(const float* in, float* out) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane % 2 == 1;
  float x = static_cast<float>(lane);
  bool right = __ballot_sync(kAll, odd) == 0xaaaaaaaau;
  right &= __any_sync(kAll, lane == 9) && !__any_sync(kAll, lane > 31);
  right &= __all_sync(kAll, lane >= 0) && !__all_sync(kAll, odd);
  right &= __shfl_sync(kAll, x, 3) == 3.0f;
  right &= __shfl_up_sync(kAll, x, 1) == (lane == 0 ? 0.0f : x - 1);
  right &= __shfl_down_sync(kAll, x, 4, 8) == (lane % 8 < 4 ? x + 4 : x);
  right &= __shfl_xor_sync(kAll, static_cast<double>(x) + 0.25, 16) == (lane ^ 16) + 0.25;
  if (lane < 8) right &= __shfl_xor_sync(0xffu, x, 7) == 7 - x;
  __syncwarp();
  right &= __syncthreads_count(odd) == 32 && __syncthreads_or(threadIdx.x == 7) &&
           !__syncthreads_and(threadIdx.x == 7) && __syncthreads_and(1);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = right ? in[i] : -1.0f;
}

__global__ void atomics(const float* in, float* out) {
  float* cells = reinterpret_cast<float*>(dynamic_shared());
  int* most = reinterpret_cast<int*>(cells + 1);
  if (threadIdx.x == 0) {
    cells[0] = 0.0f;
    *most = -1;
  }
  __syncthreads();
  atomicAdd(cells, 1.0f);
  atomicMax(most, static_cast<int>(threadIdx.x));
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = cells[0] == 64.0f && *most == 63 ? __ldg(in + i) : -1.0f;
}

// Launched as blocks (4, 4, 4) in a grid (1, 2, 1).
__global__ void three_dimensions(const float* in, float* out) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int i = thread + 64 * (blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  out[i] = __shfl_xor_sync(kAll, __shfl_xor_sync(kAll, in[i], 5), 5);
}

// Each block of the cluster sends its row to the other.
__global__ void exchange_in_a_cluster(const float* in, float* out) {
  float4* row = reinterpret_cast<float4*>(dynamic_shared());
  const int rank = blockIdx.x % 2;
  cluster_arrive_relaxed();
  cluster_wait();
  if (threadIdx.x < 16) {
    store_to_block(row + threadIdx.x, rank ^ 1,
                   reinterpret_cast<const float4*>(in + 64 * rank)[threadIdx.x]);
  }
  cluster_arrive();
  cluster_wait();
  out[64 * rank + threadIdx.x] = reinterpret_cast<float*>(row)[threadIdx.x];
}

// ---- host ---------------------------------------------------------------------------------------

struct Planted {
  void (*kernel)(const float*, float*);
  unsigned cluster = 1;
  dim3 grid = {2}, block = {64};
};

#define KD_PLANTED(kernel, ...)                     \
  {                                                 \
    #kernel, { &kernel __VA_OPT__(, ) __VA_ARGS__ } \
  }
const std::map<std::string, Planted> kPlanted = {
    KD_PLANTED(barrier_in_a_branch),
    KD_PLANTED(barriers_in_both_branches),
    KD_PLANTED(barrier_after_an_early_return),
    KD_PLANTED(shuffle_from_an_absent_lane),
    KD_PLANTED(shuffle_in_a_branch),
    KD_PLANTED(mask_without_the_caller),
    KD_PLANTED(different_warp_operations),
    KD_PLANTED(unwritten_shared),
    KD_PLANTED(write_behind_shared),
    KD_PLANTED(read_behind_global),
    KD_PLANTED(write_before_global),
    KD_PLANTED(misaligned_vector),
    KD_PLANTED(read_before_the_copy),
    KD_PLANTED(copy_without_a_wait),
    KD_PLANTED(store_to_an_ended_block, 2),
    KD_PLANTED(cluster_barrier_of_one_block, 2),
    KD_PLANTED(write_to_an_input),
    KD_PLANTED(missing_barrier),
    KD_PLANTED(sum_in_static_shared),
    KD_PLANTED(votes_and_shuffles),
    KD_PLANTED(atomics),
    KD_PLANTED(three_dimensions, 1, {1, 2, 1}, {4, 4, 4}),
    KD_PLANTED(exchange_in_a_cluster, 2),
};

// 128 floats that a kernel may touch, and not one more.
struct Floats {
  std::vector<float> data = std::vector<float>(128);
  explicit Floats(bool writable) {
    cuda_emulation::allow(data.data(), data.size() * sizeof(float), writable);
  }
};

}  // namespace

// Runs a kernel on values[0..128) and puts its results there; returns the error, or "".
extern "C" __attribute__((visibility("default"))) const char* planted(const char* name,
                                                                      float* values) {
  static thread_local std::string message;
  message.clear();
  try {
    const Planted& which = kPlanted.at(name);
    cuda_emulation::forget_memory();
    Floats in(false), out(true);
    std::copy_n(values, 128, in.data.begin());
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {which.cluster};
    cudaLaunchConfig_t config{};
    config.gridDim = which.grid;
    config.blockDim = which.block;
    config.dynamicSmemBytes = 64 * sizeof(float);
    config.attrs = &cluster;
    config.numAttrs = 1;
    const cudaError_t status = cudaLaunchKernelEx(
        &config, which.kernel, static_cast<const float*>(in.data.data()), out.data.data());
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
    std::copy(out.data.begin(), out.data.end(), values);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
