// The launch plan of kd_loss for Python: kdkernels._host.kd_loss_plan.
#include "host/host.h"
#include "kd_loss/kd_loss_plan.h"

namespace py = pybind11;

namespace kd {

namespace {

py::dict kd_loss_plan(int64_t classes, int element_size, int divergence, bool want_grad,
                      bool aligned, int major, int shared_per_block, int entries) {
  const KdLossPlan plan = plan_kd_loss(
      {classes, element_size, aligned, want_grad, static_cast<Divergence>(divergence), entries},
      {major, shared_per_block});
  py::dict result;
  result["on_chip"] = plan.on_chip;
  result["threads"] = plan.threads;
  result["cluster"] = plan.cluster;
  result["vectors"] = plan.vectors;
  result["vectors_a_rank"] = plan.vectors_a_rank;
  result["shared_bytes"] = plan.shared_bytes;
  return result;
}

const HostBindings kBindings([](py::module_& m) {
  m.def("kd_loss_plan", &kd_loss_plan, "How a kd_loss call is laid out on a GPU.",
        py::arg("classes"), py::arg("element_size"), py::arg("divergence"),
        py::arg("want_grad") = true, py::arg("aligned") = true, py::arg("major") = 9,
        py::arg("shared_per_block") = 232448, py::arg("entries") = 0);
});

}  // namespace

}  // namespace kd
