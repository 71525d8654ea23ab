// One row of scale_grad on vectors; compiled once per instruction set by common/for_each_isa.h.

namespace kd::KD_ISA {

template <typename T>
static void scale_row(char* row, int64_t count, float factor) {
  T* g = reinterpret_cast<T*>(row);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_first(g + i, load(g + i) * factor, kLanes);
  if (i < count) store_first(g + i, load_first(g + i, count - i) * factor, count - i);
}

static auto scale_function(ScalarType dtype) -> void (*)(char*, int64_t, float) {
  switch (dtype) {
    case ScalarType::Float:
      return &scale_row<float>;
    case ScalarType::BFloat16:
      return &scale_row<Bf16>;
    case ScalarType::Half:
      return &scale_row<Half>;
    default:
      STD_TORCH_CHECK(false, "scale_grad: grad must be float32, bfloat16, float16 or float64, got ",
                      "dtype ", static_cast<int>(dtype));
  }
}

}  // namespace kd::KD_ISA
