// Uninitialised CPU tensors without the boxed dispatcher call of torch::stable::new_empty, which
// takes longer than a whole row of a small loss.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>

namespace kd {

// A contiguous CPU tensor of the given sizes.
template <size_t N>
torch::stable::Tensor empty_cpu(const std::array<int64_t, N>& sizes,
                                torch::headeronly::ScalarType dtype) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t i = N; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      N, sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace kd
