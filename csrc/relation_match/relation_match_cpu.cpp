// relation_match on the CPU: heads in parallel, each by one thread from its scores to its
// gradients.
//
// Tile after tile by the library's GEMMs from Python takes the same work, but a handful of parallel
// loops a tile: where other processes use the cores too, every one of them waits for its slowest
// thread. Here there is one.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/empty.h"

namespace kd {

namespace {

constexpr const char* kOp = "relation_match";
constexpr int64_t kIgnored = -100;  // the label of a row that does not count

using Numbers = std::vector<double>;

// The numbers of a call, as Numbers of tiles.py.
struct HeadsSpec {
  bool kl, causal;
  double student_scale, teacher_scale;  // of the GEMMs
  double back;                          // of the gradient of the scores
  int64_t tile_floats;                  // of one model's scores
};

struct HeadsCall {
  HeadsSpec spec;
  int64_t heads, tokens;
  std::array<const float*, 4> states;  // queries and keys of student and teacher
  std::array<int64_t, 4> widths;
  const int64_t* labels;  // [heads, tokens], or null
  const float* weights;   // [heads, tokens], or null
  const float* keys;      // [heads, tokens]: how many a query sees; null: all of a tile's
  const bool* blocked;    // [heads, tokens]: keys, or null
  float* grad_q;          // [heads, tokens, width], or null
  float* grad_k;
  float* rows;       // [heads, tokens], or null
  Numbers row_spec;  // of the rows' kernel
  MaybeTensor denominator;
};

template <size_t N>
Tensor view(const void* data, const std::array<int64_t, N>& sizes,
            const std::array<int64_t, N>& strides, ScalarType dtype) {
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

Tensor matrix(const float* data, int64_t rows, int64_t columns) {
  return view<2>(data, {rows, columns}, {columns, 1}, ScalarType::Float);
}

Tensor transposed(const float* data, int64_t rows, int64_t columns) {
  return view<2>(data, {columns, rows}, {1, columns}, ScalarType::Float);
}

Tensor vector_of(const void* data, int64_t size, ScalarType dtype) {
  return view<1>(data, {size}, {1}, dtype);
}

// out = beta * out + alpha * a @ b
void gemm(const Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha));
}

// Rows of one head that are worked on at a time.
struct Tile {
  int64_t head, begin, end, keys;
  float *student, *teacher;  // scores [end - begin, keys]

  int64_t rows() const { return end - begin; }
  int64_t first(const HeadsCall& call) const { return head * call.tokens + begin; }
};

void scores(const HeadsCall& call, const Tile& tile) {
  float* const to[2] = {tile.student, tile.teacher};
  const double scales[2] = {call.spec.student_scale, call.spec.teacher_scale};
  for (int model = 0; model < 2; ++model) {
    const int64_t width = call.widths[2 * model];
    const float* q = call.states[2 * model] + tile.first(call) * width;
    const float* k = call.states[2 * model + 1] + tile.head * call.tokens * width;
    gemm(matrix(to[model], tile.rows(), tile.keys), matrix(q, tile.rows(), width),
         transposed(k, tile.keys, width), 0.0, scales[model]);
  }
}

// Leaves out the keys that a query does not see.
void block(const HeadsCall& call, const Tile& tile) {
  const float fill = call.spec.kl ? -std::numeric_limits<float>::infinity() : 0.0f;
  const bool* blocked = call.blocked == nullptr ? nullptr : call.blocked + tile.head * call.tokens;
  for (float* scores : {tile.student, tile.teacher}) {
    for (int64_t row = 0; row < tile.rows(); ++row) {
      float* line = scores + row * tile.keys;
      if (blocked != nullptr) {
        for (int64_t key = 0; key < tile.keys; ++key) {
          if (blocked[key]) line[key] = fill;
        }
      }
      if (call.spec.causal) std::fill(line + tile.begin + row + 1, line + tile.keys, fill);
    }
  }
}

template <typename... Args>
std::vector<Tensor> call_operator(const char* name, size_t results, const Args&... args) {
  constexpr size_t kArguments = sizeof...(Args);
  std::array<StableIValue, std::max<size_t>(kArguments, 3)> stack{
      torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  std::vector<Tensor> found;
  for (size_t i = 0; i < results; ++i) {
    found.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  }
  return found;
}

// The weights of a tile's rows. The kernel of mse takes the mean over all of a row: where a query
// does not see all keys, they make up for it.
MaybeTensor weights_of(const HeadsCall& call, const Tile& tile, std::vector<float>& shares) {
  const float* weights = call.weights == nullptr ? nullptr : call.weights + tile.first(call);
  if (call.keys != nullptr) {
    shares.resize(tile.rows());
    for (int64_t row = 0; row < tile.rows(); ++row) {
      shares[row] = tile.keys / call.keys[tile.first(call) + row];
      if (weights != nullptr) shares[row] *= weights[row];
    }
    weights = shares.data();
  }
  if (weights == nullptr) return std::nullopt;
  return vector_of(weights, tile.rows(), ScalarType::Float);
}

// The loss of a tile; the gradient for the student's scores, which may have been overwritten by it,
// or the losses of the rows.
struct Compared {
  double loss;
  Tensor kept;  // holds the memory of
  const float* values;
};

Compared compare(const HeadsCall& call, const Tile& tile) {
  const bool with_grad = call.grad_q != nullptr || call.grad_k != nullptr;
  const Tensor student = matrix(tile.student, tile.rows(), tile.keys);
  const Tensor teacher = matrix(tile.teacher, tile.rows(), tile.keys);
  std::vector<float> shares;
  const MaybeTensor weights = weights_of(call, tile, shares);
  std::vector<Tensor> found;
  if (call.spec.kl) {
    MaybeTensor labels;
    if (call.labels != nullptr) {
      labels = vector_of(call.labels + tile.first(call), tile.rows(), ScalarType::Long);
    }
    found = call_operator(with_grad ? "kdkernels::kd_loss_grad_" : "kdkernels::kd_loss",
                          with_grad ? 2 : 3, student, MaybeTensor(teacher), labels, weights,
                          call.denominator, call.row_spec);
    if (with_grad) found.push_back(student);
  } else {
    std::vector<char> keep;
    MaybeTensor mask;
    if (call.labels != nullptr) {
      for (int64_t i = 0; i < tile.rows(); ++i) {
        keep.push_back(call.labels[tile.first(call) + i] != kIgnored);
      }
      mask = vector_of(keep.data(), tile.rows(), ScalarType::Bool);
    }
    found = call_operator(with_grad ? "kdkernels::hidden_match_grad" : "kdkernels::hidden_match", 3,
                          std::vector<Tensor>{student}, std::vector<Tensor>{teacher}, mask, weights,
                          call.denominator, Numbers{1.0}, call.row_spec);
  }
  return {*static_cast<const float*>(found[0].const_data_ptr()), found[2],
          static_cast<const float*>(found[2].const_data_ptr())};
}

// dq += G k, dk += G^T q.
void propagate(const HeadsCall& call, const Tile& tile, const float* gradient) {
  const int64_t width = call.widths[0], rows = tile.rows(), keys = tile.keys;
  const float* q = call.states[0] + tile.first(call) * width;
  const float* k = call.states[1] + tile.head * call.tokens * width;
  if (call.grad_q != nullptr) {
    gemm(matrix(call.grad_q + tile.first(call) * width, rows, width), matrix(gradient, rows, keys),
         matrix(k, keys, width), 1.0, call.spec.back);
  }
  if (call.grad_k != nullptr) {
    gemm(matrix(call.grad_k + tile.head * call.tokens * width, keys, width),
         transposed(gradient, rows, keys), matrix(q, rows, width), 1.0, call.spec.back);
  }
}

double run_head(const HeadsCall& call, int64_t head, std::vector<float>& memory) {
  const int64_t tokens = call.tokens;
  int64_t step = std::clamp<int64_t>(call.spec.tile_floats / tokens, 1, tokens);
  step = (tokens + (tokens + step - 1) / step - 1) / ((tokens + step - 1) / step);
  memory.resize(std::max<size_t>(memory.size(), 2 * step * tokens));
  double loss = 0.0;
  for (int64_t begin = 0; begin < tokens; begin += step) {
    const int64_t end = std::min(begin + step, tokens);
    const Tile tile{head,          begin,
                    end,           call.spec.causal ? end : tokens,
                    memory.data(), memory.data() + step * tokens};
    scores(call, tile);
    if (call.blocked != nullptr || call.spec.causal) block(call, tile);
    const Compared found = compare(call, tile);
    loss += found.loss;
    if (call.rows != nullptr) {
      std::copy_n(found.values, tile.rows(), call.rows + tile.first(call));
    } else {
      propagate(call, tile, found.values);
    }
  }
  return loss;
}

float* result_or_null(const MaybeTensor& x) {
  return x.has_value() ? static_cast<float*>(x->mutable_data_ptr()) : nullptr;
}

void check_states(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && x.scalar_type() == ScalarType::Float &&
                      x.size(0) == like.size(0) && x.size(1) == like.size(1),
                  kOp, ": ", name, " must be contiguous float32 [heads, tokens, width]");
}

// Loss of all heads, float64; adds to the gradients, or fills the rows.
Tensor relation_heads(const Tensor& q, const Tensor& k, const Tensor& teacher_q,
                      const Tensor& teacher_k, const MaybeTensor& labels,
                      const MaybeTensor& weights, const MaybeTensor& keys,
                      const MaybeTensor& blocked, const MaybeTensor& denominator,
                      const MaybeTensor& grad_q, const MaybeTensor& grad_k, const MaybeTensor& rows,
                      const Numbers& numbers, const Numbers& row_spec) {
  check_states(q, q, "student");
  check_states(k, q, "student");
  check_states(teacher_q, q, "teacher");
  check_states(teacher_k, q, "teacher");
  STD_TORCH_CHECK(numbers.size() == 6, kOp, ": numbers must be six, got ", numbers.size());
  const auto data = [](const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); };
  const HeadsCall call{{numbers[0] != 0.0, numbers[1] != 0.0, numbers[2], numbers[3], numbers[4],
                        static_cast<int64_t>(numbers[5]) / 8},
                       q.size(0),
                       q.size(1),
                       {data(q), data(k), data(teacher_q), data(teacher_k)},
                       {q.size(2), k.size(2), teacher_q.size(2), teacher_k.size(2)},
                       data_or_null<int64_t>(labels),
                       data_or_null<float>(weights),
                       data_or_null<float>(keys),
                       data_or_null<bool>(blocked),
                       result_or_null(grad_q),
                       result_or_null(grad_k),
                       result_or_null(rows),
                       row_spec,
                       denominator};
  std::vector<double> losses(call.heads);
  torch::stable::parallel_for(0, call.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory;
    for (int64_t head = begin; head < end; ++head) losses[head] = run_head(call, head, memory);
  });
  Tensor loss = empty_cpu(std::array<int64_t, 0>{}, ScalarType::Double);
  double total = 0.0;
  for (double one : losses) total += one;
  *static_cast<double*>(loss.mutable_data_ptr()) = total;
  return loss;
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("relation_match_heads", TORCH_BOX(&kd::relation_heads));
}
