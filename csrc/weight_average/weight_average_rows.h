// Pieces of weight_average on vectors; compiled once per instruction set by common/for_each_isa.h.

namespace kd::KD_ISA {

// `lanes` elements from i on. Called with kLanes as a constant, the stores are whole vectors.
template <typename A, typename P, typename C, bool kCompensated>
static inline __attribute__((always_inline)) void average_vector(const AveragePiece& piece,
                                                                 float weight, int64_t i,
                                                                 int lanes) {
  A* average = reinterpret_cast<A*>(piece.average) + i;
  A* compensation = reinterpret_cast<A*>(piece.compensation) + i;
  const P* param = reinterpret_cast<const P*>(piece.param) + i;
  const bool full = lanes == kLanes;
  const auto read = [&](const auto* p) __attribute__((always_inline)) {
    return full ? load(p) : load_first(p, lanes);
  };
  Vec old = read(average);
  if constexpr (kCompensated) old += read(compensation);
  const Vec now = read(param);
  // A weight of 1 is a copy, not one within a rounding.
  const Vec value = weight == 1.0f ? now : old + (now - old) * weight;
  store_first(average, value, lanes);
  if constexpr (kCompensated) {
    const auto rounded = convert<A>(value);
    A kept[kLanes];
    std::memcpy(kept, &rounded, sizeof(kept));
    store_first(compensation, value - load(kept), lanes);
  }
  if (piece.copy != nullptr) store_first(reinterpret_cast<C*>(piece.copy) + i, value, lanes);
}

// Average, compensation and copy are of dtypes A, A and C; without a compensation A is float.
template <typename A, typename P, typename C, bool kCompensated>
static void average_piece(const AveragePiece& piece, float weight) {
  int64_t i = 0;
  for (; i + kLanes <= piece.count; i += kLanes) {
    average_vector<A, P, C, kCompensated>(piece, weight, i, kLanes);
  }
  if (i < piece.count) {
    average_vector<A, P, C, kCompensated>(piece, weight, i, static_cast<int>(piece.count - i));
  }
}

template <typename P>
static AverageFunction for_copy(TableDtype copy) {
  if (copy == TableDtype::kBf16) return &average_piece<float, P, Bf16, false>;
  if (copy == TableDtype::kHalf) return &average_piece<float, P, Half, false>;
  return &average_piece<float, P, float, false>;
}

// A 16-bit average, which is compensated and has no copy.
template <typename A>
static AverageFunction for_param(TableDtype param) {
  if (param == TableDtype::kBf16) return &average_piece<A, Bf16, float, true>;
  if (param == TableDtype::kHalf) return &average_piece<A, Half, float, true>;
  return &average_piece<A, float, float, true>;
}

static AverageFunction average_function(AverageDtypes d) {
  if (d.average == TableDtype::kBf16) return for_param<Bf16>(d.param);
  if (d.average == TableDtype::kHalf) return for_param<Half>(d.param);
  if (d.param == TableDtype::kBf16) return for_copy<Bf16>(d.copy);
  return d.param == TableDtype::kHalf ? for_copy<Half>(d.copy) : for_copy<float>(d.copy);
}

// A float32 average and a bfloat16 param: see weight_average_swap of op.py.
static void swap_wide(char* average, char* param, int64_t count, bool back) {
  uint32_t* bits = reinterpret_cast<uint32_t*>(average);
  uint16_t* half = reinterpret_cast<uint16_t*>(param);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t low = bits[i] & 0xffff, upper = bits[i] >> 16, given = half[i];
    const uint32_t up = low >> 15;  // rounded up, away from zero
    bits[i] = (back ? given - up : given) << 16 | low;
    half[i] = static_cast<uint16_t>(back ? upper : upper + up);
  }
}

// Elements of one dtype; count in bytes.
static void swap_same(char* average, char* param, int64_t count, bool) {
  for (int64_t i = 0; i < count; ++i) {
    const char kept = average[i];
    average[i] = param[i];
    param[i] = kept;
  }
}

static SwapFunction swap_function(bool wide) { return wide ? &swap_wide : &swap_same; }

}  // namespace kd::KD_ISA
