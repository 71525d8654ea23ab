// scale_grad_ on the GPU: grad *= scale. The scale is read on the device, and where it is 1, which
// is the usual case, the kernel ends at once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "common/check.h"
#include "common/launch.h"
#include "common/vector.cuh"

namespace kd {

namespace {

constexpr const char* kOp = "scale_grad";
constexpr int kThreads = 256;
constexpr int kBlocksAnSm = 8;

template <typename scalar_t, typename scale_t>
__global__ void __launch_bounds__(kThreads)
    scale_rows(scalar_t* grad,  // [rows, columns]
               int64_t rows, int64_t columns, int64_t stride,
               int blocks_a_row,  // which share a row; there may be fewer such groups than rows
               const scale_t* scale) {  // []
  constexpr int kSize = kVectorSize<scalar_t>;
  const float factor = static_cast<float>(*scale);
  if (factor == 1.0f) return;
  const int groups = gridDim.x / blocks_a_row;
  const int64_t step = static_cast<int64_t>(blocks_a_row) * blockDim.x;
  const int64_t start = static_cast<int64_t>(blockIdx.x % blocks_a_row) * blockDim.x + threadIdx.x;
  for (int64_t r = blockIdx.x / blocks_a_row; r < rows; r += groups) {
    scalar_t* row = grad + r * stride;
    // Vectors on 16-byte boundaries; the first may begin before the row, the last end behind it.
    const int shift = misalignment(row);
    for (int64_t first = start * kSize - shift; first < columns; first += step * kSize) {
      if (first >= 0 && first + kSize <= columns) {
        float x[kSize];
        unpack<scalar_t>(*reinterpret_cast<const uint4*>(row + first), x);
#pragma unroll
        for (int i = 0; i < kSize; ++i) x[i] *= factor;
        store_16(row + first, pack<scalar_t>(x));
      } else {
        for (int i = 0; i < kSize; ++i) {
          const int64_t k = first + i;
          if (k < 0 || k >= columns) continue;
          row[k] = static_cast<scalar_t>(static_cast<float>(row[k]) * factor);
        }
      }
    }
  }
}

void scale_grad_(Tensor grad,            // [rows, columns], unit column stride
                 const Tensor& scale) {  // [] float32 or float64
  check_rows(grad, kOp, "grad");
  const bool wide = scale.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(scale.numel() == 1, kOp, ": scale must have one element, got ", scale.numel());
  STD_TORCH_CHECK(wide || scale.scalar_type() == ScalarType::Float, kOp,
                  ": scale must be float32 or float64, got dtype ",
                  static_cast<int>(scale.scalar_type()));
  int64_t rows = grad.size(0), columns = grad.size(1);
  if (rows == 0 || columns == 0) return;
  if (rows == 1 || grad.stride(0) == columns) {  // one long row
    columns *= rows;
    rows = 1;
  }
  const LaunchScope scope(grad);
  dispatch_float(grad.scalar_type(), kOp, "grad", [&]<typename scalar_t>() {
    constexpr int64_t kBlockElements = kThreads * kVectorSize<scalar_t>;
    const int64_t most =
        int64_t{kBlocksAnSm} * scope.attribute(cudaDevAttrMultiProcessorCount, kOp);
    const int64_t a_row = std::min(columns / kBlockElements + 1, most);
    const int64_t groups = std::min(rows, most / a_row);
    const LaunchShape shape{groups * a_row, kThreads};
    const auto launch = [&]<typename scale_t>() {
      launch_kernel(kOp, scope, shape, &scale_rows<scalar_t, scale_t>,
                    static_cast<scalar_t*>(grad.mutable_data_ptr()), rows, columns, grad.stride(0),
                    static_cast<int>(a_row), static_cast<const scale_t*>(scale.const_data_ptr()));
    };
    return wide ? launch.template operator()<double>() : launch.template operator()<float>();
  });
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("scale_grad_", TORCH_BOX(&kd::scale_grad_));
}
