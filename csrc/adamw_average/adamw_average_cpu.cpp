// adamw_average on the CPU: entries and registration; a piece of a tensor is in
// adamw_average_rows.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "adamw_average/adamw_average.h"
#include "adamw_average/adamw_average_cpu.h"
#include "common/isa.h"
#include "common/multi_tensor_cpu.h"

#define KD_PER_ISA_FILE "adamw_average/adamw_average_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "adamw_average";
constexpr int64_t kGrain = 1 << 13;  // elements worth a thread

float value_of(const Tensor& x) { return *static_cast<const float*>(x.const_data_ptr()); }

void adamw_average_update(const Tensor& table, const Tensor& weight, const Tensor& lr,
                          const Tensor& factor, const std::optional<Tensor>& found_inf,
                          const std::vector<double>& constants, const std::vector<int64_t>& dtypes,
                          int64_t chunks) {
  const AdamwDtypes d = check_adamw_table(kOp, table, dtypes);
  const AdamwConstants c(kOp, constants);
  check_adamw_scalars(kOp, weight, lr, factor, found_inf ? &*found_inf : nullptr);
  if (found_inf.has_value() && value_of(*found_inf) != 0.0f) return;
  const float rate = value_of(lr);
  AdamwNumbers common{};
  common.factor = c.sign * value_of(factor);
  common.decay = rate * c.weight_decay;
  common.beta1_rest = c.beta1_rest;
  common.beta2 = c.beta2;
  common.beta2_rest = c.beta2_rest;
  common.eps = c.eps;
  common.weight = value_of(weight);
  const AdamwFunction function = KD_BEST_ISA(adamw_function)(d);
  const auto floats = [](int64_t address, int64_t first) {
    return reinterpret_cast<float*>(element_at(address, first, TableDtype::kFloat));
  };
  each_chunk<AdamwRow>(
      table, chunks, kGrain, [&](const AdamwRow& row, int64_t first, int64_t count) {
        const float step = *reinterpret_cast<const float*>(row.step);
        AdamwNumbers numbers = common;
        // By expm1: 1 - beta2^t has three digits at the first steps.
        numbers.step_size = rate / -std::expm1(step * c.beta1_log);
        numbers.root_scale = 1.0f / std::sqrt(-std::expm1(step * c.beta2_log));
        function({element_at(row.param, first, d.param), element_at(row.grad, first, d.grad),
                  floats(row.exp_avg, first), floats(row.exp_avg_sq, first),
                  floats(row.average, first), floats(row.master, first), count},
                 numbers);
      });
}

void adamw_average_grads(Tensor table, const std::vector<int64_t>& addresses) {
  check_table<AdamwRow>(kOp, table);
  STD_TORCH_CHECK(static_cast<int64_t>(addresses.size()) == table.size(0), kOp,
                  ": addresses must be as many as the rows of the table, ", table.size(0), ", got ",
                  addresses.size());
  AdamwRow* rows = static_cast<AdamwRow*>(table.mutable_data_ptr());
  for (size_t i = 0; i < addresses.size(); ++i) rows[i].grad = addresses[i];
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("adamw_average_update", TORCH_BOX(&kd::adamw_average_update));
  m.impl("adamw_average_grads", TORCH_BOX(&kd::adamw_average_grads));
}
