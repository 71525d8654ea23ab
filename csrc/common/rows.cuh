// Rows of a matrix on the GPU, read and written 16 bytes at a time.
#pragma once

#include "common/vector.cuh"

namespace kd {

constexpr float kMinusInf = -__builtin_huge_valf();

template <typename T>
struct Matrix {
  T* data;  // null: none
  int64_t stride;
};

// A row of a matrix, and whether its vectors lie on 16-byte boundaries like those that are walked.
template <typename T>
struct RowView {
  T* data;
  bool aligned;

  __device__ __forceinline__ RowView(T* row, int shift)
      : data(row), aligned(misalignment(row) == shift) {}
  __device__ __forceinline__ RowView(const Matrix<T>& matrix, int64_t row, int shift)
      : RowView(matrix.data + row * matrix.stride, shift) {}
};

// The columns [first, first + kVectorSize) of a row; outside of [0, columns) what adds nothing: of
// logits -inf.
template <typename scalar_t>
__device__ __forceinline__ uint4 load_vector(const RowView<const scalar_t>& row, int first,
                                             int columns, float outside = kMinusInf) {
  constexpr int kSize = kVectorSize<scalar_t>;
  if (row.aligned && first >= 0 && first + kSize <= columns) {
    return *reinterpret_cast<const uint4*>(row.data + first);
  }
  float x[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int k = first + i;
    x[i] = 0 <= k && k < columns ? static_cast<float>(row.data[k]) : outside;
  }
  return pack<scalar_t>(x);
}

template <typename scalar_t>
__device__ __forceinline__ void store_vector(const RowView<scalar_t>& row, int first, int columns,
                                             const float (&x)[kVectorSize<scalar_t>]) {
  constexpr int kSize = kVectorSize<scalar_t>;
  if (row.aligned && first >= 0 && first + kSize <= columns) {
    store_16(row.data + first, pack<scalar_t>(x));
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int k = first + i;
    if (0 <= k && k < columns) row.data[k] = static_cast<scalar_t>(x[i]);
  }
}

}  // namespace kd
