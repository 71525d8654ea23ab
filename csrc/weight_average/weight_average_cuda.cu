// weight_average on the GPU: a block takes a chunk of a tensor, which it finds in the table. One
// launch for all tensors of a combination of dtypes; the weight is read on the device.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/check.h"
#include "common/launch.h"
#include "common/vector.cuh"
#include "weight_average/weight_average.h"

namespace kd {

namespace {

constexpr const char* kOp = "weight_average";
constexpr int kThreads = 256;
constexpr int kSize = 8;  // elements that a thread takes at a time: 16 bytes of bfloat16
static_assert(kAverageChunk % kSize == 0);

// What the kernels receive.
struct AverageCall {
  const AverageRow* rows;  // [tensors]
  int tensors;
  const float* weight;  // []
};

// A chunk of a tensor.
struct Chunk {
  AverageRow row;
  int64_t first, end;

  __device__ __forceinline__ Chunk(const AverageCall& call, int64_t chunk) {
    int low = 0, high = call.tensors - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (call.rows[middle].chunks_end > chunk) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    row = call.rows[low];
    const int64_t chunks = (row.size + kAverageChunk - 1) / kAverageChunk;
    first = (chunk - (row.chunks_end - chunks)) * kAverageChunk;
    end = row.size < first + kAverageChunk ? row.size : first + kAverageChunk;
  }

  // Whether vectors of all its tensors lie on 16-byte boundaries (no tensor: address 0).
  __device__ __forceinline__ bool aligned() const {
    return ((row.average | row.param | row.compensation | row.copy) & (kVectorBytes - 1)) == 0;
  }
};

// Eight elements from p on; those behind `count` are 0.
template <typename T>
__device__ __forceinline__ void load_eight(const T* p, int count, bool aligned, float (&x)[kSize]) {
  constexpr int kStep = kVectorSize<T>;
  if (aligned && count == kSize) {
#pragma unroll
    for (int i = 0; i < kSize; i += kStep) {
      float part[kStep];
      unpack<T>(load_16(p + i), part);
#pragma unroll
      for (int k = 0; k < kStep; ++k) x[i + k] = part[k];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = i < count ? static_cast<float>(p[i]) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void store_eight(T* p, int count, bool aligned,
                                            const float (&x)[kSize]) {
  constexpr int kStep = kVectorSize<T>;
  if (aligned && count == kSize) {
#pragma unroll
    for (int i = 0; i < kSize; i += kStep) {
      float part[kStep];
#pragma unroll
      for (int k = 0; k < kStep; ++k) part[k] = x[i + k];
      store_16(p + i, pack<T>(part));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (i < count) p[i] = static_cast<T>(x[i]);
  }
}

// What a float becomes as T.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return static_cast<float>(static_cast<T>(x));
}

// Average and compensation are of A, the copy of C (void: none).
template <typename A, typename P, typename C, bool kCompensated>
__global__ void __launch_bounds__(kThreads) average_chunks(const AverageCall call) {
  const Chunk chunk(call, blockIdx.x);
  const bool aligned = chunk.aligned();
  const float weight = *call.weight;
  A* average = reinterpret_cast<A*>(chunk.row.average);
  A* compensation = reinterpret_cast<A*>(chunk.row.compensation);
  const P* param = reinterpret_cast<const P*>(chunk.row.param);
  for (int64_t i = chunk.first + threadIdx.x * kSize; i < chunk.end; i += kThreads * kSize) {
    const int count = static_cast<int>(chunk.end - i < kSize ? chunk.end - i : kSize);
    float old[kSize], now[kSize], value[kSize];
    load_eight(average + i, count, aligned, old);
    load_eight(param + i, count, aligned, now);
    if constexpr (kCompensated) {
      float rest[kSize];
      load_eight(compensation + i, count, aligned, rest);
#pragma unroll
      for (int k = 0; k < kSize; ++k) old[k] += rest[k];
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      // A weight of 1 is a copy, not one within a rounding.
      value[k] = weight == 1.0f ? now[k] : fmaf(weight, now[k] - old[k], old[k]);
    }
    store_eight(average + i, count, aligned, value);
    if constexpr (kCompensated) {
      float rest[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) rest[k] = value[k] - rounded<A>(value[k]);
      store_eight(compensation + i, count, aligned, rest);
    }
    if constexpr (!std::is_void_v<C>) {
      store_eight(reinterpret_cast<C*>(chunk.row.copy) + i, count, aligned, value);
    }
  }
}

// Elements of one dtype, as words of that size.
template <typename Word>
__global__ void __launch_bounds__(kThreads) swap_chunks(const AverageCall call) {
  const Chunk chunk(call, blockIdx.x);
  Word* average = reinterpret_cast<Word*>(chunk.row.average);
  Word* param = reinterpret_cast<Word*>(chunk.row.param);
  for (int64_t i = chunk.first + threadIdx.x; i < chunk.end; i += kThreads) {
    const Word kept = average[i];
    average[i] = param[i];
    param[i] = kept;
  }
}

// A float32 average and a bfloat16 param: see weight_average_swap_ of op.py.
template <bool kBack>
__global__ void __launch_bounds__(kThreads) swap_halves(const AverageCall call) {
  const Chunk chunk(call, blockIdx.x);
  uint32_t* bits = reinterpret_cast<uint32_t*>(chunk.row.average);
  uint16_t* half = reinterpret_cast<uint16_t*>(chunk.row.param);
  for (int64_t i = chunk.first + threadIdx.x; i < chunk.end; i += kThreads) {
    const uint32_t low = bits[i] & 0xffff, upper = bits[i] >> 16, given = half[i];
    const uint32_t up = low >> 15;  // rounded up, away from zero
    bits[i] = (kBack ? given - up : given) << 16 | low;
    half[i] = static_cast<uint16_t>(kBack ? upper : upper + up);
  }
}

AverageCall open_call(const Tensor& table, const float* weight) {
  return {static_cast<const AverageRow*>(table.const_data_ptr()), static_cast<int>(table.size(0)),
          weight};
}

LaunchShape shape_of(int64_t chunks) {
  STD_TORCH_CHECK(chunks <= INT32_MAX, kOp, ": tensors must have at most ", INT32_MAX,
                  " chunks, got ", chunks);
  return {chunks, kThreads};
}

// Calls body.operator()<T>() for a dtype; void for none.
template <typename Body>
void with_dtype(AverageDtype dtype, const Body& body) {
  switch (dtype) {
    case AverageDtype::kFloat:
      return body.template operator()<float>();
    case AverageDtype::kBf16:
      return body.template operator()<bf16_t>();
    case AverageDtype::kHalf:
      return body.template operator()<half_t>();
    case AverageDtype::kNone:
      return body.template operator()<void>();
  }
}

void weight_average_update(Tensor table, Tensor weight, std::vector<int64_t> dtypes,
                           int64_t chunks) {
  const AverageDtypes d = check_average_table(kOp, table, dtypes);
  check_average_weight(kOp, weight);
  if (chunks == 0) return;
  const LaunchScope scope(table);
  const AverageCall call = open_call(table, static_cast<const float*>(weight.const_data_ptr()));
  with_dtype(d.param, [&]<typename P>() {
    if constexpr (!std::is_void_v<P>) {
      if (d.average == AverageDtype::kFloat) {
        return with_dtype(d.copy, [&]<typename C>() {
          launch_kernel(kOp, scope, shape_of(chunks), &average_chunks<float, P, C, false>, call);
        });
      }
      launch_kernel(kOp, scope, shape_of(chunks),
                    d.average == AverageDtype::kBf16 ? &average_chunks<bf16_t, P, void, true>
                                                     : &average_chunks<half_t, P, void, true>,
                    call);
    }
  });
}

void weight_average_swap(Tensor table, std::vector<int64_t> dtypes, int64_t chunks, bool back) {
  const AverageDtypes d = check_average_table(kOp, table, dtypes);
  const bool wide = d.average == AverageDtype::kFloat && d.param == AverageDtype::kBf16;
  STD_TORCH_CHECK(wide || d.average == d.param, kOp,
                  ": dtypes must be equal, or float32 and bfloat16, to be exchanged");
  if (chunks == 0) return;
  const LaunchScope scope(table);
  const AverageCall call = open_call(table, nullptr);
  launch_kernel(kOp, scope, shape_of(chunks),
                wide ? back ? &swap_halves<true> : &swap_halves<false>
                : d.average == AverageDtype::kFloat ? &swap_chunks<uint32_t>
                                                    : &swap_chunks<uint16_t>,
                call);
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("weight_average_update", TORCH_BOX(&kd::weight_average_update));
  m.impl("weight_average_swap", TORCH_BOX(&kd::weight_average_swap));
}
