// Where the positions of an interchange come from, for the CPU and the GPU; see index.py.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "common/check.h"

#if defined(__CUDACC__)
#define KD_BOTH __host__ __device__ __forceinline__
#else
#define KD_BOTH inline
#endif

namespace kd {

enum class SwapMode : int { kSwap = 0, kAdd = 1, kSubtract = 2, kClear = 3 };

// Sizes of base and source.
struct SwapSizes {
  int64_t batch, seq, hidden;
  int64_t rows, positions;
};

// One span a row of the base, or a map (or its inverse), never both.
struct SwapIndex {
  const int64_t* base_start;  // [batch] each, or null
  const int64_t* source_start;
  const int64_t* length;
  const int64_t* source_row;  // or null: each row its own
  const int64_t* map;         // [batch, seq]
  const int64_t* order;       // [batch * seq]
  const int64_t* first;       // [rows * positions + 1]

  // The position of the source that goes to a position of the base, or -1. Starts may be anything.
  KD_BOTH int64_t source_of(const SwapSizes& n, int64_t batch, int64_t at) const {
    if (map != nullptr) {
      const int64_t found = map[batch * n.seq + at];
      return found < n.rows * n.positions ? found : -1;
    }
    const int64_t step = at - base_start[batch], place = source_start[batch] + step;
    const int64_t row = source_row == nullptr ? batch : source_row[batch];
    const bool live = step >= 0 && step < length[batch] && place >= 0 && place < n.positions &&
                      row >= 0 && row < n.rows;
    return live ? row * n.positions + place : -1;
  }

  KD_BOTH bool reads(int64_t batch, int64_t row) const {
    return length[batch] > 0 && row == (source_row == nullptr ? batch : source_row[batch]);
  }

  // The position in its row of the base to which a span brings a position of the source, or -1.
  KD_BOTH int64_t target_of(const SwapSizes& n, int64_t batch, int64_t at) const {
    const int64_t step = at - source_start[batch], target = base_start[batch] + step;
    const bool live = step >= 0 && step < length[batch] && target >= 0 && target < n.seq;
    return live ? target : -1;
  }
};

inline const int64_t* check_index(const char* op, const Tensor& x, int64_t size) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.is_contiguous() && x.numel() == size, op,
                  ": index must be contiguous int64 of ", size, " elements, got dtype ",
                  static_cast<int>(x.scalar_type()), " of ", x.numel());
  return static_cast<const int64_t*>(x.const_data_ptr());
}

// `inverse`: of the two tensors that a map turned round is.
inline SwapIndex swap_index(const char* op, const std::vector<Tensor>& index, const SwapSizes& n,
                            bool inverse) {
  SwapIndex result{};
  const size_t mapped = inverse ? 2 : 1;
  STD_TORCH_CHECK(index.size() == mapped || index.size() == 3 || index.size() == 4, op,
                  ": index must be ", mapped, ", 3 or 4 tensors, got ", index.size());
  if (index.size() == mapped) {
    const int64_t* head = check_index(op, index[0], n.batch * n.seq);
    if (!inverse) {
      result.map = head;
    } else {
      result.order = head;
      result.first = check_index(op, index[1], n.rows * n.positions + 1);
    }
    return result;
  }
  result.base_start = check_index(op, index[0], n.batch);
  result.source_start = check_index(op, index[1], n.batch);
  result.length = check_index(op, index[2], n.batch);
  if (index.size() == 4) result.source_row = check_index(op, index[3], n.batch);
  return result;
}

// A tensor of rows of positions, whose columns are contiguous. Strides in elements.
template <typename T>
struct States {
  T* data;  // null: none
  int64_t row_stride, stride;

  KD_BOTH T* at(int64_t row, int64_t position) const {
    return data + row * row_stride + position * stride;
  }
};

inline void check_states(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": ", name, " must be [rows, positions, hidden], got ", x.dim(),
                  " dimensions");
  STD_TORCH_CHECK(x.stride(2) == 1 || x.size(2) <= 1, op, ": ", name,
                  " must have unit column stride, got ", x.stride(2));
}

// Base and source of the operators, and the columns.
inline SwapSizes check_swap(const char* op, const Tensor& base, const Tensor& source, int64_t mode,
                            int64_t begin, int64_t end) {
  check_states(op, "base", base);
  check_states(op, "source", source);
  STD_TORCH_CHECK(source.scalar_type() == base.scalar_type() && source.size(2) == base.size(2), op,
                  ": source must have dtype and columns of the base, ", base.size(2),
                  ", got dtype ", static_cast<int>(source.scalar_type()), " and ", source.size(2));
  STD_TORCH_CHECK(mode >= 0 && mode < 3, op, ": mode must be in [0, 3), got ", mode);
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= base.size(2), op, ": dims must be in [0, ",
                  base.size(2), "], got (", begin, ", ", end, ")");
  return {base.size(0), base.size(1), base.size(2), source.size(0), source.size(1)};
}

inline SwapSizes check_gradient(const char* op, const Tensor& grad, int64_t rows, int64_t positions,
                                int64_t begin, int64_t end) {
  check_states(op, "grad", grad);
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= grad.size(2), op, ": dims must be in [0, ",
                  grad.size(2), "], got (", begin, ", ", end, ")");
  return {grad.size(0), grad.size(1), grad.size(2), rows, positions};
}

}  // namespace kd
