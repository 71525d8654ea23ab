// Blocks of a row of logits on the CPU, as floats. Included by the files that for_each_isa.h
// compiles once per instruction set, hence no include guard.

namespace kd::KD_ISA {

// Bytes by which memory is asked for before it is used. The hardware's own prefetch stops at the
// end of each 4 KB page: 6.5 ms without this, 3.8 ms with it (512 x 32000 float32, 2 cores; 2
// KB: 5.5 ms).
constexpr int64_t kAhead = 8192;
constexpr double kLog2E = 1.4426950408889634;

static inline float max_of_block(const float* x, int n) {
  Vec m0 = load(x), m1 = m0;
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    m0 = max(load(x + i), m0);
    m1 = max(load(x + i + kLanes), m1);
  }
  for (; i < n; i += kLanes) m0 = max(load(x + i), m0);
  return max_lane(max(m0, m1));
}

// Scale, soft-cap; a masked class (-inf) stays masked.
static inline Vec transform(Vec x, float scale, float cap) {
  Vec z = x * scale;
  if (cap != 0.0f) {
    const IntVec masked = z == -__builtin_inff();
    z = select(masked, z, cap * tanh(z / cap));
  }
  return z;
}

// Floats of `n` logits from p on, padded with -inf to whole vectors: p itself where nothing has to
// be done, else `buffer`.
template <typename T>
static const float* load_block(const char* row, int64_t column, int n, float scale, float cap,
                               float* buffer) {
  const T* p = reinterpret_cast<const T*>(row) + column;
  const bool as_is = scale == 1.0f && cap == 0.0f;
  const int whole = n / kLanes * kLanes;
  if constexpr (std::is_same_v<T, float>) {
    if (as_is && whole == n) return p;
  }
  for (int i = 0; i < whole; i += kLanes) {
    store(buffer + i, as_is ? load(p + i) : transform(load(p + i), scale, cap));
  }
  if (whole < n) {
    const Vec tail = load_first(p + whole, n - whole);
    store(buffer + whole, select(first_lanes(n - whole), as_is ? tail : transform(tail, scale, cap),
                                 splat(-__builtin_inff())));
  }
  return buffer;
}

// The memory side of a row, by dtype: one indirect call a block keeps the arithmetic out of the
// dtype's templates.
using LoadBlock = const float* (*)(const char*, int64_t, int, float, float, float*);

static LoadBlock loader(Dtype dtype) {
  if (dtype == Dtype::kBf16) return &load_block<Bf16>;
  if (dtype == Dtype::kHalf) return &load_block<Half>;
  return &load_block<float>;
}

}  // namespace kd::KD_ISA
