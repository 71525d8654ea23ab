// The CUDA sources of the operators as one more backend of them, `emulated`, on CPU tensors: each
// .cu is compiled here unchanged, with its registration read as
// m.impl("<op>.emulated", ...) for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <string>

// An operator starts without memory that its kernels may touch.
template <auto kBoxed>
void emulated_operator(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  cuda_emulation::forget_memory();
  kBoxed(stack, arguments, outputs);
}
#undef TORCH_BOX
#define TORCH_BOX(function)                                                                    \
  (&emulated_operator<&torch::stable::detail::boxer<std::remove_pointer_t<decltype(function)>, \
                                                    function>::boxed_fn>)

// A tensor whose address is asked for is memory of the call: the linker puts these before
// LibTorch's functions of the names without __wrap_.
namespace {

void allow_tensor(AtenTensorHandle tensor, const void* data, bool writable) {
  int64_t dims = 0, *sizes = nullptr, *strides = nullptr, last = 0;
  int32_t dtype = 0;
  aoti_torch_get_dim(tensor, &dims);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  for (int64_t i = 0; i < dims; ++i) {
    if (sizes[i] == 0) return;
    last += (sizes[i] - 1) * strides[i];
  }
  cuda_emulation::allow(data, (last + 1) * aoti_torch_dtype_element_size(dtype), writable);
}

}  // namespace

extern "C" {
AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);
__attribute__((weak)) AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor,
                                                                     const void** data) {
  const AOTITorchError status = __real_torch_get_const_data_ptr(tensor, data);
  if (status == AOTI_TORCH_SUCCESS) allow_tensor(tensor, *data, false);
  return status;
}
__attribute__((weak)) AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor,
                                                                       void** data) {
  const AOTITorchError status = __real_torch_get_mutable_data_ptr(tensor, data);
  if (status == AOTI_TORCH_SUCCESS) allow_tensor(tensor, *data, true);
  return status;
}
}

namespace {

struct EmulatedLibrary {
  torch::stable::detail::StableLibrary& library;

  template <typename Function>
  void impl(const char* name, Function function) {
    library.impl((std::string(name) + ".emulated").c_str(), function);
  }
};

}  // namespace

// The registrations of all files, one after the other.
#define KD_JOIN_(a, b) a##b
#define KD_JOIN(a, b) KD_JOIN_(a, b)
#define KD_EMULATED_IMPL(name, m)                                                            \
  static void name(EmulatedLibrary m);                                                       \
  static const torch::stable::detail::StableTorchLibraryInit KD_JOIN(name, _init)(           \
      torch::stable::detail::StableLibrary::Kind::IMPL,                                      \
      [](torch::stable::detail::StableLibrary& library) { name(EmulatedLibrary{library}); }, \
      "kdkernels", "CPU", __FILE__, __LINE__);                                               \
  static void name(EmulatedLibrary m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) KD_EMULATED_IMPL(KD_JOIN(emulated_, __COUNTER__), m)

// The CUDA half of LibTorch: there is one stream.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t,
                                                                                   void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

#include KD_SOURCE
