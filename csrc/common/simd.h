// Vectors of KD_LANES floats, their exp, log, tanh and root, and loads and stores of other dtypes.
// Included by for_each_isa.h once per instruction set, hence no include guard.
//
// GCC vector types do the arithmetic; the library is compiled with -ffp-contract=off, so a product
// is fused into a sum only where fma() says so (p * a - q * b must be exactly 0 for equal terms).

namespace kd::KD_ISA {

constexpr int kLanes = KD_LANES;

typedef float Vec __attribute__((vector_size(KD_LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(KD_LANES * 4)));
typedef uint32_t UintVec __attribute__((vector_size(KD_LANES * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(KD_LANES * 2)));
// The same in memory, at any address.
typedef float VecAt __attribute__((vector_size(KD_LANES * 4), aligned(4), may_alias));
typedef int32_t IntVecAt __attribute__((vector_size(KD_LANES * 4), aligned(4), may_alias));
typedef uint16_t ShortVecAt __attribute__((vector_size(KD_LANES * 2), aligned(2), may_alias));

#define KD_INLINE static inline __attribute__((always_inline))

KD_INLINE Vec splat(float x) { return x - Vec{}; }
KD_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAt*>(p); }
KD_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecAt*>(p) = x; }
KD_INLINE IntVec load(const int32_t* p) { return *reinterpret_cast<const IntVecAt*>(p); }
KD_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
KD_INLINE Vec select(IntVec mask, Vec a, Vec b) { return mask ? a : b; }

// A comparison that is used twice; as IntVec, GCC makes two of it.
#if KD_LANES == 16
using Mask = __mmask16;
KD_INLINE Vec select(Mask mask, Vec a, Vec b) {
  return (Vec)_mm512_mask_blend_ps(mask, (__m512)b, (__m512)a);
}
KD_INLINE Mask not_less(Vec x, float y) {
  return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(y), _CMP_NLT_UQ);
}
KD_INLINE Mask above(Vec x, Vec y) { return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GT_OQ); }
KD_INLINE Mask same(Vec x, Vec y) { return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_EQ_OQ); }
// A bit for each lane, the first lane's lowest, and back.
KD_INLINE uint32_t bits(Mask mask) { return mask; }
KD_INLINE Mask lanes_of(uint32_t bits) { return static_cast<Mask>(bits); }
#else
using Mask = IntVec;
KD_INLINE Mask not_less(Vec x, float y) { return ~(x < y); }
KD_INLINE Mask above(Vec x, Vec y) { return x > y; }
KD_INLINE Mask same(Vec x, Vec y) { return x == y; }
KD_INLINE uint32_t bits(Mask mask) {
#if KD_LANES == 8
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)mask);
#else
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= (mask[i] & 1u) << i;
  return found;
#endif
}
KD_INLINE Mask lanes_of(uint32_t bits) {
  IntVec mask;
  for (int i = 0; i < kLanes; ++i) mask[i] = (bits >> i & 1) != 0 ? -1 : 0;
  return mask;
}
#endif

// Stores the lanes in `lanes` of both vectors one behind the other, and what follows them anyhow:
// up to a whole vector is written. Returns their number.
KD_INLINE int compress(Vec x, IntVec y, uint32_t lanes, float* to_x, int32_t* to_y) {
#if KD_LANES == 16
  // Not to memory at once: that takes 100 cycles and more on Zen 4.
  const Mask mask = static_cast<Mask>(lanes);
  _mm512_storeu_ps(to_x, _mm512_maskz_compress_ps(mask, (__m512)x));
  _mm512_storeu_si512(to_y, _mm512_maskz_compress_epi32(mask, (__m512i)y));
  return __builtin_popcount(lanes);
#else
  int count = 0;
  for (; lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    to_x[count] = x[lane];
    to_y[count++] = y[lane];
  }
  return count;
#endif
}

KD_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if KD_LANES == 16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif KD_LANES == 8
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

KD_INLINE Vec sqrt(Vec x) {
#if KD_LANES == 16
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif KD_LANES == 8
  return (Vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (Vec)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

KD_INLINE float sum(Vec x) {
#if KD_LANES == 16
  return _mm512_reduce_add_ps((__m512)x);
#else
  float v[kLanes];
  store(v, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
#endif
}

KD_INLINE float max_lane(Vec x) {
#if KD_LANES == 16
  return _mm512_reduce_max_ps((__m512)x);
#else
  float v[kLanes];
  store(v, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] = v[i + width] > v[i] ? v[i + width] : v[i];
  }
  return v[0];
#endif
}

KD_INLINE int32_t sum(IntVec x) {
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

KD_INLINE IntVec lane_numbers() {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// Lanes below `count`.
KD_INLINE IntVec first_lanes(int count) { return lane_numbers() < count; }

// A factor as a sum of two floats, so that x * factor keeps its fraction bits.
struct Split {
  Vec hi, lo;
};
KD_INLINE Split split(double x) {
  const float hi = static_cast<float>(x);
  return {splat(hi), splat(static_cast<float>(x - hi))};
}

// 2^r - 1 for |r| <= 0.5 (2e-9 relative), and n, e with x = n + r, 2^n = e.
// The rounding constant leaves n in the low bits of the float, from where it moves to the exponent.
struct Exp2Parts {
  Vec minus_one, n;
  IntVec exponent;
};
KD_INLINE Exp2Parts exp2_parts(Vec x, Split factor) {
  const Vec rounder = splat(12582912.0f);  // 1.5 * 2^23
  const Vec shifted = fma(x, factor.hi, rounder);
  const Vec n = shifted - rounder;
  const Vec r = fma(x, factor.lo, fma(x, factor.hi, -n));
  Vec q = splat(1.5353337e-4f);
  q = fma(q, r, splat(1.3398902e-3f));
  q = fma(q, r, splat(9.6184378e-3f));
  q = fma(q, r, splat(5.5503324e-2f));
  q = fma(q, r, splat(2.4022648e-1f));
  q = fma(q, r, splat(6.9314718e-1f));
  return {q * r, n, (IntVec)shifted << 23};
}

// 2^(x * factor) for x <= 0, within 2 ulp; 0 below 2^-126, so -inf gives exactly 0; NaN stays NaN.
// `live` becomes the lanes that are not 0.
KD_INLINE Vec exp2_scaled(Vec x, Split factor, Mask* live) {
#if KD_LANES == 16
  // Powers of 2^(1/16) from a register: two fused multiply-adds less than the polynomial, whose
  // number bounds the speed. The rounding constant leaves 16 n in the low bits; shifted, they carry
  // floor(n) to the exponent and k = 16 n mod 16 into the mantissa, which the table makes up for.
  const UintVec power = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                         0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                         0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};  // 2^(k/16) - (k << 19)
  const Vec rounder = splat(786432.0f);                                    // 1.5 * 2^19
  const Vec shifted = fma(x, factor.hi, rounder);
  const Vec n = shifted - rounder;
  const Vec r = fma(x, factor.lo, fma(x, factor.hi, -n));
  Vec q = splat(5.5505954e-2f);  // 2^r - 1 for |r| <= 1/32, 2e-9
  q = fma(q, r, splat(2.4023430e-1f));
  q = fma(q, r, splat(6.9314718e-1f));
  const __m512i entry = _mm512_permutexvar_epi32((__m512i)shifted, (__m512i)power);
  // Unsigned: lanes that are not live may overflow.
  const Vec scale = (Vec)((UintVec)entry + ((UintVec)shifted << 19));
  *live = not_less(n, -126.0f);
  return select(*live, fma(scale, q * r, scale), Vec{});
#else
  const Exp2Parts e = exp2_parts(x, factor);
  const Vec y = (Vec)((UintVec)(e.minus_one + 1.0f) + (UintVec)e.exponent);  // as above
  *live = not_less(e.n, -126.0f);
  return select(*live, y, Vec{});
#endif
}

// log(x) for normal x > 0, within 2 ulp also near 1 (log(1) is exactly 0).
KD_INLINE Vec log(Vec x) {
  const IntVec bits = (IntVec)x;
  // Mantissa in [sqrt(1/2), sqrt(2)), so that x near 1 has exponent 0.
  const IntVec shifted = bits - 0x3f3504f3;
  const Vec n = __builtin_convertvector(shifted >> 23, Vec);
  const Vec f = (Vec)((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec p = splat(-7.6343104e-2f);
  p = fma(p, f, splat(1.2761502e-1f));
  p = fma(p, f, splat(-1.3160218e-1f));
  p = fma(p, f, splat(1.4201771e-1f));
  p = fma(p, f, splat(-1.6623355e-1f));
  p = fma(p, f, splat(2.0001227e-1f));
  p = fma(p, f, splat(-2.5000823e-1f));
  p = fma(p, f, splat(3.3333331e-1f));
  const Vec f2 = f * f;
  const Vec tail = fma(p * f, f2, f2 * -0.5f);
  return fma(n, splat(0.693359375f), f + fma(n, splat(-2.12194440e-4f), tail));
}

// tanh by expm1, so that small arguments keep their relative accuracy.
KD_INLINE Vec tanh(Vec x) {
  const IntVec negative = x < 0.0f;
  const Vec magnitude = select(negative, -x, x);
  const Exp2Parts e = exp2_parts(magnitude, split(-2.8853900817779268));  // -2 log2(e)
  const Vec power = (Vec)(e.exponent + 0x3f800000);
  const Vec expm1 = fma(power, e.minus_one, power - 1.0f);
  const Vec t = select(e.n < -30.0f, splat(1.0f), -expm1 / (2.0f + expm1));
  return select(negative, -t, t);
}

// bfloat16 and half in memory.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

KD_INLINE Vec load(const Bf16* p) {
#if KD_LANES == 16
  // One permutation instead of widening and shifting: word i to the upper half of lane i.
  const UintVec lane = {0,        1 << 16,  2 << 16,  3 << 16, 4 << 16,  5 << 16,
                        6 << 16,  7 << 16,  8 << 16,  9 << 16, 10 << 16, 11 << 16,
                        12 << 16, 13 << 16, 14 << 16, 15 << 16};
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)lane,
                                             _mm512_castsi256_si512(raw));
#else
  const ShortVec raw = *reinterpret_cast<const ShortVecAt*>(p);
  return (Vec)(__builtin_convertvector(raw, UintVec) << 16);
#endif
}

KD_INLINE ShortVec to_bf16(Vec x) {
  const UintVec bits = (UintVec)x;
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const IntVec nan = x != x;
  return __builtin_convertvector(nan ? (UintVec)(IntVec{} + 0x7fc0) : rounded, ShortVec);
}

KD_INLINE Vec load(const Half* p) {
#if KD_LANES == 16
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif KD_LANES == 8
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) {
    x[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(p[i].bits);
  }
  return x;
#endif
}

KD_INLINE ShortVec to_half(Vec x) {
#if KD_LANES == 16
  return (ShortVec)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif KD_LANES == 8
  return (ShortVec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  ShortVec y;
  for (int i = 0; i < kLanes; ++i) {
    y[i] = torch::headeronly::detail::fp16_ieee_from_fp32_value(x[i]);
  }
  return y;
#endif
}

// The first `count` elements from p on; the other lanes hold anything.
template <typename T>
KD_INLINE Vec load_first(const T* p, int count) {
#if KD_LANES == 16
  // A masked load: going through memory would stall on the narrower stores before it.
  if constexpr (std::is_same_v<T, float>) {
    return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  }
#endif
  T copy[kLanes] = {};
  std::memcpy(copy, p, count * sizeof(T));
  return load(copy);
}

// Floats as the dtype Out.
template <typename Out>
KD_INLINE auto convert(Vec x) {
  if constexpr (std::is_same_v<Out, float>) return x;
  if constexpr (std::is_same_v<Out, Bf16>) return to_bf16(x);
  if constexpr (std::is_same_v<Out, Half>) return to_half(x);
}

template <typename Out>
KD_INLINE void store_first(Out* p, Vec x, int count) {
  const auto y = convert<Out>(x);
  std::memcpy(p, &y, count * sizeof(Out));
}

// Stores past the cache: a gradient of gigabytes must not evict the rows still to be read, nor be
// read itself before it is overwritten. `p` is aligned to the vector.
KD_INLINE void stream(float* p, Vec x) {
#if KD_LANES == 16
  _mm512_stream_ps(p, (__m512)x);
#elif KD_LANES == 8
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}

KD_INLINE void stream(uint16_t* p, ShortVec x) {
#if KD_LANES == 16
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)x);
#elif KD_LANES == 8
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)x);
#else
  *reinterpret_cast<ShortVecAt*>(p) = x;
#endif
}

KD_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

#undef KD_INLINE

}  // namespace kd::KD_ISA
