// Rows of domain_prototypes on vectors; compiled once per instruction set by common/for_each_isa.h.

namespace kd::KD_ISA {

// Rows that are summed up in registers: the sums of columns are loaded and stored once for all.
constexpr int kPrototypeUnroll = 4;

// Adds kRows rows to the sums of `count` columns. Of the sums behind them up to a vector is
// written, with anything.
template <int kRows, typename T>
static inline __attribute__((always_inline)) void add_rows(const T* const* rows, int64_t count,
                                                           float* sums, const T* const* next) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    if (next != nullptr && i % (64 / sizeof(T)) == 0) {
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(next[r] + i);
    }
    Vec x[kRows];
    for (int r = 0; r < kRows; ++r) {
      x[r] = lanes == kLanes ? load(rows[r] + i) : load_first(rows[r] + i, lanes);
    }
    for (int width = kRows / 2; width > 0; width /= 2) {
      for (int r = 0; r < width; ++r) x[r] += x[r + width];
    }
    store(sums + i, load(sums + i) + x[0]);
  }
}

template <int kRows>
static inline void add_rows(const double* const* rows, int64_t count, double* sums,
                            const double* const*) {
  for (int64_t i = 0; i < count; ++i) {
    for (int r = 0; r < kRows; ++r) sums[i] += rows[r][i];
  }
}

template <typename T>
static void prototype_piece(const PrototypeCall& call, const PrototypePiece& piece, void* to) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const T* live[kPrototypeRows];
  int count = 0;
  const bool* mask = call.mask == nullptr ? nullptr : call.mask + piece.example * call.sizes.seq;
  const T* first =
      reinterpret_cast<const T*>(call.hidden) + piece.example * call.example_stride + piece.column;
  for (int64_t row = piece.row; row < piece.row + piece.rows; ++row) {
    if (mask == nullptr || mask[row]) live[count++] = first + row * call.row_stride;
  }
  alignas(64) Sum sums[kPrototypeColumns] = {};
  int i = 0;
  for (; i + kPrototypeUnroll <= count; i += kPrototypeUnroll) {
    // Rows end where the hardware's own prefetch does not know the next.
    const bool more = i + 2 * kPrototypeUnroll <= count;
    add_rows<kPrototypeUnroll>(live + i, piece.columns, sums,
                               more ? live + i + kPrototypeUnroll : nullptr);
  }
  for (; i < count; ++i) {
    add_rows<1>(live + i, piece.columns, sums, static_cast<const T* const*>(nullptr));
  }
  std::copy(sums, sums + piece.columns, static_cast<Sum*>(to));
}

static PrototypeFunction prototype_function(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return &prototype_piece<float>;
    case ScalarType::BFloat16:
      return &prototype_piece<Bf16>;
    case ScalarType::Half:
      return &prototype_piece<Half>;
    case ScalarType::Double:
      return &prototype_piece<double>;
    default:
      STD_TORCH_CHECK(false, "domain_prototypes: hidden must be float32, bfloat16, float16 or ",
                      "float64, got dtype ", static_cast<int>(dtype));
  }
}

}  // namespace kd::KD_ISA
