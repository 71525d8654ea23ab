// scale_grad_ on the CPU: grad *= scale, and nothing at all when scale is 1.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/check.h"
#include "common/isa.h"

#define KD_PER_ISA_FILE "scale_grad/scale_grad_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "scale_grad";
constexpr int64_t kGrain = 1 << 16;  // elements worth a thread

// Rows by a function that scales `count` elements from a row's start.
template <typename Scale>
void scale_rows(const Tensor& grad, int64_t element_bytes, const Scale& scale) {
  const int64_t rows = grad.size(0), columns = grad.size(1);
  char* data = static_cast<char*>(grad.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      scale(data + row * grad.stride(0) * element_bytes, columns);
    }
  });
}

void scale_grad_(Tensor grad,            // [rows, columns], unit column stride
                 const Tensor& scale) {  // [] float32 or float64
  check_rows(grad, kOp, "grad");
  STD_TORCH_CHECK(scale.numel() == 1, kOp, ": scale must have one element, got ", scale.numel());
  STD_TORCH_CHECK(
      scale.scalar_type() == ScalarType::Double || scale.scalar_type() == ScalarType::Float, kOp,
      ": scale must be float32 or float64, got dtype ", static_cast<int>(scale.scalar_type()));
  const double factor = scale.scalar_type() == ScalarType::Double
                            ? *static_cast<const double*>(scale.const_data_ptr())
                            : *static_cast<const float*>(scale.const_data_ptr());
  if (factor == 1.0) return;
  if (grad.scalar_type() == ScalarType::Double) {
    return scale_rows(grad, 8, [factor](char* row, int64_t count) {
      double* g = reinterpret_cast<double*>(row);
      for (int64_t i = 0; i < count; ++i) g[i] *= factor;
    });
  }
  const auto scale_row = KD_BEST_ISA(scale_function)(grad.scalar_type());
  scale_rows(grad, grad.scalar_type() == ScalarType::Float ? 4 : 2,
             [&](char* row, int64_t count) { scale_row(row, count, static_cast<float>(factor)); });
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("scale_grad_", TORCH_BOX(&kd::scale_grad_)); }
