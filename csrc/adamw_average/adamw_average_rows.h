// Pieces of adamw_average on vectors; compiled once per instruction set by common/for_each_isa.h.

namespace kd::KD_ISA {

// `lanes` elements from i on. Called with kLanes as a constant, the stores are whole vectors.
template <typename P, typename G, bool kAverage, bool kMaster>
static inline __attribute__((always_inline)) void adamw_vector(const AdamwPiece& piece,
                                                               const AdamwNumbers& n, int64_t i,
                                                               int lanes) {
  P* param = reinterpret_cast<P*>(piece.param) + i;
  const G* grad = reinterpret_cast<const G*>(piece.grad) + i;
  const bool full = lanes == kLanes;
  const auto read = [&](const auto* p) __attribute__((always_inline)) {
    return full ? load(p) : load_first(p, lanes);
  };
  const Vec g = read(grad) * n.factor;
  Vec p;
  if constexpr (kMaster) {
    p = read(piece.master + i);
  } else {
    p = read(param);
  }
  Vec m = read(piece.exp_avg + i), v = read(piece.exp_avg_sq + i);
  // Not p * (1 - lr * weight_decay): that factor has three digits of the decay.
  p = fma(p, splat(-n.decay), p);
  m = fma(g - m, splat(n.beta1_rest), m);
  v = fma(g * g, splat(n.beta2_rest), v * n.beta2);
  p -= m * n.step_size / fma(sqrt(v), splat(n.root_scale), splat(n.eps));
  store_first(piece.exp_avg + i, m, lanes);
  store_first(piece.exp_avg_sq + i, v, lanes);
  store_first(param, p, lanes);
  if constexpr (kMaster) store_first(piece.master + i, p, lanes);
  if constexpr (kAverage) {
    if constexpr (!kMaster && !std::is_same_v<P, float>) {
      const auto rounded = convert<P>(p);
      P kept[kLanes];
      std::memcpy(kept, &rounded, sizeof(kept));
      p = load(kept);
    }
    const Vec old = read(piece.average + i);
    // A weight of 1 is a copy, not one within a rounding.
    store_first(piece.average + i, n.weight == 1.0f ? p : fma(p - old, splat(n.weight), old),
                lanes);
  }
}

template <typename P, typename G, bool kAverage, bool kMaster>
static void adamw_piece(const AdamwPiece& piece, const AdamwNumbers& numbers) {
  int64_t i = 0;
  for (; i + kLanes <= piece.count; i += kLanes) {
    adamw_vector<P, G, kAverage, kMaster>(piece, numbers, i, kLanes);
  }
  if (i < piece.count) {
    adamw_vector<P, G, kAverage, kMaster>(piece, numbers, i, static_cast<int>(piece.count - i));
  }
}

template <typename P, typename G>
static AdamwFunction adamw_with(bool average, bool master) {
  if constexpr (!std::is_same_v<P, float>) {
    if (master) return average ? &adamw_piece<P, G, true, true> : &adamw_piece<P, G, false, true>;
  }
  return average ? &adamw_piece<P, G, true, false> : &adamw_piece<P, G, false, false>;
}

static AdamwFunction adamw_function(AdamwDtypes d) {
  const bool wide = d.grad == TableDtype::kFloat;
  if (d.param == TableDtype::kBf16) {
    return wide ? adamw_with<Bf16, float>(d.average, d.master)
                : adamw_with<Bf16, Bf16>(d.average, d.master);
  }
  if (d.param == TableDtype::kHalf) {
    return wide ? adamw_with<Half, float>(d.average, d.master)
                : adamw_with<Half, Half>(d.average, d.master);
  }
  return adamw_with<float, float>(d.average, d.master);
}

}  // namespace kd::KD_ISA
