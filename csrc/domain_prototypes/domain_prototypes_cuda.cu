// domain_prototypes on the GPU. The first launch reads the hidden states once: a block adds up some
// positions of one example, a vector of columns a lane. The second has a block a group and a few
// columns: it makes means of its examples' sums and adds these up. Always in the same order,
// without atomics.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "common/check.h"
#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "domain_prototypes/domain_prototypes_plan.h"

namespace kd {

namespace {

constexpr const char* kOp = "domain_prototypes";
constexpr int kUnroll = 4;  // positions that a warp has under way

template <typename scalar_t>
struct PositionsCall {
  const scalar_t* hidden;
  int64_t example_stride, row_stride;
  const bool* mask;  // [batch, seq], or null
  float* sums;       // [batch, parts, columns]
  int* positions;    // [batch, parts], that count
  int64_t seq, part_rows, parts;
  int columns, tiles;
};

// kAligned: rows lie on 16-byte boundaries and end on one. Otherwise those that do not are read by
// elements: a lane owns the same columns in every row.
template <typename scalar_t, bool kAligned>
__global__ void __launch_bounds__(kPrototypeThreads, 2)
    prototype_parts(const PositionsCall<scalar_t> call) {
  constexpr int kSize = kVectorSize<scalar_t>, kTile = kWarpSize * kSize;
  constexpr int kRows = kAligned ? kUnroll : 1;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t part = blockIdx.x / call.tiles, example = part / call.parts;
  const int tile = static_cast<int>(blockIdx.x % call.tiles) * kTile, first = tile + lane * kSize;
  const int64_t begin = part % call.parts * call.part_rows;
  const int64_t end = begin + call.part_rows < call.seq ? begin + call.part_rows : call.seq;
  const scalar_t* states = call.hidden + example * call.example_stride;
  const bool* mask = call.mask == nullptr ? nullptr : call.mask + example * call.seq;

  float sums[kSize] = {};
  int count = 0;
  if (first < call.columns) {
    for (int64_t row = begin + warp; row < end; row += kRows * kPrototypeWarps) {
      uint4 raw[kRows];
      bool live[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = row + r * kPrototypeWarps;
        live[r] = at < end && (mask == nullptr || mask[at]);
        if (!live[r]) continue;
        const scalar_t* from = states + at * call.row_stride;
        if constexpr (kAligned) {
          raw[r] = *reinterpret_cast<const uint4*>(from + first);
        } else {
          raw[r] = load_vector(RowView<const scalar_t>(from, 0), first, call.columns, 0.0f);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!live[r]) continue;
        ++count;
        float x[kSize];
        unpack<scalar_t>(raw[r], x);
#pragma unroll
        for (int i = 0; i < kSize; ++i) sums[i] += x[i];
      }
    }
  }

  float* space = reinterpret_cast<float*>(dynamic_shared());  // [kPrototypeWarps, kTile]
  int* counts = reinterpret_cast<int*>(space + kPrototypeWarps * kTile);  // [kPrototypeWarps]
  float4* to = reinterpret_cast<float4*>(space + warp * kTile + lane * kSize);
#pragma unroll
  for (int i = 0; i < kSize / 4; ++i) {
    to[i] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
  }
  if (lane == 0) counts[warp] = count;  // its columns always exist
  __syncthreads();
  for (int c = threadIdx.x; c < kTile; c += kPrototypeThreads) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kPrototypeWarps; ++w) total += space[w * kTile + c];
    if (tile + c < call.columns) call.sums[part * call.columns + tile + c] = total;
  }
  if (tile == 0 && threadIdx.x == 0) {
    int total = 0;
#pragma unroll
    for (int w = 0; w < kPrototypeWarps; ++w) total += counts[w];
    call.positions[part] = total;
  }
}

struct GroupsCall {
  const float* parts_sums;  // [batch, parts, columns]
  const int* positions;     // [batch, parts]
  const int64_t* groups;    // [batch]
  float* means;             // [batch, columns]
  float* sums;              // [n_groups, columns]
  int64_t* counts;          // [n_groups]
  int64_t batch, parts, n_groups;
  int columns, tiles;
};

// A block owns a warp's width of columns of the examples of one group; the last group's are in
// none.
__global__ void __launch_bounds__(kPrototypeThreads) prototype_groups(const GroupsCall call) {
  constexpr int kRun = 32;  // of a sum, before it is put aside: a longer one would lose digits
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t group = blockIdx.x / call.tiles;
  const int tile = static_cast<int>(blockIdx.x % call.tiles), column = tile * kWarpSize + lane;
  const bool inside = column < call.columns;
  float total = 0.0f, recent = 0.0f;
  int members = 0, terms = 0;
  for (int64_t i = warp; i < call.batch; i += kPrototypeWarps) {
    const int64_t found = call.groups[i];
    if ((found < 0 || found >= call.n_groups ? call.n_groups : found) != group) continue;
    float sum = 0.0f;
    int count = 0;
    for (int64_t part = i * call.parts; part < (i + 1) * call.parts; ++part) {
      count += call.positions[part];
      if (inside) sum += call.parts_sums[part * call.columns + column];
    }
    const float mean = count > 0 ? sum / static_cast<float>(count) : 0.0f;
    if (inside) call.means[i * call.columns + column] = mean;
    members += count > 0 ? 1 : 0;
    recent += mean;
    if (++terms == kRun) {
      total += recent;
      recent = 0.0f;
      terms = 0;
    }
  }
  if (group == call.n_groups) return;
  float* space = reinterpret_cast<float*>(dynamic_shared());        // [kPrototypeWarps, kWarpSize]
  int* counts = reinterpret_cast<int*>(space + kPrototypeThreads);  // [kPrototypeWarps]
  space[threadIdx.x] = total + recent;
  if (lane == 0) counts[warp] = members;
  __syncthreads();
  if (warp != 0) return;
  float sum = 0.0f;
  int64_t all = 0;
#pragma unroll
  for (int w = 0; w < kPrototypeWarps; ++w) {
    sum += space[w * kWarpSize + lane];
    all += counts[w];
  }
  if (inside) call.sums[group * call.columns + column] = sum;
  if (tile == 0 && lane == 0) call.counts[group] = all;
}

// ---- launches -----------------------------------------------------------------------------------

template <typename scalar_t>
void launch_parts(const LaunchScope& scope, const PrototypeSizes& n, const PrototypePlan& plan,
                  const Tensor& hidden, const bool* mask, float* sums, int* positions) {
  constexpr int kSize = kVectorSize<scalar_t>;
  const PositionsCall<scalar_t> call{static_cast<const scalar_t*>(hidden.const_data_ptr()),
                                     hidden.stride(0),
                                     hidden.stride(1),
                                     mask,
                                     sums,
                                     positions,
                                     n.seq,
                                     plan.part_rows,
                                     plan.parts,
                                     static_cast<int>(n.columns),
                                     static_cast<int>(plan.tiles)};
  const bool aligned = n.columns % kSize == 0 && misalignment(call.hidden) == 0 &&
                       (n.batch == 1 || call.example_stride % kSize == 0) &&
                       (n.seq == 1 || call.row_stride % kSize == 0);
  const size_t shared = sizeof(float) * kPrototypeThreads * kSize + sizeof(int) * kPrototypeWarps;
  launch_kernel(kOp, scope, {plan.blocks(n), kPrototypeThreads, 1, shared},
                aligned ? &prototype_parts<scalar_t, true> : &prototype_parts<scalar_t, false>,
                call);
}

void launch_groups(const LaunchScope& scope, GroupsCall call) {
  call.tiles = (call.columns + kWarpSize - 1) / kWarpSize;
  const int64_t blocks = (call.n_groups + 1) * call.tiles;
  STD_TORCH_CHECK(blocks <= INT32_MAX, kOp, ": n_groups must take at most ", INT32_MAX,
                  " blocks, got ", call.n_groups);
  const size_t shared = sizeof(float) * kPrototypeThreads + sizeof(int) * kPrototypeWarps;
  launch_kernel(kOp, scope, {blocks, kPrototypeThreads, 1, shared}, &prototype_groups, call);
}

std::tuple<Tensor, Tensor, Tensor> domain_prototypes(const Tensor& hidden, const Tensor& groups,
                                                     const MaybeTensor& mask, int64_t n_groups) {
  const PrototypeSizes n = check_prototypes(kOp, hidden, groups, mask, n_groups);
  Tensor means = torch::stable::new_empty(hidden, {n.batch, n.columns}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(hidden, {n_groups, n.columns}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(hidden, {n_groups}, ScalarType::Long);
  const LaunchScope scope(hidden);
  dispatch_float(hidden.scalar_type(), kOp, "hidden", [&]<typename scalar_t>() {
    const PrototypePlan plan = plan_prototypes(n, kVectorSize<scalar_t>);
    STD_TORCH_CHECK(plan.blocks(n) <= INT32_MAX && n.columns <= INT32_MAX / 2, kOp,
                    ": hidden must take at most ", INT32_MAX, " blocks, got [", n.batch, ", ",
                    n.seq, ", ", n.columns, "]");
    Tensor parts =
        torch::stable::new_empty(hidden, {n.batch, plan.parts, n.columns}, ScalarType::Float);
    Tensor positions = torch::stable::new_empty(hidden, {n.batch, plan.parts}, ScalarType::Int);
    float* parts_sums = static_cast<float*>(parts.mutable_data_ptr());
    int* live = static_cast<int*>(positions.mutable_data_ptr());
    if (n.batch > 0) {
      launch_parts<scalar_t>(scope, n, plan, hidden, data_or_null<bool>(mask), parts_sums, live);
    }
    launch_groups(scope, {parts_sums, live, static_cast<const int64_t*>(groups.const_data_ptr()),
                          static_cast<float*>(means.mutable_data_ptr()),
                          static_cast<float*>(sums.mutable_data_ptr()),
                          static_cast<int64_t*>(counts.mutable_data_ptr()), n.batch, plan.parts,
                          n_groups, static_cast<int>(n.columns), 0});
  });
  return {means, sums, counts};
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("domain_prototypes", TORCH_BOX(&kd::domain_prototypes));
}
