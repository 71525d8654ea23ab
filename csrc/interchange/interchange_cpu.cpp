// interchange on the CPU: entries and registration; rows are in interchange_rows.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/check.h"
#include "common/empty.h"
#include "common/isa.h"
#include "interchange/interchange.h"
#include "interchange/interchange_cpu.h"

#define KD_PER_ISA_FILE "interchange/interchange_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "interchange";
constexpr int64_t kGrainBytes = 1 << 16;  // worth a thread
// Below this what is written is left in the cache for whoever reads it next; above, it would only
// evict, and be read before it is overwritten.
constexpr int64_t kStreamBytes = 4 << 20;

// Moves that lie one behind another become one.
class Mover {
 public:
  Mover(const SwapRows& rows, bool stream) : rows_(rows), stream_(stream) {}
  ~Mover() {
    flush();
    if (stream_) rows_.fence();
  }
  Mover(const Mover&) = delete;
  Mover& operator=(const Mover&) = delete;

  // From null: zeros.
  void move(char* to, const char* from, int64_t bytes) {
    const bool behind = to == to_ + bytes_ &&
                        (from == nullptr ? from_ == nullptr : from_ && from == from_ + bytes_);
    if (bytes_ > 0 && behind) {
      bytes_ += bytes;
      return;
    }
    flush();
    to_ = to;
    from_ = from;
    bytes_ = bytes;
  }

 private:
  void flush() {
    if (bytes_ > 0) rows_.move(to_, from_, bytes_, stream_);
  }

  const SwapRows& rows_;
  bool stream_;
  char* to_ = nullptr;
  const char* from_ = nullptr;
  int64_t bytes_ = 0;
};

States<const char> states_of(const Tensor& x, int64_t bytes) {
  return {static_cast<const char*>(x.const_data_ptr()), x.stride(0) * bytes, x.stride(1) * bytes};
}

States<char> written_states(Tensor& x, int64_t bytes) {
  return {static_cast<char*>(x.mutable_data_ptr()), x.stride(0) * bytes, x.stride(1) * bytes};
}

struct SwapCall {
  SwapSizes sizes;
  SwapIndex index;
  SwapMode mode;
  int64_t begin, end;  // columns
  bool in_place;
};

int64_t grain(int64_t position_bytes) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, position_bytes));
}

void each_position(const SwapCall& call, const SwapRows& rows, const States<const char>& base,
                   const States<const char>& source, const States<char>& out) {
  const SwapSizes& n = call.sizes;
  const int64_t unit = rows.element_bytes, width = n.hidden * unit;
  const int64_t begin = call.begin * unit, end = call.end * unit;
  const int64_t written = n.batch * n.seq * width;
  const bool stream = !call.in_place && written >= kStreamBytes;
  torch::stable::parallel_for(0, n.batch * n.seq, grain(width), [&](int64_t first, int64_t last) {
    Mover mover(rows, stream);
    for (int64_t p = first; p < last; ++p) {
      const int64_t b = p / n.seq, at = p % n.seq;
      const int64_t found = call.index.source_of(n, b, at);
      char* to = out.at(b, at);
      const char* from = base.at(b, at);
      if (found < 0) {
        if (!call.in_place) mover.move(to, from, width);
        continue;
      }
      if (!call.in_place && begin > 0) mover.move(to, from, begin);
      const char* taken = nullptr;
      if (call.mode != SwapMode::kClear) {
        taken = source.at(found / n.positions, found % n.positions) + begin;
      }
      if (call.mode == SwapMode::kSwap || call.mode == SwapMode::kClear) {
        mover.move(to + begin, taken, end - begin);
      } else {
        const float sign = call.mode == SwapMode::kAdd ? 1.0f : -1.0f;
        rows.add(to + begin, from + begin, taken, call.end - call.begin, sign);
      }
      if (!call.in_place && end < width) mover.move(to + end, from + end, width - end);
    }
  });
}

Tensor interchange(const Tensor& base, const Tensor& source, const std::vector<Tensor>& index,
                   int64_t mode, int64_t begin, int64_t end) {
  const SwapSizes n = check_swap(kOp, base, source, mode, begin, end);
  const SwapRows rows = KD_BEST_ISA(swap_rows)(base.scalar_type());
  Tensor out = empty_cpu(std::array<int64_t, 3>{n.batch, n.seq, n.hidden}, base.scalar_type());
  const SwapCall call{
      n, swap_index(kOp, index, n, false), static_cast<SwapMode>(mode), begin, end, false};
  each_position(call, rows, states_of(base, rows.element_bytes),
                states_of(source, rows.element_bytes), written_states(out, rows.element_bytes));
  return out;
}

void interchange_(Tensor base, const Tensor& source, const std::vector<Tensor>& index, int64_t mode,
                  int64_t begin, int64_t end) {
  const SwapSizes n = check_swap(kOp, base, source, mode, begin, end);
  const SwapRows rows = KD_BEST_ISA(swap_rows)(base.scalar_type());
  const SwapCall call{
      n, swap_index(kOp, index, n, false), static_cast<SwapMode>(mode), begin, end, true};
  each_position(call, rows, states_of(base, rows.element_bytes),
                states_of(source, rows.element_bytes), written_states(base, rows.element_bytes));
}

Tensor interchange_grad_base(const Tensor& grad, const std::vector<Tensor>& index, int64_t rows,
                             int64_t positions, int64_t begin, int64_t end) {
  const SwapSizes n = check_gradient(kOp, grad, rows, positions, begin, end);
  const SwapRows functions = KD_BEST_ISA(swap_rows)(grad.scalar_type());
  Tensor out = empty_cpu(std::array<int64_t, 3>{n.batch, n.seq, n.hidden}, grad.scalar_type());
  const SwapCall call{n, swap_index(kOp, index, n, false), SwapMode::kClear, begin, end, false};
  each_position(call, functions, states_of(grad, functions.element_bytes), {nullptr, 0, 0},
                written_states(out, functions.element_bytes));
  return out;
}

// The positions of the base that read a position of the source, in their order.
class Readers {
 public:
  Readers(const SwapIndex& index, const SwapSizes& sizes, const States<const char>& grad,
          int64_t begin)
      : index_(index), sizes_(sizes), grad_(grad), begin_(begin) {}

  const std::vector<const char*>& of(int64_t row, int64_t at) {
    found_.clear();
    if (index_.order != nullptr) {
      const int64_t place = row * sizes_.positions + at;
      for (int64_t i = index_.first[place]; i < index_.first[place + 1]; ++i) {
        const int64_t reader = index_.order[i];
        found_.push_back(grad_.at(reader / sizes_.seq, reader % sizes_.seq) + begin_);
      }
      return found_;
    }
    if (row != row_) {  // its spans are few of many
      row_ = row;
      spans_.clear();
      for (int64_t b = 0; b < sizes_.batch; ++b) {
        if (index_.reads(b, row)) spans_.push_back(b);
      }
    }
    for (const int64_t b : spans_) {
      const int64_t target = index_.target_of(sizes_, b, at);
      if (target >= 0) found_.push_back(grad_.at(b, target) + begin_);
    }
    return found_;
  }

 private:
  const SwapIndex& index_;
  const SwapSizes& sizes_;
  const States<const char>& grad_;
  int64_t begin_, row_ = -1;
  std::vector<int64_t> spans_;
  std::vector<const char*> found_;
};

Tensor interchange_grad_source(const Tensor& grad, const std::vector<Tensor>& index, int64_t rows,
                               int64_t positions, bool negative, int64_t begin, int64_t end) {
  const SwapSizes n = check_gradient(kOp, grad, rows, positions, begin, end);
  const SwapRows functions = KD_BEST_ISA(swap_rows)(grad.scalar_type());
  const SwapIndex from = swap_index(kOp, index, n, true);
  Tensor out = empty_cpu(std::array<int64_t, 3>{rows, positions, n.hidden}, grad.scalar_type());
  const int64_t unit = functions.element_bytes, width = n.hidden * unit;
  const States<const char> read = states_of(grad, unit);
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const bool stream = rows * positions * width >= kStreamBytes;
  torch::stable::parallel_for(0, rows * positions, grain(width), [&](int64_t first, int64_t last) {
    Mover mover(functions, stream);
    Readers readers(from, n, read, begin * unit);
    for (int64_t p = first; p < last; ++p) {
      char* to = data + p * width;
      const auto& found = readers.of(p / positions, p % positions);
      if (found.empty()) {
        mover.move(to, nullptr, width);
        continue;
      }
      if (begin > 0) mover.move(to, nullptr, begin * unit);
      if (found.size() == 1 && !negative) {
        mover.move(to + begin * unit, found[0], (end - begin) * unit);
      } else {
        functions.sum(to + begin * unit, found.data(), static_cast<int64_t>(found.size()),
                      end - begin, negative ? -1.0f : 1.0f);
      }
      if (end < n.hidden) mover.move(to + end * unit, nullptr, (n.hidden - end) * unit);
    }
  });
  return out;
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("interchange", TORCH_BOX(&kd::interchange));
  m.impl("interchange_", TORCH_BOX(&kd::interchange_));
  m.impl("interchange_grad_base", TORCH_BOX(&kd::interchange_grad_base));
  m.impl("interchange_grad_source", TORCH_BOX(&kd::interchange_grad_source));
}
