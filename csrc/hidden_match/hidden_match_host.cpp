// The launch plan of hidden_match for Python: kdkernels._host.match_plan.
#include <pybind11/stl.h>

#include "hidden_match/hidden_match_plan.h"
#include "host/host.h"

namespace py = pybind11;

namespace kd {

namespace {

py::list match_plan(int64_t rows, const std::vector<int64_t>& widths, int element_size) {
  py::list result;
  for (const MatchLayerPlan& plan : plan_match(rows, widths, element_size)) {
    py::dict layer;
    layer["launch"] = plan.launch;
    layer["first_block"] = plan.first_block;
    layer["blocks"] = plan.blocks;
    layer["warps_a_row"] = 1 << plan.warps_log2;
    layer["rows_a_block"] = plan.rows_a_block;
    layer["once"] = plan.once;
    result.append(layer);
  }
  return result;
}

const HostBindings kBindings([](py::module_& m) {
  m.def("match_plan", &match_plan, "How the layers of a hidden_match call are laid out on a GPU.",
        py::arg("rows"), py::arg("widths"), py::arg("element_size"));
});

}  // namespace

}  // namespace kd
