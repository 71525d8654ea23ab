// Rows of interchange on vectors; compiled once per instruction set by common/for_each_isa.h.

namespace kd::KD_ISA {

// Moves bytes, or writes zeros without a source; past the cache where that is wanted.
static void move_row(char* to, const char* from, int64_t bytes, bool stream_it) {
  constexpr int64_t kBytes = kLanes * sizeof(float);
  int64_t i = 0;
  if (stream_it) {
    const int64_t behind = reinterpret_cast<uintptr_t>(to) % kBytes;
    const int64_t head = behind == 0 ? 0 : kBytes - behind;
    if (head + kBytes <= bytes && (reinterpret_cast<uintptr_t>(to) & 3) == 0) {
      from == nullptr ? std::memset(to, 0, head) : std::memcpy(to, from, head);
      for (i = head; i + kBytes <= bytes; i += kBytes) {
        const Vec x = from == nullptr ? Vec{} : load(reinterpret_cast<const float*>(from + i));
        stream(reinterpret_cast<float*>(to + i), x);
      }
    }
  }
  if (i == bytes) return;
  from == nullptr ? std::memset(to + i, 0, bytes - i) : std::memcpy(to + i, from + i, bytes - i);
}

// out = a + sign * b; out may be a.
template <typename T>
static void add_row(char* out, const char* a, const char* b, int64_t count, float sign) {
  T* to = reinterpret_cast<T*>(out);
  const T *x = reinterpret_cast<const T*>(a), *y = reinterpret_cast<const T*>(b);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_first(to + i, load(x + i) + load(y + i) * sign, kLanes);
  }
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    store_first(to + i, load_first(x + i, rest) + load_first(y + i, rest) * sign, rest);
  }
}

// out = sign * the sum of rows, in their order.
template <typename T>
static void sum_rows(char* out, const char* const* rows, int64_t n, int64_t count, float sign) {
  T* to = reinterpret_cast<T*>(out);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    Vec sum{};
    for (int64_t r = 0; r < n; ++r) {
      const T* row = reinterpret_cast<const T*>(rows[r]) + i;
      sum += lanes == kLanes ? load(row) : load_first(row, lanes);
    }
    store_first(to + i, sum * sign, lanes);
  }
}

static SwapRows swap_rows(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return {4, &move_row, &stream_fence, &add_row<float>, &sum_rows<float>};
    case ScalarType::BFloat16:
      return {2, &move_row, &stream_fence, &add_row<Bf16>, &sum_rows<Bf16>};
    case ScalarType::Half:
      return {2, &move_row, &stream_fence, &add_row<Half>, &sum_rows<Half>};
    case ScalarType::Double:
      return {8, &move_row, &stream_fence, &add_doubles, &sum_doubles};
    default:
      STD_TORCH_CHECK(false, "interchange: base must be float32, bfloat16, float16 or float64, ",
                      "got dtype ", static_cast<int>(dtype));
  }
}

}  // namespace kd::KD_ISA
