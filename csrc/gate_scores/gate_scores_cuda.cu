// gate_scores on the GPU. The first launch reads everything once: a block adds up the products of
// some rows of one example, a vector of columns a lane. The second adds up what the blocks have
// left, takes absolute values and adds these up. Always in the same order, without atomics.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/check.h"
#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "gate_scores/gate_scores_plan.h"

namespace kd {

namespace {

constexpr const char* kOp = "gate_scores";
constexpr int kUnroll = 4;  // rows that a warp has under way, of each tensor

template <typename scalar_t, int kGrads>
struct alignas(16) PartsCall {
  Matrix<const scalar_t> activation, grads[kGrads];
  const bool* mask;  // [rows], or null
  float* sums;       // [examples * parts, kGrads, columns]
  int64_t example_rows, part_rows, parts;
  int columns, tiles;
};

template <typename scalar_t, bool kAligned>
__device__ __forceinline__ uint4 load_columns(const Matrix<const scalar_t>& x, int64_t row,
                                              int first, int columns) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const uint4*>(x.data + row * x.stride + first);
  } else {
    return load_vector(RowView<const scalar_t>(x, row, 0), first, columns, 0.0f);
  }
}

// kAligned: rows lie on 16-byte boundaries and end on one. Otherwise those that do not are read by
// elements: a lane owns the same columns in every row.
template <typename scalar_t, int kGrads, bool kAligned>
__global__ void __launch_bounds__(kGateThreads, 2)
    gate_parts(const __grid_constant__ PartsCall<scalar_t, kGrads> call) {
  constexpr int kSize = kVectorSize<scalar_t>, kTile = kWarpSize * kSize;
  constexpr int kRows = kAligned ? kUnroll : 1;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t part = blockIdx.x / call.tiles;
  const int tile = static_cast<int>(blockIdx.x % call.tiles) * kTile, first = tile + lane * kSize;
  const int64_t example = part / call.parts * call.example_rows;
  const int64_t begin = example + part % call.parts * call.part_rows;
  const int64_t behind = example + call.example_rows;
  const int64_t end = begin + call.part_rows < behind ? begin + call.part_rows : behind;

  float sums[kGrads][kSize] = {};
  if (first < call.columns) {
    for (int64_t row = begin + warp; row < end; row += kRows * kGateWarps) {
      uint4 a[kRows], g[kGrads][kRows];
      bool live[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = row + r * kGateWarps;
        live[r] = at < end && (call.mask == nullptr || call.mask[at]);
        if (!live[r]) continue;
        a[r] = load_columns<scalar_t, kAligned>(call.activation, at, first, call.columns);
#pragma unroll
        for (int k = 0; k < kGrads; ++k) {
          g[k][r] = load_columns<scalar_t, kAligned>(call.grads[k], at, first, call.columns);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!live[r]) continue;
        float x[kSize];
        unpack<scalar_t>(a[r], x);
#pragma unroll
        for (int k = 0; k < kGrads; ++k) {
          float y[kSize];
          unpack<scalar_t>(g[k][r], y);
#pragma unroll
          for (int i = 0; i < kSize; ++i) sums[k][i] = fmaf(x[i], y[i], sums[k][i]);
        }
      }
    }
  }

  float* space = reinterpret_cast<float*>(dynamic_shared());  // [kGateWarps, kGrads, kTile]
#pragma unroll
  for (int k = 0; k < kGrads; ++k) {
    float4* to = reinterpret_cast<float4*>(space + (warp * kGrads + k) * kTile + lane * kSize);
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
      to[i] =
          make_float4(sums[k][4 * i], sums[k][4 * i + 1], sums[k][4 * i + 2], sums[k][4 * i + 3]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int c = threadIdx.x; c < kGrads * kTile; c += kGateThreads) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kGateWarps; ++w) total += space[w * kGrads * kTile + c];
    const int column = tile + c % kTile;
    if (column < call.columns) {
      call.sums[(part * kGrads + c / kTile) * call.columns + column] = total;
    }
  }
}

struct TotalsCall {
  const float* sums;  // [examples, parts, grads * columns]
  float* scores;      // [grads * columns / width]
  int64_t examples, parts;
  int64_t size;  // grads * columns
  int width;
};

// kWide: a block a group, its lanes walk over the columns; else a lane a column, which is a group.
template <bool kWide>
__global__ void __launch_bounds__(kGateThreads) gate_totals(const TotalsCall call) {
  constexpr int kAhead = 8;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kWide ? call.width : kWarpSize) + lane;
  const int64_t behind = kWide ? first - lane + call.width : call.size;
  // The warps share the parts of the only example, or else take an example each.
  const bool one = call.examples == 1;
  const int64_t part_step = one ? kGateWarps : 1;
  float total = 0.0f;
  for (int64_t example = one ? 0 : warp; example < call.examples; example += one ? 1 : kGateWarps) {
    const float* sums = call.sums + example * call.parts * call.size;
    float dot = 0.0f;
    for (int64_t column = first; column < behind; column += kWide ? kWarpSize : behind) {
      for (int64_t part = one ? warp : 0; part < call.parts; part += kAhead * part_step) {
        float x[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int64_t at = part + i * part_step;
          x[i] = at < call.parts ? sums[at * call.size + column] : 0.0f;
        }
        dot += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
      }
    }
    if constexpr (kWide) dot = warp_sum(dot);
    total += one ? dot : fabsf(dot);
  }
  float* space = reinterpret_cast<float*>(dynamic_shared());  // [kGateWarps, kWarpSize]
  space[threadIdx.x] = total;
  __syncthreads();
  if (warp != 0 || first >= call.size || (kWide && lane != 0)) return;
  float score = 0.0f;
#pragma unroll
  for (int w = 0; w < kGateWarps; ++w) score += space[w * kWarpSize + lane];
  call.scores[kWide ? static_cast<int64_t>(blockIdx.x) : first] = fabsf(score);
}

// ---- launches -----------------------------------------------------------------------------------

template <typename scalar_t>
Matrix<const scalar_t> matrix_of(const Tensor& x) {
  return {static_cast<const scalar_t*>(x.const_data_ptr()), x.stride(0)};
}

template <typename scalar_t>
bool on_boundaries(const Matrix<const scalar_t>& x, int64_t rows) {
  return misalignment(x.data) == 0 && (rows == 1 || x.stride % kVectorSize<scalar_t> == 0);
}

template <typename scalar_t, int kGrads>
void launch_parts(const LaunchScope& scope, const GateSizes& n, const GatePlan& plan,
                  const Tensor& activation, const std::vector<Tensor>& grads, const bool* mask,
                  float* sums) {
  constexpr int kSize = kVectorSize<scalar_t>;
  PartsCall<scalar_t, kGrads> call{};
  call.activation = matrix_of<scalar_t>(activation);
  bool aligned = n.columns % kSize == 0 && on_boundaries(call.activation, n.rows);
  for (int k = 0; k < kGrads; ++k) {
    call.grads[k] = matrix_of<scalar_t>(grads[k]);
    aligned = aligned && on_boundaries(call.grads[k], n.rows);
  }
  call.mask = mask;
  call.sums = sums;
  call.example_rows = n.example_rows();
  call.part_rows = plan.part_rows;
  call.parts = plan.parts;
  call.columns = static_cast<int>(n.columns);
  call.tiles = static_cast<int>(plan.tiles);
  const LaunchShape shape{plan.blocks(n), kGateThreads, 1,
                          sizeof(float) * kGateThreads * kGrads * kSize};
  launch_kernel(
      kOp, scope, shape,
      aligned ? &gate_parts<scalar_t, kGrads, true> : &gate_parts<scalar_t, kGrads, false>, call);
}

Tensor gate_scores(const Tensor& activation, const std::vector<Tensor>& grads,
                   const MaybeTensor& mask, int64_t width, int64_t examples) {
  const GateSizes n = check_gates(kOp, activation, grads, mask, width, examples);
  Tensor scores = torch::stable::new_empty(activation, {n.grads, n.groups()}, ScalarType::Float);
  const LaunchScope scope(activation);
  dispatch_float(activation.scalar_type(), kOp, "activation", [&]<typename scalar_t>() {
    const GatePlan plan = plan_gates(n, kVectorSize<scalar_t>);
    STD_TORCH_CHECK(plan.blocks(n) <= INT32_MAX && n.columns <= INT32_MAX / 2, kOp,
                    ": activation must take at most ", INT32_MAX, " blocks, got [", n.rows, ", ",
                    n.columns, "]");
    Tensor sums = torch::stable::new_empty(
        activation, {n.examples * plan.parts, n.grads, n.columns}, ScalarType::Float);
    float* found = static_cast<float*>(sums.mutable_data_ptr());
    const auto launch = n.grads == 1 ? &launch_parts<scalar_t, 1> : &launch_parts<scalar_t, 2>;
    if (n.rows > 0) {
      launch(scope, n, plan, activation, grads, data_or_null<bool>(mask), found);
    }
    const TotalsCall call{found,
                          static_cast<float*>(scores.mutable_data_ptr()),
                          n.examples,
                          plan.parts,
                          n.grads * n.columns,
                          static_cast<int>(width)};
    const bool wide = width > 1;
    const int64_t blocks = wide ? n.grads * n.groups() : (call.size + kWarpSize - 1) / kWarpSize;
    launch_kernel(kOp, scope, {blocks, kGateThreads, 1, sizeof(float) * kGateThreads},
                  wide ? &gate_totals<true> : &gate_totals<false>, call);
  });
  return scores;
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("gate_scores", TORCH_BOX(&kd::gate_scores));
}
