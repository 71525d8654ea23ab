#include "common/isa.h"
#include "host/host.h"

namespace py = pybind11;

namespace {

// How this library was built; the definitions come from CMakeLists.txt.
py::dict build_info() {
  py::dict info;
  info["version"] = KD_VERSION;
  info["compiler"] = KD_COMPILER;
  info["build_type"] = KD_BUILD_TYPE;
  info["torch"] = KD_TORCH_VERSION;
  info["torch_target"] = KD_TORCH_TARGET;
  info["cuda_compiler"] = KD_CUDA_COMPILER;
  info["cuda_architectures"] = KD_CUDA_ARCHITECTURES;
  return info;
}

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  features["avx2"] = static_cast<bool>(__builtin_cpu_supports("avx2"));
  features["fma"] = static_cast<bool>(__builtin_cpu_supports("fma"));
  features["avx512f"] = static_cast<bool>(__builtin_cpu_supports("avx512f"));
  features["avx512bw"] = static_cast<bool>(__builtin_cpu_supports("avx512bw"));
#endif
  features["used"] = kd::isa_name(kd::current_isa());
  return features;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts, CPU features and launch plans: what is no tensor operator.";
  m.def("build_info", &build_info, "How the compiled libraries were built.");
  m.def("cpu_features", &cpu_features, "Vector extensions of this CPU and the set in use.");
  for (kd::Bind bind : kd::host_bindings()) bind(m);
}
