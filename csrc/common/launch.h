// Launching kernels on the stream and the device of a tensor.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>

namespace kd {

inline void check_cuda(cudaError_t status, const char* op) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": CUDA must run the kernel, got ",
                  cudaGetErrorString(status));
}

// Makes the device of a tensor current while it lives, and knows the stream to launch on.
class LaunchScope {
 public:
  explicit LaunchScope(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  int attribute(cudaDeviceAttr which, const char* op) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device_), op);
    return value;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  int cluster = 1;    // blocks of a cluster
  size_t shared = 0;  // dynamic shared memory of a block, bytes
};

template <typename... Params>
void launch_kernel(const char* op, const LaunchScope& scope, const LaunchShape& shape,
                   void (*kernel)(Params...), Params... args) {
  constexpr size_t kSharedByDefault = 48 * 1024;  // more has to be asked for
  if (shape.shared > kSharedByDefault) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shape.shared)),
               op);
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = scope.stream();
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), op);
}

}  // namespace kd
