// domain_prototypes on the CPU: entry and registration; a piece of rows is in
// domain_prototypes_rows.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/check.h"
#include "common/empty.h"
#include "common/isa.h"
#include "domain_prototypes/domain_prototypes.h"
#include "domain_prototypes/domain_prototypes_cpu.h"

#define KD_PER_ISA_FILE "domain_prototypes/domain_prototypes_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "domain_prototypes";
constexpr int64_t kFinishGrain = 128;  // columns of all examples that are worth a thread

// Positions of each example that count.
std::vector<int64_t> live_positions(const PrototypeCall& call) {
  const PrototypeSizes& n = call.sizes;
  std::vector<int64_t> found(n.batch, n.seq);
  if (call.mask == nullptr) return found;
  for (int64_t i = 0; i < n.batch; ++i) {
    const bool* row = call.mask + i * n.seq;
    found[i] = std::count(row, row + n.seq, true);
  }
  return found;
}

// Turns sums of positions [batch, parts, columns] into means, and adds these up group by group,
// in the order of the batch.
template <typename Sum>
void finish(const PrototypeSizes& n, const std::vector<int64_t>& positions, const int64_t* groups,
            const Sum* found, int64_t parts, Sum* means, Sum* sums) {
  std::vector<double> totals(n.groups * n.columns, 0.0);
  torch::stable::parallel_for(0, n.columns, kFinishGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n.batch; ++i) {
      const int64_t count = positions[i];
      const double scale = count > 0 ? static_cast<double>(count) : 1.0;
      double* total = groups[i] >= 0 && groups[i] < n.groups && count > 0
                          ? totals.data() + groups[i] * n.columns
                          : nullptr;
      const Sum* from = found + i * parts * n.columns;
      for (int64_t c = begin; c < end; ++c) {
        double sum = 0.0;
        for (int64_t part = 0; part < parts; ++part) sum += from[part * n.columns + c];
        const Sum mean = static_cast<Sum>(sum / scale);
        means[i * n.columns + c] = mean;
        if (total != nullptr) total[c] += mean;
      }
    }
    for (int64_t g = 0; g < n.groups; ++g) {
      for (int64_t c = begin; c < end; ++c) {
        sums[g * n.columns + c] = static_cast<Sum>(totals[g * n.columns + c]);
      }
    }
  });
}

template <typename Sum>
void run(const PrototypeCall& call, PrototypeFunction function, const int64_t* groups, Sum* means,
         Sum* sums, int64_t* counts) {
  const PrototypeSizes& n = call.sizes;
  const int64_t parts = std::max<int64_t>(1, (n.seq + kPrototypeRows - 1) / kPrototypeRows);
  const int64_t strips = (n.columns + kPrototypeColumns - 1) / kPrototypeColumns;
  // Sums of whole examples are written where their means will be.
  std::vector<Sum> apart(parts > 1 ? n.batch * parts * n.columns : 0);
  Sum* found = parts > 1 ? apart.data() : means;
  torch::stable::parallel_for(0, n.batch * parts * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t part = number / strips, column = number % strips * kPrototypeColumns;
      const int64_t row = part % parts * kPrototypeRows;
      const PrototypePiece piece{part / parts, row, std::min(kPrototypeRows, n.seq - row), column,
                                 std::min(kPrototypeColumns, n.columns - column)};
      function(call, piece, found + part * n.columns + column);
    }
  });
  const std::vector<int64_t> positions = live_positions(call);
  std::fill(counts, counts + n.groups, 0);
  for (int64_t i = 0; i < n.batch; ++i) {
    if (groups[i] >= 0 && groups[i] < n.groups && positions[i] > 0) ++counts[groups[i]];
  }
  finish(n, positions, groups, found, parts, means, sums);
}

std::tuple<Tensor, Tensor, Tensor> domain_prototypes(const Tensor& hidden, const Tensor& groups,
                                                     const MaybeTensor& mask, int64_t n_groups) {
  const PrototypeSizes n = check_prototypes(kOp, hidden, groups, mask, n_groups);
  const PrototypeFunction function = KD_BEST_ISA(prototype_function)(hidden.scalar_type());
  const bool is_double = hidden.scalar_type() == ScalarType::Double;
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  Tensor means = empty_cpu(std::array<int64_t, 2>{n.batch, n.columns}, wide);
  Tensor sums = empty_cpu(std::array<int64_t, 2>{n_groups, n.columns}, wide);
  Tensor counts = empty_cpu(std::array<int64_t, 1>{n_groups}, ScalarType::Long);
  const PrototypeCall call{n, static_cast<const char*>(hidden.const_data_ptr()), hidden.stride(0),
                           hidden.stride(1), data_or_null<bool>(mask)};
  const auto go = [&]<typename Sum>() {
    run(call, function, static_cast<const int64_t*>(groups.const_data_ptr()),
        static_cast<Sum*>(means.mutable_data_ptr()), static_cast<Sum*>(sums.mutable_data_ptr()),
        static_cast<int64_t*>(counts.mutable_data_ptr()));
  };
  if (is_double) {
    go.template operator()<double>();
  } else {
    go.template operator()<float>();
  }
  return {means, sums, counts};
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("domain_prototypes", TORCH_BOX(&kd::domain_prototypes));
}
