// topk_logprobs on the GPU. One block takes a row and reads it twice:
//
// 1. Each thread finds the maxima of four groups of logits. At least k logits are not smaller than
//    the k-th largest of these maxima, and hardly more are: those are the candidates.
// 2. Candidates are collected in shared memory, the exponentials of all others are summed up as
// what
//    is left. Then the candidates are sorted.
//
// Should there be more candidates than shared memory holds (ties, or a row in which the largest
// logits share groups), the bound is raised by bisection, one reading of the row a step. Logits and
// ids make one whole number, larger for larger logits and for smaller ids: no two are equal, so the
// bisection ends, and the order in which threads collect candidates is lost in sorting.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/launch.h"
#include "common/logits.cuh"
#include "common/reduce.cuh"
#include "topk_logprobs/topk_logprobs.h"

namespace kd {

namespace {

constexpr const char* kOp = "topk_logprobs";
constexpr int kMostThreads = 512;
constexpr int kGroups = 4;  // of a thread
constexpr int kMostK = 1024;
constexpr uint32_t kDeadKey = 0x007fffffu;  // of -inf

// What the kernel receives.
template <typename scalar_t>
struct TopkCall {
  Matrix<const scalar_t> x;  // [rows, >= classes]
  int64_t* ids;              // [rows, k]
  float* logprobs;           // [rows, k]
  float* tail;               // [rows]
  int classes, k, capacity;  // candidates that shared memory holds, a power of two
  LogitRule rule;
};

// What threads exchange.
struct alignas(16) Numbers {
  float max = kMinusInf;
  float sum = 0.0f;
  float unused[2] = {};
};

__device__ __forceinline__ Numbers across_warp(Numbers n) {
  return {warp_max(n.max), warp_sum(n.sum)};
}

// Whole numbers in the order of floats, and back. Both zeros are one.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t word = __float_as_uint(x + 0.0f);
  return word ^ (word >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ uint64_t candidate(uint32_t key, uint32_t id) {
  return static_cast<uint64_t>(key) << 32 | (0xffffffffu - id);
}

template <typename scalar_t>
class TopkRow {
 public:
  static constexpr int kSize = kVectorSize<scalar_t>;

  __device__ __forceinline__ TopkRow(const TopkCall<scalar_t>& call, int64_t row)
      : call_(call),
        shift_(misalignment(call.x.data + row * call.x.stride)),
        view_(call.x, row, shift_),
        vectors_((call.classes + shift_ + kSize - 1) / kSize),
        candidates_(reinterpret_cast<uint64_t*>(dynamic_shared())),
        spaces_(dynamic_shared() + sizeof(uint64_t) * call.capacity),
        count_(reinterpret_cast<unsigned*>(spaces_ + 2 * space_bytes())) {}

  __device__ void run(int64_t row) {
    float groups[kGroups];
    look_ahead(groups);
    uint64_t bound = first_bound(groups);
    float rest = 0.0f;
    int count = collect(bound, &rest);
    if (count > call_.capacity) {
      bound = raised(bound);
      count = collect(bound, &rest);
    }
    sort(count);
    write(row, count, rest);
  }

 private:
  // Of the exchange of a reduction.
  __device__ static __forceinline__ int space_bytes() {
    return sizeof(Numbers) * (blockDim.x / kWarpSize + 1);
  }

  // Combines over the block. One space may be read still while the other is written.
  __device__ __forceinline__ Numbers reduce(Numbers n) {
    const ReduceSpace<Numbers> space(spaces_ + turn_ * space_bytes());
    turn_ = 1 - turn_;
    return reduce_row(n, Numbers{}, space, 0, 1, [](Numbers v) { return across_warp(v); });
  }

  // Calls body(first class, logits) for the vectors of this thread, -inf outside of the classes.
  template <typename Body>
  __device__ __forceinline__ void each(const Body& body) const {
    const int step = static_cast<int>(blockDim.x);
    int vector = static_cast<int>(threadIdx.x);
    if (vector >= vectors_) return;
    uint4 next = load_vector(view_, vector * kSize - shift_, call_.classes);
    for (; vector < vectors_; vector += step) {
      const uint4 now = next;
      if (vector + step < vectors_) {
        next = load_vector(view_, (vector + step) * kSize - shift_, call_.classes);
      }
      float x[kSize];
      unpack<scalar_t>(now, x);
      body(vector * kSize - shift_, x);
    }
  }

  __device__ __forceinline__ void look_ahead(float (&groups)[kGroups]) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) groups[i] = kMinusInf;
    each([&](int, const float (&x)[kSize]) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) groups[i % kGroups] = fmaxf(groups[i % kGroups], x[i]);
    });
    Numbers n;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) n.max = fmaxf(n.max, groups[i]);
    largest_ = reduce(n).max;
    float z[1] = {largest_};
    to_z(call_.rule, z);
    max_ = z[0] == kMinusInf ? 0.0f : z[0];
  }

  // Of `low`, above which there are at least k, and `high`, above which there are none, makes the
  // largest bound above which there are at least k, or one above which there are at most `enough`.
  template <typename Number, typename Above>
  __device__ __forceinline__ Number search(Number low, Number high, int enough,
                                           const Above& above) {
    while (high - low > 1) {
      const Number middle = low + (high - low) / 2;
      Numbers n;
      n.sum = above(middle);  // exact up to 2^24, and beyond that too many
      const float found = reduce(n).sum;
      if (found >= static_cast<float>(call_.k)) {
        low = middle;
        if (found <= static_cast<float>(enough)) break;
      } else {
        high = middle;
      }
    }
    return low;
  }

  __device__ __forceinline__ uint64_t first_bound(const float (&groups)[kGroups]) {
    uint32_t keys[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) keys[i] = key_of(groups[i]);
    // A few candidates more take less time than steps of the bisection.
    const int enough = call_.k + call_.k / 8;
    const uint32_t low = search(kDeadKey, key_of(largest_), enough, [&](uint32_t bound) {
      float found = 0.0f;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) found += keys[i] > bound ? 1.0f : 0.0f;
      return found;
    });
    return candidate(low, 0);
  }

  __device__ __forceinline__ uint64_t raised(uint64_t low) {
    return search(low, candidate(key_of(largest_), 0), call_.capacity, [&](uint64_t bound) {
      const float value = value_of(static_cast<uint32_t>(bound >> 32));
      float found = 0.0f;
      each([&](int first, const float (&x)[kSize]) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          if (x[i] >= value && candidate(key_of(x[i]), first + i) > bound) found += 1.0f;
        }
      });
      return found;
    });
  }

  // Collects the candidates above the bound, as many as there is room for, and sums up the
  // exponentials of the others. Returns the number of candidates.
  __device__ __forceinline__ int collect(uint64_t bound, float* rest) {
    if (threadIdx.x == 0) *count_ = 0;
    __syncthreads();
    const float value = value_of(static_cast<uint32_t>(bound >> 32));
    float sum = 0.0f;
    each([&](int first, const float (&x)[kSize]) {
      float z[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) z[i] = x[i];
      to_z(call_.rule, z);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (x[i] >= value) {
          const uint64_t found = candidate(key_of(x[i]), first + i);
          if (found > bound) {
            const unsigned at = atomicAdd(count_, 1u);
            if (at < static_cast<unsigned>(call_.capacity)) candidates_[at] = found;
            continue;
          }
        }
        sum += exp2_approx(exponent(call_.rule, z[i], max_));
      }
    });
    __syncthreads();
    *rest = sum;
    return static_cast<int>(*count_);
  }

  // Largest first, by a bitonic network.
  __device__ __forceinline__ void sort(int count) {
    int n = 1;
    while (n < count) n *= 2;
    for (int i = count + threadIdx.x; i < n; i += blockDim.x) candidates_[i] = 0;
    __syncthreads();
    for (int size = 2; size <= n; size *= 2) {
      for (int apart = size / 2; apart > 0; apart /= 2) {
        for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
          const int one = 2 * i - (i & (apart - 1));
          const int other = one + apart;
          const uint64_t a = candidates_[one], b = candidates_[other];
          if ((a < b) == ((one & size) == 0)) {
            candidates_[one] = b;
            candidates_[other] = a;
          }
        }
        __syncthreads();
      }
    }
  }

  // The exponent of 2 of a candidate.
  __device__ __forceinline__ float exponent_of(uint64_t found) const {
    float z[1] = {value_of(static_cast<uint32_t>(found >> 32))};
    to_z(call_.rule, z);
    return exponent(call_.rule, z[0], max_);
  }

  __device__ __forceinline__ void write(int64_t row, int count, float rest) {
    const int k = call_.k;
    float chosen = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      (i < k ? chosen : rest) += exp2_approx(exponent_of(candidates_[i]));
    }
    Numbers n;
    n.sum = chosen;
    chosen = reduce(n).sum;
    n.sum = rest;
    rest = reduce(n).sum;
    const float total = chosen + rest;
    const float log_total = log2_approx(total);
    for (int i = threadIdx.x; i < k; i += blockDim.x) {
      const bool found = i < count;
      const uint64_t one = found ? candidates_[i] : 0;
      call_.ids[row * k + i] = found ? 0xffffffffu - static_cast<uint32_t>(one) : int64_t{-1};
      call_.logprobs[row * k + i] = found ? kLn2 * (exponent_of(one) - log_total) : kMinusInf;
    }
    // Without a live class nothing is left; of NaN everything is NaN.
    if (threadIdx.x == 0) call_.tail[row] = total == 0.0f ? 0.0f : rest / total;
  }

  const TopkCall<scalar_t>& call_;
  const int shift_;  // elements of the first vector that lie before the row
  const RowView<const scalar_t> view_;
  const int vectors_;
  uint64_t* const candidates_;
  char* const spaces_;  // two
  unsigned* const count_;
  int turn_ = 0;
  float largest_ = 0.0f;  // logit
  float max_ = 0.0f;      // its z, which exponentials are relative to
};

template <typename scalar_t>
__global__ void __launch_bounds__(kMostThreads, 2) topk_rows(const TopkCall<scalar_t> call) {
  const int64_t row = blockIdx.x;
  TopkRow<scalar_t>(call, row).run(row);
}

// The groups of a full block give about 1420 candidates for k = 1024, 66 for k = 64.
int capacity_of(int k) {
  int capacity = 512;
  while (capacity < 4 * k) capacity *= 2;
  return capacity;
}

template <typename scalar_t>
void launch_rows(const LaunchScope& scope, int64_t rows, const TopkCall<scalar_t>& call) {
  const int vectors = call.classes / kVectorSize<scalar_t> + 2;
  const int warps = std::min(vectors / kWarpSize + 1, kMostThreads / kWarpSize);
  const size_t shared = sizeof(uint64_t) * call.capacity + 2 * sizeof(Numbers) * (warps + 1) + 16;
  const LaunchShape shape{rows, warps * kWarpSize, 1, shared};
  launch_kernel(kOp, scope, shape, &topk_rows<scalar_t>, call);
}

std::tuple<Tensor, Tensor, Tensor> topk_logprobs(Tensor x,  // [rows, columns]
                                                 int64_t k, std::vector<double> numbers) {
  check_rows(x, kOp, "x");
  STD_TORCH_CHECK(numbers.size() == kTopkSpecNumbers, kOp, ": spec must have ", kTopkSpecNumbers,
                  " numbers, got ", numbers.size());
  constexpr int64_t kMostColumns = int64_t{1} << 30;  // columns are counted in 32 bits
  const int64_t rows = x.size(0), columns = x.size(1);
  const TopkSpec spec = make_topk_spec(numbers, columns);
  STD_TORCH_CHECK(1 <= spec.classes && spec.classes <= columns && columns < kMostColumns, kOp,
                  ": x must have at least ", spec.classes, " and below ", kMostColumns,
                  " classes, got ", columns);
  STD_TORCH_CHECK(1 <= k && k <= std::min<int64_t>(spec.classes, kMostK), kOp,
                  ": k must be in [1, ", std::min<int64_t>(spec.classes, kMostK), "], got ", k);
  STD_TORCH_CHECK(rows <= INT32_MAX, kOp, ": x must have at most ", INT32_MAX, " rows, got ", rows);
  const LaunchScope scope(x);
  Tensor ids = torch::stable::new_empty(x, {rows, k}, ScalarType::Long);
  Tensor logprobs = torch::stable::new_empty(x, {rows, k}, ScalarType::Float);
  Tensor tail = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  if (rows > 0) {
    dispatch_float(x.scalar_type(), kOp, "x", [&]<typename scalar_t>() {
      launch_rows<scalar_t>(scope, rows,
                            {{static_cast<const scalar_t*>(x.const_data_ptr()), x.stride(0)},
                             static_cast<int64_t*>(ids.mutable_data_ptr()),
                             static_cast<float*>(logprobs.mutable_data_ptr()),
                             static_cast<float*>(tail.mutable_data_ptr()),
                             static_cast<int>(spec.classes),
                             static_cast<int>(k),
                             capacity_of(static_cast<int>(k)),
                             logit_rule(spec.scale, spec.softcap, spec.temperature)});
    });
  }
  return {ids, logprobs, tail};
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("topk_logprobs", TORCH_BOX(&kd::topk_logprobs));
}
