// weight_average on the GPU: a block takes a chunk of a tensor, which it finds in the table. One
// launch for all tensors of a combination of dtypes; the weight is read on the device.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/multi_tensor.cuh"
#include "weight_average/weight_average.h"

namespace kd {

namespace {

constexpr const char* kOp = "weight_average";
// What the kernels receive.
struct AverageCall {
  Table<AverageRow> table;
  const float* weight;  // []
};

using AverageChunk = Chunk<AverageRow>;

// Average and compensation are of A, the copy of C (void: none).
template <typename A, typename P, typename C, bool kCompensated>
__global__ void __launch_bounds__(kTableThreads) average_chunks(const AverageCall call) {
  const AverageChunk chunk(call.table, blockIdx.x);
  const bool aligned =
      all_aligned(chunk.row.average, chunk.row.param, chunk.row.compensation, chunk.row.copy);
  const float weight = *call.weight;
  A* average = reinterpret_cast<A*>(chunk.row.average);
  A* compensation = reinterpret_cast<A*>(chunk.row.compensation);
  const P* param = reinterpret_cast<const P*>(chunk.row.param);
  for (int64_t i = chunk.first + threadIdx.x * kTableSize; i < chunk.end;
       i += kTableThreads * kTableSize) {
    const int count = static_cast<int>(chunk.end - i < kTableSize ? chunk.end - i : kTableSize);
    float old[kTableSize], now[kTableSize], value[kTableSize];
    load_eight(average + i, count, aligned, old);
    load_eight(param + i, count, aligned, now);
    if constexpr (kCompensated) {
      float rest[kTableSize];
      load_eight(compensation + i, count, aligned, rest);
#pragma unroll
      for (int k = 0; k < kTableSize; ++k) old[k] += rest[k];
    }
#pragma unroll
    for (int k = 0; k < kTableSize; ++k) {
      // A weight of 1 is a copy, not one within a rounding.
      value[k] = weight == 1.0f ? now[k] : fmaf(weight, now[k] - old[k], old[k]);
    }
    store_eight(average + i, count, aligned, value);
    if constexpr (kCompensated) {
      float rest[kTableSize];
#pragma unroll
      for (int k = 0; k < kTableSize; ++k) rest[k] = value[k] - rounded<A>(value[k]);
      store_eight(compensation + i, count, aligned, rest);
    }
    if constexpr (!std::is_void_v<C>) {
      store_eight(reinterpret_cast<C*>(chunk.row.copy) + i, count, aligned, value);
    }
  }
}

// Elements of one dtype, as words of that size.
template <typename Word>
__global__ void __launch_bounds__(kTableThreads) swap_chunks(const AverageCall call) {
  const AverageChunk chunk(call.table, blockIdx.x);
  Word* average = reinterpret_cast<Word*>(chunk.row.average);
  Word* param = reinterpret_cast<Word*>(chunk.row.param);
  for (int64_t i = chunk.first + threadIdx.x; i < chunk.end; i += kTableThreads) {
    const Word kept = average[i];
    average[i] = param[i];
    param[i] = kept;
  }
}

// A float32 average and a bfloat16 param: see weight_average_swap_ of op.py.
template <bool kBack>
__global__ void __launch_bounds__(kTableThreads) swap_halves(const AverageCall call) {
  const AverageChunk chunk(call.table, blockIdx.x);
  uint32_t* bits = reinterpret_cast<uint32_t*>(chunk.row.average);
  uint16_t* half = reinterpret_cast<uint16_t*>(chunk.row.param);
  for (int64_t i = chunk.first + threadIdx.x; i < chunk.end; i += kTableThreads) {
    const uint32_t low = bits[i] & 0xffff, upper = bits[i] >> 16, given = half[i];
    const uint32_t up = low >> 15;  // rounded up, away from zero
    bits[i] = (kBack ? given - up : given) << 16 | low;
    half[i] = static_cast<uint16_t>(kBack ? upper : upper + up);
  }
}

void weight_average_update(Tensor table, Tensor weight, std::vector<int64_t> dtypes,
                           int64_t chunks) {
  const AverageDtypes d = check_average_table(kOp, table, dtypes);
  check_one_float(kOp, "weight", weight);
  if (chunks == 0) return;
  const LaunchScope scope(table);
  const AverageCall call{Table<AverageRow>(table),
                         static_cast<const float*>(weight.const_data_ptr())};
  with_dtype(d.param, [&]<typename P>() {
    if constexpr (!std::is_void_v<P>) {
      if (d.average == TableDtype::kFloat) {
        return with_dtype(d.copy, [&]<typename C>() {
          launch_kernel(kOp, scope, table_shape(kOp, chunks), &average_chunks<float, P, C, false>,
                        call);
        });
      }
      launch_kernel(kOp, scope, table_shape(kOp, chunks),
                    d.average == TableDtype::kBf16 ? &average_chunks<bf16_t, P, void, true>
                                                   : &average_chunks<half_t, P, void, true>,
                    call);
    }
  });
}

void weight_average_swap(Tensor table, std::vector<int64_t> dtypes, int64_t chunks, bool back) {
  const AverageDtypes d = check_average_table(kOp, table, dtypes);
  const bool wide = d.average == TableDtype::kFloat && d.param == TableDtype::kBf16;
  STD_TORCH_CHECK(wide || d.average == d.param, kOp,
                  ": dtypes must be equal, or float32 and bfloat16, to be exchanged");
  if (chunks == 0) return;
  const LaunchScope scope(table);
  const AverageCall call{Table<AverageRow>(table), nullptr};
  launch_kernel(kOp, scope, table_shape(kOp, chunks),
                wide                              ? back ? &swap_halves<true> : &swap_halves<false>
                : d.average == TableDtype::kFloat ? &swap_chunks<uint32_t>
                                                  : &swap_chunks<uint16_t>,
                call);
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("weight_average_update", TORCH_BOX(&kd::weight_average_update));
  m.impl("weight_average_swap", TORCH_BOX(&kd::weight_average_swap));
}
