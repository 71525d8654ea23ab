// topk_logprobs on the CPU: entry and registration; a row is in topk_logprobs_rows.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/check.h"
#include "common/empty.h"
#include "common/isa.h"
#include "topk_logprobs/topk_logprobs_cpu.h"

#define KD_PER_ISA_FILE "topk_logprobs/topk_logprobs_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "topk_logprobs";
constexpr int64_t kGrain = 16384;  // work worth a thread, in logits

using Rows = void (*)(const TopkCall&, int64_t, int64_t, TopkScratch&);

std::tuple<Tensor, Tensor, Tensor> topk_logprobs(const Tensor& x,  // [rows, columns]
                                                 int64_t k, const std::vector<double>& numbers) {
  check_rows(x, kOp, "x");
  STD_TORCH_CHECK(numbers.size() == kTopkSpecNumbers, kOp, ": spec must have ", kTopkSpecNumbers,
                  " numbers, got ", numbers.size());
  const int64_t rows = x.size(0), columns = x.size(1);
  const TopkSpec spec = make_topk_spec(numbers, columns);
  STD_TORCH_CHECK(1 <= spec.classes && spec.classes <= std::min<int64_t>(columns, INT32_MAX), kOp,
                  ": vocab_size must be at most ", std::min<int64_t>(columns, INT32_MAX), ", got ",
                  spec.classes);
  STD_TORCH_CHECK(1 <= k && k <= spec.classes, kOp, ": k must be in [1, ", spec.classes,
                  "], the number of classes, got ", k);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, kOp,
      ": x must be float32, bfloat16 or float16, got dtype ", static_cast<int>(dtype));
  Tensor ids = empty_cpu(std::array<int64_t, 2>{rows, k}, ScalarType::Long);
  Tensor logprobs = empty_cpu(std::array<int64_t, 2>{rows, k}, ScalarType::Float);
  Tensor tail = empty_cpu(std::array<int64_t, 1>{rows}, ScalarType::Float);
  const TopkCall call{spec,
                      k,
                      row_dtype(dtype),
                      static_cast<const char*>(x.const_data_ptr()),
                      x.stride(0),
                      static_cast<int64_t*>(ids.mutable_data_ptr()),
                      static_cast<float*>(logprobs.mutable_data_ptr()),
                      static_cast<float*>(tail.mutable_data_ptr())};
  static const Rows function = KD_BEST_ISA(topk_rows);
  const int64_t grain = std::max<int64_t>(1, kGrain / spec.classes);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    TopkScratch scratch(k, spec.classes);
    function(call, begin, end, scratch);
  });
  return {ids, logprobs, tail};
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("topk_logprobs", TORCH_BOX(&kd::topk_logprobs));
}
