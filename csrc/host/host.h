// The pybind11 module kdkernels._host: what is no tensor operator. An op adds its own functions by
// a static HostBindings object in csrc/<op>/<op>_host.cpp; no central list.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace kd {

using Bind = void (*)(pybind11::module_&);

// Functions waiting for the module to be initialised.
inline std::vector<Bind>& host_bindings() {
  static std::vector<Bind> bindings;
  return bindings;
}

struct HostBindings {
  explicit HostBindings(Bind bind) { host_bindings().push_back(bind); }
};

}  // namespace kd
