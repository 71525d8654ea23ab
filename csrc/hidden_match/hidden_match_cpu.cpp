// hidden_match on the CPU: entry and registration; a row is in hidden_match_rows.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/buffer_pool.h"
#include "common/check.h"
#include "common/empty.h"
#include "common/isa.h"
#include "hidden_match/hidden_match_check.h"
#include "hidden_match/hidden_match_cpu.h"

#define KD_PER_ISA_FILE "hidden_match/hidden_match_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "hidden_match";
// Elements of a layer that are one piece of work; layers of all widths are cut into such pieces.
constexpr int64_t kPiece = 16384;
// Below this a gradient is left in the cache for whoever reads it next; above, it would only evict.
constexpr int64_t kStreamBytes = 4 << 20;

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

// What the rows of all layers add up to.
struct Results {
  Tensor loss, parts;
};

// Sums in the order of the rows, whichever thread found the terms.
Results add_up(const MatchInputs& in, const MatchCall& call, const std::vector<MatchLayer>& layers,
               int64_t valid, double per_row, const Tensor* row_losses) {
  const Results results{empty_cpu(std::array<int64_t, 0>{}, ScalarType::Float),
                        empty_cpu(std::array<int64_t, 1>{in.layers() + 1}, ScalarType::Float)};
  float* parts = static_cast<float*>(results.parts.mutable_data_ptr());
  std::vector<double> rows(row_losses == nullptr ? 0 : in.rows());
  double total = 0.0;
  for (int l = 0; l < in.layers(); ++l) {
    double sum = 0.0;
    for (int64_t row = 0; row < in.rows(); ++row) {
      if (call.mask != nullptr && !call.mask[row]) continue;
      const double weight = call.row_weights == nullptr ? 1.0 : call.row_weights[row];
      const double value = weight * layers[l].terms[row];
      sum += value;
      if (row_losses != nullptr) rows[row] += in.weights[l] * value;
    }
    parts[l] = static_cast<float>(sum * per_row);
    total += in.weights[l] * sum;
  }
  parts[in.layers()] = static_cast<float>(valid);
  *static_cast<float*>(results.loss.mutable_data_ptr()) = static_cast<float>(total * per_row);
  if (row_losses != nullptr) {
    std::copy(rows.begin(), rows.end(), static_cast<float*>(row_losses->mutable_data_ptr()));
  }
  return results;
}

// Rows of one layer.
struct Piece {
  const MatchLayer* layer;
  int64_t begin, end;
};

void run_pieces(const MatchInputs& in, const MatchCall& call,
                const std::vector<MatchLayer>& layers) {
  std::vector<Piece> pieces;
  for (const MatchLayer& layer : layers) {
    const int64_t step = std::max<int64_t>(1, kPiece / layer.width);
    for (int64_t begin = 0; begin < in.rows(); begin += step) {
      pieces.push_back({&layer, begin, std::min(begin + step, in.rows())});
    }
  }
  const MatchRows function = KD_BEST_ISA(match_function)(call.kind, in.students[0].scalar_type(),
                                                         in.teachers[0].scalar_type());
  const int64_t count = pieces.size();
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      function(call, *pieces[i].layer, pieces[i].begin, pieces[i].end);
    }
  });
}

Results run(const MatchInputs& in, const Tensor* grad, const Tensor* row_losses) {
  const int64_t rows = in.rows();
  MatchCall call{in.spec.kind, static_cast<float>(in.spec.beta), data_or_null<bool>(in.mask),
                 data_or_null<float>(in.row_weights), false};
  const int64_t valid = call.mask == nullptr ? rows : std::count(call.mask, call.mask + rows, true);
  double divisor = in.spec.mean ? static_cast<double>(valid) : 1.0;
  if (in.denominator.has_value()) divisor = *data_or_null<float>(in.denominator);
  const double per_row = divisor != 0.0 ? 1.0 / divisor : 1.0;

  const int64_t element = in.students[0].scalar_type() == ScalarType::Float ? 4 : 2;
  std::vector<float> terms(rows * in.layers());
  std::vector<MatchLayer> layers;
  char* next = grad == nullptr ? nullptr : static_cast<char*>(grad->mutable_data_ptr());
  for (int l = 0; l < in.layers(); ++l) {
    const Tensor &student = in.students[l], &teacher = in.teachers[l];
    const int64_t width = student.size(1);
    layers.push_back({static_cast<const char*>(student.const_data_ptr()),
                      static_cast<const char*>(teacher.const_data_ptr()), next, student.stride(0),
                      teacher.stride(0), width, static_cast<float>(in.weights[l] * per_row),
                      terms.data() + l * rows});
    if (grad != nullptr) next += rows * width * element;
  }
  call.stream = grad != nullptr && grad->numel() * element > kStreamBytes;
  run_pieces(in, call, layers);
  return add_up(in, call, layers, valid, per_row, row_losses);
}

std::tuple<Tensor, Tensor, Tensor> hidden_match(const Tensors& students, const Tensors& teachers,
                                                const MaybeTensor& mask,
                                                const MaybeTensor& row_weights,
                                                const MaybeTensor& denominator,
                                                const Numbers& weights, const Numbers& spec) {
  const MatchInputs in =
      checked_match(kOp, students, teachers, mask, row_weights, denominator, weights, spec);
  const Tensor rows = empty_cpu(std::array<int64_t, 1>{in.rows()}, ScalarType::Float);
  const Results results = run(in, nullptr, &rows);
  return {results.loss, results.parts, rows};
}

std::tuple<Tensor, Tensor, Tensor> hidden_match_grad(const Tensors& students,
                                                     const Tensors& teachers,
                                                     const MaybeTensor& mask,
                                                     const MaybeTensor& row_weights,
                                                     const MaybeTensor& denominator,
                                                     const Numbers& weights, const Numbers& spec) {
  const MatchInputs in =
      checked_match(kOp, students, teachers, mask, row_weights, denominator, weights, spec);
  const Tensor grad = pooled_empty(in.gradient_elements(), students[0]);
  const Results results = run(in, &grad, nullptr);
  return {results.loss, results.parts, grad};
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("hidden_match", TORCH_BOX(&kd::hidden_match));
  m.impl("hidden_match_grad", TORCH_BOX(&kd::hidden_match_grad));
}
