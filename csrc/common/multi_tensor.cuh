// Chunks of lists of tensors on the GPU, a block each; see multi_tensor.h.
#pragma once

#include <type_traits>

#include "common/launch.h"
#include "common/multi_tensor.h"
#include "common/vector.cuh"

namespace kd {

constexpr int kTableThreads = 256;
// Elements that a thread takes at a time: 16 bytes of bfloat16.
constexpr int kTableSize = 8;
static_assert(kTableChunk % kTableSize == 0);

// The table as kernels receive it.
template <typename Row>
struct Table {
  const Row* rows;
  int tensors;

  explicit Table(const Tensor& table)
      : rows(static_cast<const Row*>(table.const_data_ptr())),
        tensors(static_cast<int>(table.size(0))) {}
};

// A chunk of a tensor.
template <typename Row>
struct Chunk {
  Row row;
  int64_t first, end;

  __device__ __forceinline__ Chunk(const Table<Row>& table, int64_t chunk) {
    int low = 0, high = table.tensors - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (table.rows[middle].chunks_end > chunk) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    row = table.rows[low];
    const int64_t chunks = (row.size + kTableChunk - 1) / kTableChunk;
    first = (chunk - (row.chunks_end - chunks)) * kTableChunk;
    end = row.size < first + kTableChunk ? row.size : first + kTableChunk;
  }
};

// Whether vectors of tensors at these addresses lie on 16-byte boundaries (no tensor: 0).
template <typename... Addresses>
__device__ __forceinline__ bool all_aligned(Addresses... addresses) {
  return ((addresses | ...) & (kVectorBytes - 1)) == 0;
}

// Eight elements from p on; those behind `count` are 0.
template <typename T>
__device__ __forceinline__ void load_eight(const T* p, int count, bool aligned,
                                           float (&x)[kTableSize]) {
  constexpr int kStep = kVectorSize<T>;
  if (aligned && count == kTableSize) {
#pragma unroll
    for (int i = 0; i < kTableSize; i += kStep) {
      float part[kStep];
      unpack<T>(load_16(p + i), part);
#pragma unroll
      for (int k = 0; k < kStep; ++k) x[i + k] = part[k];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kTableSize; ++i) x[i] = i < count ? static_cast<float>(p[i]) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void store_eight(T* p, int count, bool aligned,
                                            const float (&x)[kTableSize]) {
  constexpr int kStep = kVectorSize<T>;
  if (aligned && count == kTableSize) {
#pragma unroll
    for (int i = 0; i < kTableSize; i += kStep) {
      float part[kStep];
#pragma unroll
      for (int k = 0; k < kStep; ++k) part[k] = x[i + k];
      store_16(p + i, pack<T>(part));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kTableSize; ++i) {
    if (i < count) p[i] = static_cast<T>(x[i]);
  }
}

// What a float becomes as T.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return static_cast<float>(static_cast<T>(x));
}

inline LaunchShape table_shape(const char* op, int64_t chunks) {
  STD_TORCH_CHECK(chunks <= INT32_MAX, op, ": tensors must have at most ", INT32_MAX,
                  " chunks, got ", chunks);
  return {chunks, kTableThreads};
}

// Calls body.operator()<T>() for a dtype; void for none.
template <typename Body>
void with_dtype(TableDtype dtype, const Body& body) {
  switch (dtype) {
    case TableDtype::kFloat:
      return body.template operator()<float>();
    case TableDtype::kBf16:
      return body.template operator()<bf16_t>();
    case TableDtype::kHalf:
      return body.template operator()<half_t>();
    case TableDtype::kNone:
      return body.template operator()<void>();
  }
}

}  // namespace kd
