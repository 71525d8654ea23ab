// The CUDA sources of the operators as one more backend of them, `emulated`, on CPU tensors: each
// .cu is compiled here unchanged, with its registration read as
// m.impl("<op>.emulated", ...) for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

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
