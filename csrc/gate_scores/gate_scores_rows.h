// Rows of gate_scores on vectors; compiled once per instruction set by common/for_each_isa.h.

namespace kd::KD_ISA {

// Rows whose products are summed up in registers: their sums are loaded and stored once for all.
constexpr int kGateUnroll = 2;

template <typename T>
using GateSum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Where the columns of some rows begin: of the activation, then of the gradients.
template <typename T, int kGrads>
struct GateRows {
  const T* at[1 + kGrads][kGateUnroll];
};

template <typename T, int kGrads>
static inline GateRows<T, kGrads> gate_rows(const GateCall& call, const int64_t* rows, int count,
                                            int64_t column) {
  GateRows<T, kGrads> found{};
  for (int r = 0; r < count; ++r) {
    found.at[0][r] =
        reinterpret_cast<const T*>(call.activation) + rows[r] * call.activation_stride + column;
    for (int k = 0; k < kGrads; ++k) {
      found.at[1 + k][r] =
          reinterpret_cast<const T*>(call.grads[k]) + rows[r] * call.grad_strides[k] + column;
    }
  }
  return found;
}

// Adds the products of kRows rows to the sums of `count` columns. Of the sums behind them up to a
// vector is written, with anything.
template <int kRows, typename T, int kGrads>
static inline __attribute__((always_inline)) void add_products(const GateRows<T, kGrads>& rows,
                                                               int64_t count,
                                                               float (*sums)[kGateColumns],
                                                               const GateRows<T, kGrads>* next) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    if (next != nullptr && i % (64 / sizeof(T)) == 0) {
      for (int k = 0; k <= kGrads; ++k) {
        for (int r = 0; r < kRows; ++r) __builtin_prefetch(next->at[k][r] + i);
      }
    }
    Vec found[kGrads] = {};
    for (int r = 0; r < kRows; ++r) {
      const bool all = lanes == kLanes;
      const Vec a = all ? load(rows.at[0][r] + i) : load_first(rows.at[0][r] + i, lanes);
      for (int k = 0; k < kGrads; ++k) {
        const T* p = rows.at[1 + k][r] + i;
        found[k] = fma(a, all ? load(p) : load_first(p, lanes), found[k]);
      }
    }
    for (int k = 0; k < kGrads; ++k) store(sums[k] + i, load(sums[k] + i) + found[k]);
  }
}

template <int kRows, int kGrads>
static inline void add_products(const GateRows<double, kGrads>& rows, int64_t count,
                                double (*sums)[kGateColumns], const GateRows<double, kGrads>*) {
  for (int k = 0; k < kGrads; ++k) {
    for (int r = 0; r < kRows; ++r) {
      const double *a = rows.at[0][r], *b = rows.at[1 + k][r];
      for (int64_t i = 0; i < count; ++i) sums[k][i] += a[i] * b[i];
    }
  }
}

// The sums of products over `count` rows.
template <typename T, int kGrads>
static void sum_columns(const GateCall& call, const int64_t* rows, int count, int64_t column,
                        int64_t columns, GateSum<T> (*sums)[kGateColumns]) {
  for (int k = 0; k < kGrads; ++k) std::fill(sums[k], sums[k] + kGateColumns, GateSum<T>{});
  int i = 0;
  GateRows<T, kGrads> here = gate_rows<T, kGrads>(call, rows, std::min(count, kGateUnroll), column);
  for (; i + kGateUnroll <= count; i += kGateUnroll) {
    const int more = std::min(count - i - kGateUnroll, kGateUnroll);
    const GateRows<T, kGrads> next =
        gate_rows<T, kGrads>(call, rows + i + kGateUnroll, more, column);
    // Rows end where the hardware's own prefetch does not know the next.
    add_products<kGateUnroll>(here, columns, sums, more == kGateUnroll ? &next : nullptr);
    here = next;
  }
  for (; i < count; ++i) {
    const GateRows<T, kGrads> one = gate_rows<T, kGrads>(call, rows + i, 1, column);
    add_products<1>(one, columns, sums, static_cast<const GateRows<T, kGrads>*>(nullptr));
  }
}

// Four sums side by side: one would lose digits over a thousand columns.
static inline float sum_of(const float* x, int64_t count) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) sums[k] += load(x + i + k * kLanes);
  }
  for (; i + kLanes <= count; i += kLanes) sums[0] += load(x + i);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) total += x[i];
  return total;
}

static inline double sum_of(const double* x, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += x[i];
  return total;
}

// The rows of [first, last) that count; returns their number.
static inline int live_rows(const bool* mask, int64_t first, int64_t last, int64_t* rows) {
  int count = 0;
  for (int64_t row = first; row < last; ++row) {
    if (mask == nullptr || mask[row]) rows[count++] = row;
  }
  return count;
}

// Writes what groups of a piece have for |sum| or, of part of an example, for sum.
template <typename T, int kGrads>
static void gate_piece(const GateCall& call, const GatePiece& piece, void* to, int64_t stride) {
  using Sum = GateSum<T>;
  const int64_t width = call.sizes.width, groups = piece.columns / width;
  const int64_t rows = piece.whole ? call.sizes.example_rows() : piece.rows;
  Sum* out = static_cast<Sum*>(to);
  for (int k = 0; k < kGrads; ++k) std::fill(out + k * stride, out + k * stride + groups, Sum{});
  alignas(64) Sum sums[kGrads][kGateColumns];
  int64_t live[kGateRows];
  for (int64_t first = piece.row; first < piece.row + piece.rows; first += rows) {
    const int count = live_rows(call.mask, first, first + rows, live);
    Sum wide[kGrads] = {};  // of one group that is wider than the sums
    for (int64_t at = 0; at < piece.columns; at += kGateColumns) {
      const int64_t columns = std::min(kGateColumns, piece.columns - at);
      sum_columns<T, kGrads>(call, live, count, piece.column + at, columns, sums);
      for (int k = 0; k < kGrads; ++k) {
        if (groups == 1) {
          wide[k] += sum_of(sums[k], columns);
          continue;
        }
        for (int64_t g = 0; g < groups; ++g) {
          const Sum dot = width == 1 ? sums[k][g] : sum_of(sums[k] + g * width, width);
          out[k * stride + g] += piece.whole ? std::abs(dot) : dot;
        }
      }
    }
    if (groups != 1) continue;
    for (int k = 0; k < kGrads; ++k) {
      out[k * stride] += piece.whole ? std::abs(wide[k]) : wide[k];
    }
  }
}

template <typename T>
static GateFunction for_grads(int grads) {
  return grads == 1 ? &gate_piece<T, 1> : &gate_piece<T, 2>;
}

static GateFunction gate_function(ScalarType dtype, int grads) {
  switch (dtype) {
    case ScalarType::Float:
      return for_grads<float>(grads);
    case ScalarType::BFloat16:
      return for_grads<Bf16>(grads);
    case ScalarType::Half:
      return for_grads<Half>(grads);
    case ScalarType::Double:
      return for_grads<double>(grads);
    default:
      STD_TORCH_CHECK(false, "gate_scores: activation must be float32, bfloat16, float16 or ",
                      "float64, got dtype ", static_cast<int>(dtype));
  }
}

}  // namespace kd::KD_ISA
