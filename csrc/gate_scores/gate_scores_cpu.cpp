// gate_scores on the CPU: entry and registration; a piece of rows is in gate_scores_rows.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/check.h"
#include "common/empty.h"
#include "common/isa.h"
#include "gate_scores/gate_scores.h"
#include "gate_scores/gate_scores_cpu.h"

#define KD_PER_ISA_FILE "gate_scores/gate_scores_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "gate_scores";
constexpr int64_t kTotalGrain = 512;  // scores that are worth a thread, and are added up at a time

// How rows and columns are cut into pieces.
struct GatePieces {
  GateSizes n;
  bool whole;      // pieces of whole examples
  int64_t rows;    // of a piece, at most
  int64_t parts;   // pieces of an example, or 1
  int64_t bands;   // pieces below each other
  int64_t strip;   // columns of a piece
  int64_t strips;  // pieces side by side

  explicit GatePieces(const GateSizes& sizes) : n(sizes) {
    const int64_t example = n.example_rows();
    whole = example <= kGateRows;
    rows = whole ? kGateRows / example * example : kGateRows;
    parts = whole ? 1 : (example + rows - 1) / rows;
    bands = whole ? (n.rows + rows - 1) / rows : n.examples * parts;
    strip = std::max<int64_t>(1, kGateColumns / n.width) * n.width;
    strips = (n.columns + strip - 1) / strip;
  }

  int64_t count() const { return bands * strips; }

  GatePiece piece(int64_t number) const {
    const int64_t band = number / strips, column = number % strips * strip;
    int64_t first = band * rows, last = std::min(n.rows, first + rows);
    if (!whole) {
      const int64_t example = band / parts * n.example_rows();
      first = example + band % parts * rows;
      last = std::min(example + n.example_rows(), first + rows);
    }
    return {first, last - first, column, std::min(strip, n.columns - column), whole};
  }
};

// Adds up what the pieces have found, in their order whichever thread found it.
template <typename Sum>
void add_up(const GatePieces& work, const Sum* found, Sum* scores) {
  const int64_t size = work.n.grads * work.n.groups();
  torch::stable::parallel_for(0, size, kTotalGrain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kTotalGrain) {
      const int64_t count = std::min(kTotalGrain, end - first);
      double totals[kTotalGrain] = {}, dots[kTotalGrain];
      for (int64_t band = 0; band < work.bands; band += work.parts) {
        std::fill(dots, dots + count, 0.0);
        for (int64_t part = band; part < band + work.parts; ++part) {
          const Sum* from = found + part * size + first;
          for (int64_t i = 0; i < count; ++i) dots[i] += from[i];
        }
        for (int64_t i = 0; i < count; ++i) totals[i] += std::abs(dots[i]);
      }
      for (int64_t i = 0; i < count; ++i) scores[first + i] = static_cast<Sum>(totals[i]);
    }
  });
}

template <typename Sum>
void run(const GateCall& call, GateFunction function, Sum* scores) {
  const GatePieces work(call.sizes);
  const int64_t groups = call.sizes.groups(), size = call.sizes.grads * groups;
  const auto found = std::make_unique_for_overwrite<Sum[]>(work.bands * size);
  torch::stable::parallel_for(0, work.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const GatePiece piece = work.piece(number);
      Sum* out = found.get() + number / work.strips * size + piece.column / call.sizes.width;
      function(call, piece, out, groups);
    }
  });
  add_up(work, found.get(), scores);
}

Tensor gate_scores(const Tensor& activation, const std::vector<Tensor>& grads,
                   const MaybeTensor& mask, int64_t width, int64_t examples) {
  const GateSizes n = check_gates(kOp, activation, grads, mask, width, examples);
  const ScalarType dtype = activation.scalar_type();
  const GateFunction function = KD_BEST_ISA(gate_function)(dtype, n.grads);
  const bool is_double = dtype == ScalarType::Double;
  Tensor scores = empty_cpu(std::array<int64_t, 2>{n.grads, n.groups()},
                            is_double ? ScalarType::Double : ScalarType::Float);
  void* out = scores.mutable_data_ptr();
  if (n.rows == 0) {
    std::memset(out, 0, n.grads * n.groups() * (is_double ? sizeof(double) : sizeof(float)));
    return scores;
  }
  GateCall call{n,
                static_cast<const char*>(activation.const_data_ptr()),
                activation.stride(0),
                {},
                {},
                data_or_null<bool>(mask)};
  for (int k = 0; k < n.grads; ++k) {
    call.grads[k] = static_cast<const char*>(grads[k].const_data_ptr());
    call.grad_strides[k] = grads[k].stride(0);
  }
  if (is_double) {
    run(call, function, static_cast<double*>(out));
  } else {
    run(call, function, static_cast<float*>(out));
  }
  return scores;
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("gate_scores", TORCH_BOX(&kd::gate_scores)); }
