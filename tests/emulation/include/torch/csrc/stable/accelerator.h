// Stands before LibTorch's header of this name: the emulated device is the CPU, and always current.
#pragma once

#define DeviceGuard RealDeviceGuard
#include_next <torch/csrc/stable/accelerator.h>
#undef DeviceGuard

namespace torch::stable::accelerator {

struct DeviceGuard {
  explicit DeviceGuard(DeviceIndex) {}
};

}  // namespace torch::stable::accelerator
