// Rows of hidden_match on vectors; compiled once per instruction set by common/for_each_isa.h.

namespace kd::KD_ISA {

// Bytes by which memory is asked for before it is used: the hardware's own prefetch stops at the
// end of each 4 KB page.
constexpr int64_t kMatchAhead = 4096;

// Stores up to a vector of a gradient, past the cache where that is wanted and possible.
template <typename T>
static inline __attribute__((always_inline)) void put(T* p, Vec x, bool stream_it) {
  if (!stream_it) return store_first(p, x, kLanes);
  if constexpr (std::is_same_v<T, float>) {
    stream(p, x);
  } else {
    stream(reinterpret_cast<uint16_t*>(p), convert<T>(x));
  }
}

template <typename T>
static inline __attribute__((always_inline)) bool streams(const T* p, bool wanted) {
  return wanted && reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(T)) == 0;
}

// Lanes beyond `count` become 0.
template <typename T>
static inline __attribute__((always_inline)) Vec load_part(const T* p, int count) {
  return select(first_lanes(count), load_first(p, count), Vec{});
}

// Calls body(column, lanes) over a row: `kUnroll` whole vectors at a time where they are.
template <typename Body>
static inline __attribute__((always_inline)) void each_vector(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    body(i, kLanes, 0);
    body(i + kLanes, kLanes, 1);
  }
  for (; i < width; i += kLanes) {
    body(i, static_cast<int>(width - i < kLanes ? width - i : kLanes), 0);
  }
}

// mse and smooth_l1: what each element adds to the distance, and its derivative.
template <MatchKind kKind>
static inline __attribute__((always_inline)) Vec term(Vec x, float beta, float half_over_beta,
                                                      Vec* derivative) {
  if constexpr (kKind == MatchKind::kMse) {
    *derivative = x * 2.0f;
    return x * x;
  } else {
    const Vec size = x < 0.0f ? -x : x;
    const IntVec small = size < beta;
    const Vec sign = select(x > 0.0f, splat(1.0f), select(x < 0.0f, splat(-1.0f), x));
    *derivative = select(small, x * (2.0f * half_over_beta), sign);
    return select(small, x * x * half_over_beta, size - 0.5f * beta);
  }
}

template <MatchKind kKind, typename S, typename T, bool kGrad>
static float element_row(const S* s, const T* t, S* grad, int64_t width, const MatchCall& call,
                         float scale) {
  const bool stream_it = kGrad && streams(grad, call.stream);
  const float per_width = 1.0f / width, factor = scale * per_width;
  const float half_over_beta = call.beta > 0.0f ? 0.5f / call.beta : 0.0f;
  Vec sums[2] = {};
  each_vector(width, [&](int64_t i, int lanes, int which) {
    Vec derivative;
    if (lanes == kLanes) {
      if (i % (64 / sizeof(S)) == 0) {
        __builtin_prefetch(reinterpret_cast<const char*>(s + i) + kMatchAhead);
        __builtin_prefetch(reinterpret_cast<const char*>(t + i) + kMatchAhead);
      }
      const Vec x = load(s + i) - load(t + i);
      sums[which] += term<kKind>(x, call.beta, half_over_beta, &derivative);
      if constexpr (kGrad) put(grad + i, derivative * factor, stream_it);
    } else {
      const Vec x = load_part(s + i, lanes) - load_part(t + i, lanes);
      const Vec found = term<kKind>(x, call.beta, half_over_beta, &derivative);
      sums[which] += select(first_lanes(lanes), found, Vec{});
      if constexpr (kGrad) store_first(grad + i, derivative * factor, lanes);
    }
  });
  return sum(sums[0] + sums[1]) * per_width;
}

// cosine and pkd. The second pass finds the row in the cache. Sums leave their lanes for double
// after kBlock columns: with few lanes, those of a wide row would lose digits of the norms.
template <MatchKind kKind, typename S, typename T, bool kGrad>
static float direction_row(const S* s, const T* t, S* grad, int64_t width, const MatchCall& call,
                           float scale) {
  constexpr int64_t kBlock = 1024;
  double square_s = 0.0, square_t = 0.0, dot = 0.0;
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    Vec ss[2] = {}, tt[2] = {}, st[2] = {};
    each_vector(std::min(kBlock, width - begin), [&](int64_t column, int lanes, int which) {
      const int64_t i = begin + column;
      if (lanes == kLanes && i % (64 / sizeof(S)) == 0) {
        __builtin_prefetch(reinterpret_cast<const char*>(s + i) + kMatchAhead);
        __builtin_prefetch(reinterpret_cast<const char*>(t + i) + kMatchAhead);
      }
      const Vec a = lanes == kLanes ? load(s + i) : load_part(s + i, lanes);
      const Vec b = lanes == kLanes ? load(t + i) : load_part(t + i, lanes);
      ss[which] = fma(a, a, ss[which]);
      tt[which] = fma(b, b, tt[which]);
      st[which] = fma(a, b, st[which]);
    });
    square_s += sum(ss[0] + ss[1]);
    square_t += sum(tt[0] + tt[1]);
    dot += sum(st[0] + st[1]);
  }
  if (square_s == 0.0 || square_t == 0.0) {  // no direction
    if constexpr (kGrad) std::memset(grad, 0, width * sizeof(S));
    return 0.0f;
  }
  const double exact_s = 1.0 / std::sqrt(square_s), exact_t = 1.0 / std::sqrt(square_t);
  const float inverse_s = exact_s, inverse_t = exact_t, cosine = dot * exact_s * exact_t;
  // d(1 - cos)/ds = (cos * s/|s| - t/|t|) / |s|
  const double factor = kKind == MatchKind::kCosine ? 0.5 : 1.0 / width;
  const float outer = 2.0 * factor * scale * exact_s;
  const bool stream_it = kGrad && streams(grad, call.stream);
  double distance = 0.0;
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    Vec sums[2] = {};
    each_vector(std::min(kBlock, width - begin), [&](int64_t column, int lanes, int which) {
      const int64_t i = begin + column;
      const Vec a = (lanes == kLanes ? load(s + i) : load_part(s + i, lanes)) * inverse_s;
      const Vec b = (lanes == kLanes ? load(t + i) : load_part(t + i, lanes)) * inverse_t;
      const Vec x = a - b;
      sums[which] = fma(x, x, sums[which]);
      if constexpr (kGrad) {
        const Vec g = (a * cosine - b) * outer;
        if (lanes == kLanes) {
          put(grad + i, g, stream_it);
        } else {
          store_first(grad + i, g, lanes);
        }
      }
    });
    distance += sum(sums[0] + sums[1]);
  }
  return factor * distance;
}

template <MatchKind kKind, typename S, typename T>
static void match_rows(const MatchCall& call, const MatchLayer& layer, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const S* s = reinterpret_cast<const S*>(layer.student) + row * layer.student_stride;
    const T* t = reinterpret_cast<const T*>(layer.teacher) + row * layer.teacher_stride;
    S* grad =
        layer.grad == nullptr ? nullptr : reinterpret_cast<S*>(layer.grad) + row * layer.width;
    if (call.mask != nullptr && !call.mask[row]) {
      layer.terms[row] = 0.0f;
      if (grad != nullptr) std::memset(grad, 0, layer.width * sizeof(S));
      continue;
    }
    const float weight = call.row_weights == nullptr ? 1.0f : call.row_weights[row];
    const float scale = weight * layer.scale;
    float found;
    if constexpr (is_direction(kKind)) {
      found = grad != nullptr
                  ? direction_row<kKind, S, T, true>(s, t, grad, layer.width, call, scale)
                  : direction_row<kKind, S, T, false>(s, t, grad, layer.width, call, scale);
    } else {
      found = grad != nullptr
                  ? element_row<kKind, S, T, true>(s, t, grad, layer.width, call, scale)
                  : element_row<kKind, S, T, false>(s, t, grad, layer.width, call, scale);
    }
    layer.terms[row] = found;
  }
  if (call.stream) stream_fence();
}

template <typename S, typename T>
static MatchRows for_kind(MatchKind kind) {
  switch (kind) {
    case MatchKind::kMse:
      return &match_rows<MatchKind::kMse, S, T>;
    case MatchKind::kSmoothL1:
      return &match_rows<MatchKind::kSmoothL1, S, T>;
    case MatchKind::kCosine:
      return &match_rows<MatchKind::kCosine, S, T>;
    default:
      return &match_rows<MatchKind::kPkd, S, T>;
  }
}

template <typename S>
static MatchRows for_teacher(MatchKind kind, ScalarType teacher) {
  if (teacher == ScalarType::BFloat16) return for_kind<S, Bf16>(kind);
  return teacher == ScalarType::Half ? for_kind<S, Half>(kind) : for_kind<S, float>(kind);
}

static MatchRows match_function(MatchKind kind, ScalarType student, ScalarType teacher) {
  if (student == ScalarType::BFloat16) return for_teacher<Bf16>(kind, teacher);
  return student == ScalarType::Half ? for_teacher<Half>(kind, teacher)
                                     : for_teacher<float>(kind, teacher);
}

}  // namespace kd::KD_ISA
