// topk_kd_loss on the CPU: the teacher's list and registration; see kd_loss_entry.h and
// kd_loss_row.h.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "kd_loss/kd_loss_entry.h"

#define KD_PER_ISA_FILE "topk_kd_loss/topk_kd_loss_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "topk_kd_loss";

struct Listed {
  const Tensor& ids;       // [rows, k] int64
  const Tensor& logprobs;  // [rows, k] float32
};

void open_list(const Listed& list, int64_t rows, KdLossCall& call) {
  const auto fits = [&](const Tensor& x, ScalarType dtype) {
    return x.dim() == 2 && x.size(0) == rows && x.size(1) == list.ids.size(1) &&
           x.is_contiguous() && x.scalar_type() == dtype;
  };
  STD_TORCH_CHECK(list.ids.dim() == 2 && fits(list.ids, ScalarType::Long), kOp,
                  ": topk_ids must be contiguous int64 [", rows, ", k]");
  STD_TORCH_CHECK(fits(list.logprobs, ScalarType::Float), kOp,
                  ": topk_logprobs must be contiguous float32 of the shape of topk_ids");
  call.topk_ids = static_cast<const int64_t*>(list.ids.const_data_ptr());
  call.topk_logprobs = static_cast<const float*>(list.logprobs.const_data_ptr());
  call.topk = list.ids.size(1);
  if (call.spec.divergence == Divergence::kNone) return;
  for (int64_t row = 0; row < rows; ++row) {
    if (call.labels != nullptr && call.labels[row] == call.spec.ignore_index) continue;
    for (int64_t k = 0; k < call.topk; ++k) {
      const int64_t id = call.topk_ids[row * call.topk + k];
      STD_TORCH_CHECK(-1 <= id && id < call.spec.classes, kOp, ": topk_ids must be in [0, ",
                      call.spec.classes, "), or -1 for no entry, got ", id, " in row ", row);
    }
  }
}

std::tuple<Tensor, Tensor> run(const Tensor& student, const Listed& list, const RowInputs& in,
                               const std::vector<double>& numbers, const Tensor* grad,
                               Tensor* row_losses) {
  STD_TORCH_CHECK(student.scalar_type() != ScalarType::Double, kOp,
                  ": student must be float32, bfloat16 or float16, got float64");
  KdLossCall call{};
  const int64_t valid = open_call(kOp, student, in, numbers, call);
  open_list(list, student.size(0), call);
  if (grad != nullptr) open_gradient(student, *grad, call);
  std::vector<RowTerms> terms(student.size(0));
  static const Rows function = KD_BEST_ISA(topk_kd_loss_rows);
  run_rows(call, in.row_weights, function, terms);
  return close_call<float>(call, terms, in.row_weights, valid, row_losses);
}

template <Gradient kGradient>
auto topk_kd_loss(Tensor student, const Tensor& topk_ids, const Tensor& topk_logprobs,
                  const MaybeTensor& labels, const MaybeTensor& row_weights,
                  const MaybeTensor& denominator, const std::vector<double>& spec) {
  return run_operator<kGradient>(kOp, student, [&](const Tensor* grad, Tensor* rows) {
    return run(student, {topk_ids, topk_logprobs}, {labels, row_weights, denominator}, spec, grad,
               rows);
  });
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("topk_kd_loss", TORCH_BOX(&kd::topk_kd_loss<kd::Gradient::kNone>));
  m.impl("topk_kd_loss_grad", TORCH_BOX(&kd::topk_kd_loss<kd::Gradient::kNew>));
  m.impl("topk_kd_loss_grad_", TORCH_BOX(&kd::topk_kd_loss<kd::Gradient::kInPlace>));
}
