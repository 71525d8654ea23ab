// interchange on the GPU: a warp takes a piece of one position, 16 bytes a load, and looks up for
// itself where it comes from. One launch a tensor that is written.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/check.h"
#include "common/launch.h"
#include "common/vector.cuh"
#include "interchange/interchange.h"

namespace kd {

namespace {

constexpr const char* kOp = "interchange";
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = 4;  // of a block; none waits for another
constexpr int kThreads = kWarps * 32;
constexpr int kBlocksAnSm = 8;  // 64 registers a thread: ptxas spills rather than use more than 48
constexpr int kVectors = 4;     // of a lane, all in flight at a time
constexpr int kPiece = 32 * kVectors;

// The positions of a tensor, cut into pieces of kPiece vectors. These lie on the 16-byte
// boundaries of what is written, so the first may begin before column 0.
template <typename scalar_t>
struct alignas(16) Pieces {
  int64_t positions;
  int pieces;  // of a position

  Pieces(int64_t positions_, const States<scalar_t>& out, int64_t hidden) : positions(positions_) {
    constexpr int kSize = kVectorSize<scalar_t>;
    const bool aligned =
        misalignment(out.data) == 0 && out.row_stride % kSize == 0 && out.stride % kSize == 0;
    const int64_t vectors = (hidden + (aligned ? 0 : kSize - 1) + kSize - 1) / kSize;
    pieces = static_cast<int>((vectors + kPiece - 1) / kPiece);
  }

  LaunchShape shape() const { return {(positions * pieces + kWarps - 1) / kWarps, kThreads}; }
};

// Columns of a row that are made alike: a, or a + sign * b, or 0.
template <typename scalar_t>
struct Segment {
  const scalar_t* a;  // null: zeros
  const scalar_t* b;  // null: a alone
  float sign;
  int begin, end;
};

template <typename scalar_t>
__device__ __forceinline__ uint4 add_vectors(uint4 a, uint4 b, float sign) {
  constexpr int kSize = kVectorSize<scalar_t>;
  float x[kSize], y[kSize];
  unpack<scalar_t>(a, x);
  unpack<scalar_t>(b, y);
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = fmaf(sign, y[i], x[i]);  // exact products
  return pack<scalar_t>(x);
}

// The vectors of a lane, kSize columns each, from `first` on, 32 vectors apart.
template <typename scalar_t>
__device__ __forceinline__ void write_segment(scalar_t* out, const Segment<scalar_t>& s, int first,
                                              int shift) {
  constexpr int kSize = kVectorSize<scalar_t>;
  const bool aligned = (s.a == nullptr || misalignment(s.a) == shift) &&
                       (s.b == nullptr || misalignment(s.b) == shift);
  uint4 x[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int k = first + 32 * kSize * j;
    x[j] = make_uint4(0, 0, 0, 0);
    if (aligned && s.a != nullptr && k >= s.begin && k + kSize <= s.end) x[j] = load_16(s.a + k);
  }
  if (s.b != nullptr) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int k = first + 32 * kSize * j;
      if (aligned && k >= s.begin && k + kSize <= s.end) {
        x[j] = add_vectors<scalar_t>(x[j], load_16(s.b + k), s.sign);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int k = first + 32 * kSize * j;
    if (k + kSize <= s.begin || k >= s.end) continue;
    if (aligned && k >= s.begin && k + kSize <= s.end) {
      store_16(out + k, x[j]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (k + i < s.begin || k + i >= s.end) continue;
      scalar_t value = s.a == nullptr ? static_cast<scalar_t>(0.0f) : s.a[k + i];
      if (s.b != nullptr) {
        value = static_cast<scalar_t>(
            fmaf(s.sign, static_cast<float>(s.b[k + i]), static_cast<float>(value)));
      }
      out[k + i] = value;
    }
  }
}

// Aligned, as are the parameters of a launch: copies of it move 16 bytes.
template <typename scalar_t>
struct alignas(16) SwapCall {
  States<const scalar_t> base, source;
  States<scalar_t> out;
  SwapIndex index;
  SwapSizes sizes;
  SwapMode mode;
  int begin, end;  // columns
  bool in_place;
};

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    swap_positions(const SwapCall<scalar_t> call, const Pieces<scalar_t> work) {
  constexpr int kSize = kVectorSize<scalar_t>;
  const SwapSizes& n = call.sizes;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (item >= work.positions * work.pieces) return;
  const int64_t position = item / work.pieces;
  const int64_t batch = position / n.seq, at = position % n.seq;
  const int64_t found = call.index.source_of(n, batch, at);
  if (call.in_place && found < 0) return;
  const int hidden = static_cast<int>(n.hidden);
  const scalar_t* base = call.base.at(batch, at);
  scalar_t* out = call.out.at(batch, at);
  const scalar_t* source = nullptr;
  if (found >= 0 && call.mode != SwapMode::kClear) {
    source = call.source.at(found / n.positions, found % n.positions);
  }
  const bool sums = call.mode == SwapMode::kAdd || call.mode == SwapMode::kSubtract;
  const int shift = misalignment(out);
  const int first = static_cast<int>(item % work.pieces) * kPiece * kSize - shift +
                    static_cast<int>(threadIdx.x % 32) * kSize;
  const int begin = found < 0 ? hidden : call.begin, end = found < 0 ? hidden : call.end;
  if (!call.in_place) write_segment<scalar_t>(out, {base, nullptr, 0.0f, 0, begin}, first, shift);
  if (begin < end) {
    const float sign = call.mode == SwapMode::kAdd ? 1.0f : -1.0f;
    write_segment<scalar_t>(out, {sums ? base : source, sums ? source : nullptr, sign, begin, end},
                            first, shift);
  }
  if (!call.in_place && end < hidden) {
    write_segment<scalar_t>(out, {base, nullptr, 0.0f, end, hidden}, first, shift);
  }
}

template <typename scalar_t>
struct alignas(16) GradCall {
  States<const scalar_t> grad;
  States<scalar_t> out;
  SwapIndex index;
  SwapSizes sizes;
  float sign;
  int begin, end;  // columns
};

// Adds the columns [begin, end) of a row to the lane's vectors.
template <typename scalar_t>
__device__ __forceinline__ void add_row(const scalar_t* row, int begin, int end, int first,
                                        int shift, float (&sums)[kVectors][kVectorSize<scalar_t>]) {
  constexpr int kSize = kVectorSize<scalar_t>;
  const bool aligned = misalignment(row) == shift;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int k = first + 32 * kSize * j;
    if (aligned && k >= begin && k + kSize <= end) {
      float x[kSize];
      unpack<scalar_t>(load_16(row + k), x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[j][i] += x[i];
      continue;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (k + i >= begin && k + i < end) sums[j][i] += static_cast<float>(row[k + i]);
    }
  }
}

// A warp owns a piece of a position of the source and walks over those that read it in their
// order: no atomics, the same bits every time.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    collect_positions(const GradCall<scalar_t> call, const Pieces<scalar_t> work) {
  constexpr int kSize = kVectorSize<scalar_t>;
  const SwapSizes& n = call.sizes;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (item >= work.positions * work.pieces) return;
  const int lane = threadIdx.x % 32;
  const int64_t place = item / work.pieces;
  const int64_t row = place / n.positions, at = place % n.positions;
  scalar_t* out = call.out.at(row, at);
  const int shift = misalignment(out);
  const int first = static_cast<int>(item % work.pieces) * kPiece * kSize - shift + lane * kSize;
  float sums[kVectors][kSize] = {};
  // Those of a turned map, or spans, which may or may not read; the lanes look at 32 of them.
  const int64_t *order = call.index.order, *list = call.index.first;
  const int64_t last = order == nullptr ? n.batch : list[place + 1];
  for (int64_t i = order == nullptr ? 0 : list[place]; i < last; i += 32) {
    int reader = -1;  // a position of the base
    if (i + lane < last) {
      if (order != nullptr) {
        reader = static_cast<int>(order[i + lane]);
      } else if (call.index.reads(i + lane, row)) {
        const int64_t target = call.index.target_of(n, i + lane, at);
        if (target >= 0) reader = static_cast<int>((i + lane) * n.seq + target);
      }
    }
    for (unsigned hits = __ballot_sync(kAllLanes, reader >= 0); hits != 0; hits &= hits - 1) {
      const int from = __shfl_sync(kAllLanes, reader, __ffs(hits) - 1);
      const int seq = static_cast<int>(n.seq);
      add_row<scalar_t>(call.grad.at(from / seq, from % seq), call.begin, call.end, first, shift,
                        sums);
    }
  }
  const int hidden = static_cast<int>(n.hidden);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int k = first + 32 * kSize * j;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums[j][i] *= call.sign;
    if (k >= 0 && k + kSize <= hidden) {
      store_16(out + k, pack<scalar_t>(sums[j]));
      continue;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (k + i >= 0 && k + i < hidden) out[k + i] = static_cast<scalar_t>(sums[j][i]);
    }
  }
}

template <typename scalar_t>
States<const scalar_t> states_of(const Tensor& x) {
  return {static_cast<const scalar_t*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

template <typename scalar_t>
States<scalar_t> written_states(Tensor& x) {
  return {static_cast<scalar_t*>(x.mutable_data_ptr()), x.stride(0), x.stride(1)};
}

// Without a source: zeros go where it would.
void launch_swap(const SwapSizes& n, const Tensor& base, const Tensor* source, Tensor& out,
                 const std::vector<Tensor>& index, SwapMode mode, int64_t begin, int64_t end,
                 bool in_place) {
  const SwapIndex from = swap_index(kOp, index, n, false);
  if (n.batch * n.seq * n.hidden == 0) return;
  const LaunchScope scope(base);
  dispatch_float(base.scalar_type(), kOp, "base", [&]<typename scalar_t>() {
    SwapCall<scalar_t> call{
        {}, {}, {}, from, n, mode, static_cast<int>(begin), static_cast<int>(end), in_place};
    call.base = states_of<scalar_t>(base);
    if (source != nullptr) call.source = states_of<scalar_t>(*source);
    call.out = written_states<scalar_t>(out);
    const Pieces<scalar_t> work(n.batch * n.seq, call.out, n.hidden);
    launch_kernel(kOp, scope, work.shape(), &swap_positions<scalar_t>, call, work);
  });
}

Tensor interchange(const Tensor& base, const Tensor& source, const std::vector<Tensor>& index,
                   int64_t mode, int64_t begin, int64_t end) {
  const SwapSizes n = check_swap(kOp, base, source, mode, begin, end);
  Tensor out = torch::stable::new_empty(base, {n.batch, n.seq, n.hidden});
  launch_swap(n, base, &source, out, index, static_cast<SwapMode>(mode), begin, end, false);
  return out;
}

void interchange_(Tensor base, const Tensor& source, const std::vector<Tensor>& index, int64_t mode,
                  int64_t begin, int64_t end) {
  const SwapSizes n = check_swap(kOp, base, source, mode, begin, end);
  launch_swap(n, base, &source, base, index, static_cast<SwapMode>(mode), begin, end, true);
}

Tensor interchange_grad_base(const Tensor& grad, const std::vector<Tensor>& index, int64_t rows,
                             int64_t positions, int64_t begin, int64_t end) {
  const SwapSizes n = check_gradient(kOp, grad, rows, positions, begin, end);
  Tensor out = torch::stable::new_empty(grad, {n.batch, n.seq, n.hidden});
  launch_swap(n, grad, nullptr, out, index, SwapMode::kClear, begin, end, false);
  return out;
}

Tensor interchange_grad_source(const Tensor& grad, const std::vector<Tensor>& index, int64_t rows,
                               int64_t positions, bool negative, int64_t begin, int64_t end) {
  const SwapSizes n = check_gradient(kOp, grad, rows, positions, begin, end);
  const SwapIndex from = swap_index(kOp, index, n, true);
  Tensor out = torch::stable::new_empty(grad, {rows, positions, n.hidden});
  STD_TORCH_CHECK(n.batch * n.seq <= INT32_MAX, kOp, ": base must have at most ", INT32_MAX,
                  " positions, got ", n.batch * n.seq);
  if (rows * positions * n.hidden == 0) return out;
  const LaunchScope scope(grad);
  dispatch_float(grad.scalar_type(), kOp, "grad", [&]<typename scalar_t>() {
    const GradCall<scalar_t> call{
        states_of<scalar_t>(grad), written_states<scalar_t>(out), from, n, negative ? -1.0f : 1.0f,
        static_cast<int>(begin),   static_cast<int>(end)};
    const Pieces<scalar_t> work(rows * positions, call.out, n.hidden);
    launch_kernel(kOp, scope, work.shape(), &collect_positions<scalar_t>, call, work);
  });
  return out;
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("interchange", TORCH_BOX(&kd::interchange));
  m.impl("interchange_", TORCH_BOX(&kd::interchange_));
  m.impl("interchange_grad_base", TORCH_BOX(&kd::interchange_grad_base));
  m.impl("interchange_grad_source", TORCH_BOX(&kd::interchange_grad_source));
}
