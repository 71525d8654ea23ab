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
#include "weight_average/weight_average.h"
#include "weight_average/weight_average_cpu.h"

#define KD_PER_ISA_FILE "weight_average/weight_average_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "weight_average";
constexpr int64_t kGrain = 1 << 15;  // elements worth a thread

// Calls body(row of the table, first element, count) for the chunks of all tensors, in parallel.
template <typename Body>
void each_chunk(const Tensor& table, int64_t chunks, const Body& body) {
  const AverageRow* rows = static_cast<const AverageRow*>(table.const_data_ptr());
  const AverageRow* rows_end = rows + table.size(0);
  int64_t elements = 0;
  for (const AverageRow* row = rows; row != rows_end; ++row) elements += row->size;
  const int64_t grain = elements == 0 ? 1 : std::max<int64_t>(1, chunks * kGrain / elements);
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    const auto ends_later = [](int64_t chunk, const AverageRow& r) { return chunk < r.chunks_end; };
    const AverageRow* row = std::upper_bound(rows, rows_end, begin, ends_later);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (row->chunks_end <= chunk) ++row;
      const int64_t all = (row->size + kAverageChunk - 1) / kAverageChunk;
      const int64_t first = (chunk - (row->chunks_end - all)) * kAverageChunk;
      body(*row, first, std::min(kAverageChunk, row->size - first));
    }
  });
}

char* address(int64_t from, int64_t element, AverageDtype dtype) {
  return from == 0 ? nullptr : reinterpret_cast<char*>(from) + element * bytes_of(dtype);
}

void weight_average_update(const Tensor& table, const Tensor& weight,
                           const std::vector<int64_t>& dtypes, int64_t chunks) {
  const AverageDtypes d = check_average_table(kOp, table, dtypes);
  check_average_weight(kOp, weight);
  const float w = *static_cast<const float*>(weight.const_data_ptr());
  const AverageFunction function = KD_BEST_ISA(average_function)(d);
  each_chunk(table, chunks, [&](const AverageRow& row, int64_t first, int64_t count) {
    function({address(row.average, first, d.average), address(row.param, first, d.param),
              address(row.compensation, first, d.average), address(row.copy, first, d.copy), count},
             w);
  });
}

void weight_average_swap(const Tensor& table, const std::vector<int64_t>& dtypes, int64_t chunks,
                         bool back) {
  const AverageDtypes d = check_average_table(kOp, table, dtypes);
  const bool wide = d.average == AverageDtype::kFloat && d.param == AverageDtype::kBf16;
  STD_TORCH_CHECK(wide || d.average == d.param, kOp,
                  ": dtypes must be equal, or float32 and bfloat16, to be exchanged");
  const SwapFunction function = KD_BEST_ISA(swap_function)(wide);
  const int64_t unit = wide ? 1 : bytes_of(d.average);
  each_chunk(table, chunks, [&](const AverageRow& row, int64_t first, int64_t count) {
    function(address(row.average, first, d.average), address(row.param, first, d.param),
             count * unit, back);
  });
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("weight_average_update", TORCH_BOX(&kd::weight_average_update));
  m.impl("weight_average_swap", TORCH_BOX(&kd::weight_average_swap));
}
