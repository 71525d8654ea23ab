// Memory for large results of CPU kernels, reused from call to call.
//
// The system allocator hands blocks of more than 32 MB back to the kernel at once, so a gradient
// that is freed every step would be page-faulted in again every step: at 512 x 32000 float32 that
// took 18 of 24 ms. This keeps the last freed blocks, as the CUDA allocator of torch does.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace kd {

// An uninitialised CPU matrix or vector, contiguous, of the dtype of another tensor.
torch::stable::Tensor pooled_empty(int64_t rows, int64_t columns,
                                   const torch::stable::Tensor& like);
torch::stable::Tensor pooled_empty(int64_t size, const torch::stable::Tensor& like);

}  // namespace kd
