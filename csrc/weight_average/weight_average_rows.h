// Pieces of weight_average on vectors; compiled once per instruction set by common/for_each_isa.h.

namespace kd::KD_ISA {

// Average, compensation and copy are of dtypes A, A and C; without a compensation A is float.
template <typename A, typename P, typename C, bool kCompensated>
static void average_piece(const AveragePiece& piece, float weight) {
  A* average = reinterpret_cast<A*>(piece.average);
  A* compensation = reinterpret_cast<A*>(piece.compensation);
  const P* param = reinterpret_cast<const P*>(piece.param);
  C* copy = reinterpret_cast<C*>(piece.copy);
  const bool whole = weight == 1.0f;  // a copy, not one within a rounding
  for (int64_t i = 0; i < piece.count; i += kLanes) {
    const int lanes = static_cast<int>(piece.count - i < kLanes ? piece.count - i : kLanes);
    const bool full = lanes == kLanes;
    Vec old = full ? load(average + i) : load_first(average + i, lanes);
    if constexpr (kCompensated) {
      old += full ? load(compensation + i) : load_first(compensation + i, lanes);
    }
    const Vec now = full ? load(param + i) : load_first(param + i, lanes);
    const Vec value = whole ? now : old + (now - old) * weight;
    store_first(average + i, value, lanes);
    if constexpr (kCompensated) {
      const auto rounded = convert<A>(value);
      A kept[kLanes];
      std::memcpy(kept, &rounded, sizeof(kept));
      store_first(compensation + i, value - load(kept), lanes);
    }
    if (copy != nullptr) store_first(copy + i, value, lanes);
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
