// hidden_match on the GPU. One launch takes all layers: a block finds its layer in a table in the
// kernel's arguments and works on one or several whole rows of it, as hidden_match_plan.h says.
// Each row leaves one term; small kernels add these up in a fixed order.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/launch.h"
#include "common/reduce.cuh"
#include "hidden_match/hidden_match_check.h"
#include "hidden_match/hidden_match_walk.cuh"

namespace kd {

namespace {

constexpr const char* kOp = "hidden_match";
constexpr int kWarps = kMatchThreads / kWarpSize;
constexpr int kWarpLog2 = 5;
static_assert(1 << kWarpLog2 == kWarpSize);
constexpr int kTotalThreads = 512;
constexpr float kLargest = 3.402823466e38f;
constexpr size_t kParameterBytes = 4096;  // of a kernel, before sm_90 and its drivers

// A layer of a launch. Strides in elements.
struct LayerCall {
  const void* student;  // [rows, width]
  const void* teacher;
  void* grad;  // [rows, width], contiguous
  int64_t student_stride, teacher_stride;
  int width;
  float weight;
  int first_block;
  int16_t warps_log2;  // of those that share a row
  bool aligned;        // rows of all three lie on 16-byte boundaries and end on one
};

// What the row kernel receives.
struct MatchCall {
  const bool* mask;          // [rows] or null
  const float* row_weights;  // [rows] or null
  const float* denominator;  // [] or null
  const float* count;        // [] rows that count, or null: do not divide by them
  float* terms;              // [layers of the launch, rows]: the weighted distances
  int64_t rows;
  float scale;  // of the gradient, where neither denominator nor count is given
  float beta, per_beta;
  bool per_width;  // pkd, not cosine
  int layer_count;
  int blocks_a_layer;  // 0: layers differ
  LayerCall layers[kMatchMostLayers];
};
static_assert(sizeof(MatchCall) <= kParameterBytes);

// What a sum is multiplied by; a divisor of 0 counts as 1.
__device__ __forceinline__ float inverse_of(float divisor) {
  return 1.0f / (divisor == 0.0f ? 1.0f : divisor);
}

__device__ __forceinline__ int layer_of(const MatchCall& call, int block) {
  if (call.blocks_a_layer > 0) return block / call.blocks_a_layer;
  int low = 0, high = call.layer_count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (call.layers[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Sums up over the warps of each row; every thread gets its row's. The space (kCount floats a warp)
// serves one reduction only.
template <int kCount>
__device__ __forceinline__ void reduce_rows(float (&x)[kCount], int warps_a_row, float* space) {
  const int warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int k = 0; k < kCount; ++k) x[k] = warp_sum(x[k]);
  if (warps_a_row == 1) return;
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) space[k * kWarps + warp] = x[k];
  }
  __syncthreads();
  // Every lane ends up with the same bits: both partners of a step add the same two numbers.
  const int from = (warp & ~(warps_a_row - 1)) + (threadIdx.x & (warps_a_row - 1));
#pragma unroll
  for (int k = 0; k < kCount; ++k) x[k] = space[k * kWarps + from];
  for (int apart = warps_a_row / 2; apart > 0; apart /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] += __shfl_xor_sync(kFullWarp, x[k], apart);
  }
}

// mse and smooth_l1: what an element adds to the distance, and its derivative.
template <MatchKind kKind>
__device__ __forceinline__ float term(const MatchCall& call, float x, float* derivative) {
  if constexpr (kKind == MatchKind::kMse) {
    *derivative = 2.0f * x;
    return x * x;
  } else {
    const float size = fabsf(x);
    const bool small = size < call.beta;
    const float sign = x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x;
    *derivative = small ? x * call.per_beta : sign;
    return small ? x * x * (0.5f * call.per_beta) : size - 0.5f * call.beta;
  }
}

// The distance of a row; stores the gradient.
template <MatchKind kKind, bool kGrad, typename Walk>
__device__ __forceinline__ float element_row(const MatchCall& call, Walk& walk, int width,
                                             int warps_a_row, float scale) {
  constexpr int kSize = Walk::kSize;
  const float per_width = 1.0f / static_cast<float>(width), factor = scale * per_width;
  float parts[2] = {};  // two chains of additions
  walk.pass([&](int vector, const float (&s)[kSize], const float (&t)[kSize]) {
    float g[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      parts[i % 2] += term<kKind>(call, s[i] - t[i], &g[i]);
      g[i] *= factor;
    }
    if constexpr (kGrad) walk.store(vector, g);
  });
  float sum[1] = {parts[0] + parts[1]};
  reduce_rows(sum, warps_a_row, reinterpret_cast<float*>(dynamic_shared()));
  return per_width * sum[0];
}

// cosine and pkd, from x = s - r t with r = |s| / |t|: the distance of the unit vectors is
// d = sum(x^2) / |s|^2, and d(1 - cos)/ds is what x has across s, over |s|^2. That is exactly 0
// where the rows agree, rounds an element once, and takes fewer instructions than two unit vectors:
// in bfloat16 they are the second limit behind the memory.
//
// r is off by a rounding e, which near agreement is no smaller than x. What x has along s is
// d/2 - e, so it is measured: the gradient then keeps e as a factor only, and d is rid of e^2.
//
// `blank`: there is no direction, and no gradient was stored.
template <bool kGrad, typename Walk>
__device__ __forceinline__ float direction_row(const MatchCall& call, Walk& walk, int width,
                                               int warps_a_row, float scale, bool* blank) {
  constexpr int kSize = Walk::kSize;
  float* space = reinterpret_cast<float*>(dynamic_shared());
  float squares[2] = {};
  walk.pass([&](int, const float (&s)[kSize], const float (&t)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      squares[0] = fmaf(s[i], s[i], squares[0]);
      squares[1] = fmaf(t[i], t[i], squares[1]);
    }
  });
  reduce_rows(squares, warps_a_row, space);
  *blank = squares[0] == 0.0f || squares[1] == 0.0f;
  const float norm = sqrtf(squares[0]);
  const float inverse = 1.0f / norm, ratio = norm / sqrtf(squares[1]);

  float sums[2] = {};  // x^2, x s
  walk.pass([&](int, const float (&s)[kSize], const float (&t)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float x = fmaf(-ratio, t[i], s[i]);
      sums[0] = fmaf(x, x, sums[0]);
      sums[1] = fmaf(x, s[i], sums[1]);
    }
  });
  reduce_rows(sums, warps_a_row, space + 2 * kWarps);
  if (*blank) return 0.0f;

  const float square = sums[0] * inverse * inverse, along = sums[1] * inverse * inverse;
  const float e = 0.5f * square - along;
  float distance = square - e * e;
  if (distance < 0.0f) distance = 0.0f;  // not by fmaxf, which would hide a NaN
  const float factor = call.per_width ? 1.0f / static_cast<float>(width) : 0.5f;
  if constexpr (kGrad) {
    float outer = 2.0f * factor * scale * inverse * inverse;
    // Of rows around 1e-20, whose gradients are still finite.
    if (fabsf(outer) > kLargest) outer = copysignf(kLargest, outer);
    walk.pass([&](int vector, const float (&s)[kSize], const float (&t)[kSize]) {
      float g[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        g[i] = fmaf(-along, s[i], fmaf(-ratio, t[i], s[i])) * outer;
      }
      walk.store(vector, g);
    });
  }
  return factor * distance;
}

template <typename scalar_t, MatchKind kKind, bool kGrad, bool kAligned>
__device__ __forceinline__ void layer_rows(const MatchCall& call, int index) {
  const LayerCall& layer = call.layers[index];
  const int warps = 1 << layer.warps_log2, threads_log2 = kWarpLog2 + layer.warps_log2;
  const int place = static_cast<int>(threadIdx.x) >> threads_log2;  // of the row in the block
  const int block = static_cast<int>(blockIdx.x) - layer.first_block;
  const int row = block * (kWarps >> layer.warps_log2) + place;
  // Rows that are none take part in the barriers.
  const bool exists = row < call.rows;
  const bool live = exists && (call.mask == nullptr || call.mask[row]);
  const MatchRow<scalar_t> pair{
      static_cast<const scalar_t*>(layer.student) + int64_t{row} * layer.student_stride,
      static_cast<const scalar_t*>(layer.teacher) + int64_t{row} * layer.teacher_stride,
      kGrad ? static_cast<scalar_t*>(layer.grad) + int64_t{row} * layer.width : nullptr,
      layer.width,
      static_cast<int>(threadIdx.x) & ((1 << threads_log2) - 1),
      threads_log2,
      live};
  // A row that is read by elements is not kept: the registers are for the rows that matter.
  MatchWalk<scalar_t, kAligned ? kMatchHeld : 1, kAligned> walk(pair);
  walk.start();
  const float weight = live && call.row_weights != nullptr ? call.row_weights[row] : 1.0f;
  float scale = weight * layer.weight;
  if constexpr (kGrad) {
    const float* divisor = call.denominator != nullptr ? call.denominator : call.count;
    scale *= divisor != nullptr ? inverse_of(*divisor) : call.scale;
  }
  float distance;
  bool blank = !live;
  if constexpr (is_direction(kKind)) {
    distance = direction_row<kGrad>(call, walk, layer.width, warps, scale, &blank);
  } else {
    distance = element_row<kKind, kGrad>(call, walk, layer.width, warps, scale);
  }
  if (!exists) return;
  if constexpr (kGrad) {
    if (blank) walk.store_zeros();
  }
  if (pair.thread == 0) call.terms[index * call.rows + row] = live ? weight * distance : 0.0f;
}

// kCosine is pkd too.
template <typename scalar_t, MatchKind kKind, bool kGrad>
__global__ void __launch_bounds__(kMatchThreads, 3)
    match_rows(const __grid_constant__ MatchCall call) {
  const int index = layer_of(call, static_cast<int>(blockIdx.x));
  if (call.layers[index].aligned) {
    layer_rows<scalar_t, kKind, kGrad, true>(call, index);
  } else {
    layer_rows<scalar_t, kKind, kGrad, false>(call, index);
  }
}

// ---- over all rows ------------------------------------------------------------------------------

struct alignas(16) Total {
  float sum = 0.0f;
  float unused[3] = {};
};
constexpr size_t kTotalBytes = sizeof(Total) * (kTotalThreads / kWarpSize);

__device__ __forceinline__ float sum_over_block(float mine) {
  Total total;
  total.sum = mine;
  return reduce_row(total, Total{}, ReduceSpace<Total>(dynamic_shared()), 0, 1,
                    [](Total x) {
                      x.sum = warp_sum(x.sum);
                      return x;
                    })
      .sum;
}

__device__ __forceinline__ float count_rows(const bool* mask, int64_t rows) {
  if (mask == nullptr) return static_cast<float>(rows);
  float mine = 0.0f;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) mine += mask[row] ? 1.0f : 0.0f;
  return sum_over_block(mine);
}

__global__ void __launch_bounds__(kTotalThreads) match_count(const bool* mask,  // [rows]
                                                             int64_t rows,
                                                             float* count) {  // []
  const float found = count_rows(mask, rows);
  if (threadIdx.x == 0) *count = found;
}

// Of the layers of one launch.
struct TotalsCall {
  const float* terms;  // [layers, rows]
  const bool* mask;    // [rows] or null
  float* rows;         // [rows] or null: the layers' terms with their weights, added up
  float* sums;         // [layers]
  float* weighted;     // [layers]: the same with the layers' weights
  float* count;        // []
  int64_t row_count;
  int layer_count;
  bool first;  // else `rows` holds what the launches before have found, and `count` is known
  float weights[kMatchMostLayers];
};

// A block a layer, one that counts, and the others of a thread a row.
__global__ void __launch_bounds__(kTotalThreads)
    match_totals(const __grid_constant__ TotalsCall call) {
  const int block = static_cast<int>(blockIdx.x);
  if (block < call.layer_count) {
    const float* terms = call.terms + block * call.row_count;
    float mine = 0.0f;
    for (int64_t row = threadIdx.x; row < call.row_count; row += blockDim.x) mine += terms[row];
    const float sum = sum_over_block(mine);
    if (threadIdx.x != 0) return;
    call.sums[block] = sum;
    call.weighted[block] = call.weights[block] * sum;
  } else if (block == call.layer_count) {
    if (!call.first) return;
    const float count = count_rows(call.mask, call.row_count);
    if (threadIdx.x == 0) *call.count = count;
  } else {
    const int64_t row =
        static_cast<int64_t>(block - call.layer_count - 1) * blockDim.x + threadIdx.x;
    if (row >= call.row_count) return;
    float sum = call.first ? 0.0f : call.rows[row];
    for (int layer = 0; layer < call.layer_count; ++layer) {
      sum = fmaf(call.weights[layer], call.terms[layer * call.row_count + row], sum);
    }
    call.rows[row] = sum;
  }
}

struct LossCall {
  const float* sums;         // [layers]
  const float* weighted;     // [layers]
  const float* count;        // []
  const float* denominator;  // [] or null
  float* loss;               // []
  float* parts;              // [layers + 1]
  int layer_count;
  bool mean;
};

// One warp.
__global__ void __launch_bounds__(kWarpSize) match_loss(const LossCall call) {
  float scale = 1.0f;
  if (call.denominator != nullptr) {
    scale = inverse_of(*call.denominator);
  } else if (call.mean) {
    scale = inverse_of(*call.count);
  }
  float mine = 0.0f;
  for (int layer = threadIdx.x; layer < call.layer_count; layer += kWarpSize) {
    call.parts[layer] = call.sums[layer] * scale;
    mine += call.weighted[layer];
  }
  const float sum = warp_sum(mine);
  if (threadIdx.x != 0) return;
  *call.loss = sum * scale;
  call.parts[call.layer_count] = *call.count;
}

// ---- launches -----------------------------------------------------------------------------------

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

// What launches leave for the next.
struct Work {
  float* terms;     // [layers, rows]
  float* sums;      // [layers]
  float* weighted;  // [layers]
  float* count;     // []
};

// Layers of one launch.
struct Span {
  int begin, end;
  int64_t blocks;
};

std::vector<Span> launches_of(const std::vector<MatchLayerPlan>& plans) {
  std::vector<Span> spans;
  for (int l = 0; l < static_cast<int>(plans.size()); ++l) {
    if (l == 0 || plans[l].launch != plans[l - 1].launch) spans.push_back({l, l, 0});
    spans.back().end = l + 1;
    spans.back().blocks += plans[l].blocks;
  }
  return spans;
}

template <typename scalar_t>
LayerCall layer_call(const MatchInputs& in, int l, scalar_t* grad, const MatchLayerPlan& plan) {
  const Tensor &student = in.students[l], &teacher = in.teachers[l];
  const auto on_boundaries = [&](const scalar_t* data, int64_t stride) {
    return misalignment(data) == 0 && (in.rows() == 1 || stride % kVectorSize<scalar_t> == 0);
  };
  const scalar_t* s = static_cast<const scalar_t*>(student.const_data_ptr());
  const scalar_t* t = static_cast<const scalar_t*>(teacher.const_data_ptr());
  const int64_t width = student.size(1);
  const bool aligned = width % kVectorSize<scalar_t> == 0 && on_boundaries(s, student.stride(0)) &&
                       on_boundaries(t, teacher.stride(0)) && misalignment(grad) == 0;
  return {s,
          t,
          grad,
          student.stride(0),
          teacher.stride(0),
          static_cast<int>(width),
          static_cast<float>(in.weights[l]),
          plan.first_block,
          static_cast<int16_t>(plan.warps_log2),
          aligned};
}

template <typename scalar_t, bool kGrad>
void launch_rows(const LaunchScope& scope, const MatchInputs& in, int64_t blocks,
                 const MatchCall& call) {
  constexpr size_t kShared = 4 * kWarps * sizeof(float);
  const LaunchShape shape{blocks, kMatchThreads, 1, kShared};
  const auto launch = [&]<MatchKind kKind>() {
    launch_kernel(kOp, scope, shape, &match_rows<scalar_t, kKind, kGrad>, call);
  };
  switch (in.spec.kind) {
    case MatchKind::kMse:
      return launch.template operator()<MatchKind::kMse>();
    case MatchKind::kSmoothL1:
      return launch.template operator()<MatchKind::kSmoothL1>();
    default:
      return launch.template operator()<MatchKind::kCosine>();
  }
}

// The terms of all layers, and the gradients where there are any.
template <typename scalar_t>
void launch_layers(const LaunchScope& scope, const MatchInputs& in, const Tensor* grad,
                   MatchCall call, const std::vector<MatchLayerPlan>& plans,
                   const std::vector<Span>& spans) {
  float* const terms = call.terms;
  scalar_t* next = grad != nullptr ? static_cast<scalar_t*>(grad->mutable_data_ptr()) : nullptr;
  for (const Span& span : spans) {
    for (int l = span.begin; l < span.end; ++l) {
      call.layers[l - span.begin] = layer_call<scalar_t>(in, l, next, plans[l]);
      if (grad != nullptr) next += in.rows() * in.students[l].size(1);
    }
    call.layer_count = span.end - span.begin;
    const int blocks = plans[span.begin].blocks;
    const bool same =
        std::all_of(plans.begin() + span.begin, plans.begin() + span.end,
                    [&](const MatchLayerPlan& plan) { return plan.blocks == blocks; });
    call.blocks_a_layer = same ? blocks : 0;
    call.terms = terms + span.begin * call.rows;
    if (grad != nullptr) {
      launch_rows<scalar_t, true>(scope, in, span.blocks, call);
    } else {
      launch_rows<scalar_t, false>(scope, in, span.blocks, call);
    }
  }
}

void launch_totals(const LaunchScope& scope, const MatchInputs& in, const Work& work,
                   const bool* mask, float* rows, const std::vector<Span>& spans) {
  const int64_t row_blocks = rows != nullptr ? (in.rows() + kTotalThreads - 1) / kTotalThreads : 0;
  for (const Span& span : spans) {
    TotalsCall call{work.terms + span.begin * in.rows(),
                    mask,
                    rows,
                    work.sums + span.begin,
                    work.weighted + span.begin,
                    work.count,
                    in.rows(),
                    span.end - span.begin,
                    span.begin == 0};
    std::copy(in.weights.begin() + span.begin, in.weights.begin() + span.end, call.weights);
    launch_kernel(kOp, scope, {call.layer_count + 1 + row_blocks, kTotalThreads, 1, kTotalBytes},
                  &match_totals, call);
  }
}

// ---- entries ------------------------------------------------------------------------------------

std::vector<int64_t> checked_widths(const MatchInputs& in) {
  constexpr int64_t kMostColumns = int64_t{1} << 30;  // columns are counted in 32 bits
  constexpr int64_t kMostRows = INT32_MAX - kWarps;   // those too that the last block lacks
  STD_TORCH_CHECK(in.teachers[0].scalar_type() == in.students[0].scalar_type(), kOp,
                  ": teachers must have the dtype of students, got dtype ",
                  static_cast<int>(in.teachers[0].scalar_type()));
  STD_TORCH_CHECK(in.rows() <= kMostRows, kOp, ": students must have at most ", kMostRows,
                  " rows, got ", in.rows());
  std::vector<int64_t> widths;
  for (const Tensor& student : in.students) {
    widths.push_back(student.size(1));
    STD_TORCH_CHECK(widths.back() < kMostColumns, kOp, ": students must be narrower than ",
                    kMostColumns, ", got ", widths.back());
  }
  return widths;
}

// Loss and parts; fills the gradient or the row losses where they are wanted.
std::tuple<Tensor, Tensor> run(const MatchInputs& in, const Tensor* grad,
                               const Tensor* row_losses) {
  const std::vector<int64_t> widths = checked_widths(in);
  const LaunchScope scope(in.students[0]);
  const int64_t rows = in.rows(), layers = in.layers();
  const auto floats = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(in.students[0], size, ScalarType::Float);
  };
  const auto data = [](const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); };
  const Tensor loss = floats({}), parts = floats({layers + 1});
  const Tensor buffer = floats({layers * rows + 2 * layers + 1});
  float* const sums = data(buffer) + layers * rows;
  const Work work{data(buffer), sums, sums + layers, sums + 2 * layers};
  const bool* mask = data_or_null<bool>(in.mask);
  const float* denominator = data_or_null<float>(in.denominator);
  const bool by_count = in.spec.mean && denominator == nullptr;
  const int size = in.students[0].scalar_type() == ScalarType::Float ? 4 : 2;
  const std::vector<MatchLayerPlan> plans = plan_match(rows, widths, size);
  const std::vector<Span> spans = launches_of(plans);

  // Only a gradient has to know the number of rows that count beforehand.
  const bool count_first = grad != nullptr && by_count && mask != nullptr && rows > 0;
  if (count_first) {
    launch_kernel(kOp, scope, {1, kTotalThreads, 1, kTotalBytes}, &match_count, mask, rows,
                  work.count);
  }
  if (rows > 0) {
    dispatch_float(in.students[0].scalar_type(), kOp, "students", [&]<typename scalar_t>() {
      MatchCall call{};
      call.mask = mask;
      call.row_weights = data_or_null<float>(in.row_weights);
      call.denominator = denominator;
      call.count = count_first ? work.count : nullptr;
      call.terms = work.terms;
      call.rows = rows;
      call.scale = by_count ? 1.0f / static_cast<float>(rows) : 1.0f;
      call.beta = static_cast<float>(in.spec.beta);
      call.per_beta = in.spec.beta > 0.0 ? static_cast<float>(1.0 / in.spec.beta) : 0.0f;
      call.per_width = in.spec.kind == MatchKind::kPkd;
      launch_layers<scalar_t>(scope, in, grad, call, plans, spans);
    });
  }
  launch_totals(scope, in, work, mask, row_losses != nullptr ? data(*row_losses) : nullptr, spans);
  launch_kernel(kOp, scope, {1, kWarpSize}, &match_loss,
                LossCall{work.sums, work.weighted, work.count, denominator, data(loss), data(parts),
                         static_cast<int>(layers), in.spec.mean});
  return {loss, parts};
}

std::tuple<Tensor, Tensor, Tensor> hidden_match(const Tensors& students, const Tensors& teachers,
                                                const MaybeTensor& mask,
                                                const MaybeTensor& row_weights,
                                                const MaybeTensor& denominator,
                                                const Numbers& weights, const Numbers& spec) {
  const MatchInputs in =
      checked_match(kOp, students, teachers, mask, row_weights, denominator, weights, spec);
  const Tensor rows = torch::stable::new_empty(students[0], {in.rows()}, ScalarType::Float);
  const auto [loss, parts] = run(in, nullptr, &rows);
  return {loss, parts, rows};
}

std::tuple<Tensor, Tensor, Tensor> hidden_match_grad(const Tensors& students,
                                                     const Tensors& teachers,
                                                     const MaybeTensor& mask,
                                                     const MaybeTensor& row_weights,
                                                     const MaybeTensor& denominator,
                                                     const Numbers& weights, const Numbers& spec) {
  const MatchInputs in =
      checked_match(kOp, students, teachers, mask, row_weights, denominator, weights, spec);
  const Tensor grad = torch::stable::new_empty(students[0], {in.gradient_elements()});
  const auto [loss, parts] = run(in, &grad, nullptr);
  return {loss, parts, grad};
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("hidden_match", TORCH_BOX(&kd::hidden_match));
  m.impl("hidden_match_grad", TORCH_BOX(&kd::hidden_match_grad));
}
