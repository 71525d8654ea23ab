// scale_grad_ on the CPU: grad *= scale, and nothing at all when scale is 1.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/dispatch.h"

namespace kd {

namespace {

constexpr const char* kOp = "scale_grad";
constexpr int64_t kGrain = 1 << 16;  // elements worth a thread

template <typename scalar_t, typename acc_t>
void scale_rows(scalar_t* grad, int64_t rows, int64_t columns, int64_t stride, acc_t scale) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      scalar_t* g = grad + row * stride;
      for (int64_t i = 0; i < columns; ++i) {
        g[i] = static_cast<scalar_t>(static_cast<acc_t>(g[i]) * scale);
      }
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
  void* data = grad.mutable_data_ptr();
  if (grad.scalar_type() == ScalarType::Double) {
    return scale_rows(static_cast<double*>(data), grad.size(0), grad.size(1), grad.stride(0),
                      factor);
  }
  dispatch_float(grad.scalar_type(), kOp, "grad", [&]<typename scalar_t>() {
    scale_rows(static_cast<scalar_t*>(data), grad.size(0), grad.size(1), grad.stride(0),
               static_cast<float>(factor));
  });
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("scale_grad_", TORCH_BOX(&kd::scale_grad_)); }
