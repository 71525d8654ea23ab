// weight_average on the CPU: entries and registration; a piece of a tensor is in
// weight_average_rows.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/check.h"
#include "common/isa.h"
#include "common/multi_tensor_cpu.h"
#include "weight_average/weight_average.h"
#include "weight_average/weight_average_cpu.h"

#define KD_PER_ISA_FILE "weight_average/weight_average_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "weight_average";
constexpr int64_t kGrain = 1 << 15;  // elements worth a thread

void weight_average_update(const Tensor& table, const Tensor& weight,
                           const std::vector<int64_t>& dtypes, int64_t chunks) {
  const AverageDtypes d = check_average_table(kOp, table, dtypes);
  check_one_float(kOp, "weight", weight);
  const float w = *static_cast<const float*>(weight.const_data_ptr());
  const AverageFunction function = KD_BEST_ISA(average_function)(d);
  each_chunk<AverageRow>(
      table, chunks, kGrain, [&](const AverageRow& row, int64_t first, int64_t count) {
        function({element_at(row.average, first, d.average), element_at(row.param, first, d.param),
                  element_at(row.compensation, first, d.average),
                  element_at(row.copy, first, d.copy), count},
                 w);
      });
}

void weight_average_swap(const Tensor& table, const std::vector<int64_t>& dtypes, int64_t chunks,
                         bool back) {
  const AverageDtypes d = check_average_table(kOp, table, dtypes);
  const bool wide = d.average == TableDtype::kFloat && d.param == TableDtype::kBf16;
  STD_TORCH_CHECK(wide || d.average == d.param, kOp,
                  ": dtypes must be equal, or float32 and bfloat16, to be exchanged");
  const SwapFunction function = KD_BEST_ISA(swap_function)(wide);
  const int64_t unit = wide ? 1 : bytes_of(d.average);
  each_chunk<AverageRow>(table, chunks, kGrain,
                         [&](const AverageRow& row, int64_t first, int64_t count) {
                           function(element_at(row.average, first, d.average),
                                    element_at(row.param, first, d.param), count * unit, back);
                         });
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("weight_average_update", TORCH_BOX(&kd::weight_average_update));
  m.impl("weight_average_swap", TORCH_BOX(&kd::weight_average_swap));
}
