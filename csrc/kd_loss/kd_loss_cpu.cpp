// kd_loss on the CPU: which rows run, the teacher's logits, registration; the entry is in
// kd_loss_entry.h, the arithmetic of a row in kd_loss_row.h (float32, bfloat16, float16) and
// kd_loss_f64.h.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "kd_loss/kd_loss_entry.h"
#include "kd_loss/kd_loss_f64.h"

#define KD_PER_ISA_FILE "kd_loss/kd_loss_rows.h"
#include "common/for_each_isa.h"

namespace kd {

namespace {

constexpr const char* kOp = "kd_loss";

void rows_f64(const KdLossCall& call, ScalarType teacher_dtype, const double* row_weights,
              int64_t begin, int64_t end, RowTerms* terms) {
  RowF64 job(call);
  std::vector<double> teacher(call.spec.classes);
  for (int64_t row = begin; row < end; ++row) {
    double* grad = call.grad == nullptr
                       ? nullptr
                       : reinterpret_cast<double*>(call.grad) + row * call.grad_stride;
    const int64_t label = call.labels == nullptr ? -1 : call.labels[row];
    if (call.labels != nullptr && label == call.spec.ignore_index) {
      terms[row] = {0, 0, 0};
      if (grad != nullptr) std::fill(grad, grad + call.columns, 0.0);
      continue;
    }
    if (call.teacher != nullptr) {
      const int64_t step = bytes_of(teacher_dtype);
      const char* from = call.teacher + row * call.teacher_stride * step;
      for (size_t i = 0; i < teacher.size(); ++i) {
        teacher[i] = to_double(from + i * step, teacher_dtype);
      }
    }
    const double* student =
        reinterpret_cast<const double*>(call.student) + row * call.student_stride;
    const double weight = row_weights == nullptr ? 1.0 : row_weights[row];
    terms[row] = job.run(student, teacher.data(), label, weight * call.scale, grad);
  }
}

std::tuple<Tensor, Tensor> run(const Tensor& student,       // [rows, columns]
                               const MaybeTensor& teacher,  // the same rows
                               const RowInputs& in, const std::vector<double>& numbers,
                               const Tensor* grad, Tensor* row_losses) {
  KdLossCall call{};
  const int64_t valid = open_call(kOp, student, in, numbers, call);
  const int64_t rows = student.size(0);
  const bool f64 = student.scalar_type() == ScalarType::Double;
  open_teacher(kOp, student, teacher, call);
  const ScalarType teacher_dtype =
      call.teacher == nullptr ? student.scalar_type() : teacher->scalar_type();
  if (grad != nullptr) open_gradient(student, *grad, call);

  std::vector<RowTerms> terms(rows);
  if (f64) {
    const void* weights = in.row_weights.has_value() ? in.row_weights->const_data_ptr() : nullptr;
    torch::stable::parallel_for(0, rows, grain_of(call), [&](int64_t begin, int64_t end) {
      rows_f64(call, teacher_dtype, static_cast<const double*>(weights), begin, end, terms.data());
    });
    return close_call<double>(call, terms, in.row_weights, valid, row_losses);
  }
  static const Rows function = KD_BEST_ISA(kd_loss_rows);
  run_rows(call, in.row_weights, function, terms);
  return close_call<float>(call, terms, in.row_weights, valid, row_losses);
}

template <Gradient kGradient>
auto kd_loss(Tensor student, const MaybeTensor& teacher, const MaybeTensor& labels,
             const MaybeTensor& row_weights, const MaybeTensor& denominator,
             const std::vector<double>& spec) {
  return run_operator<kGradient>(kOp, student, [&](const Tensor* grad, Tensor* rows) {
    return run(student, teacher, {labels, row_weights, denominator}, spec, grad, rows);
  });
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("kd_loss", TORCH_BOX(&kd::kd_loss<kd::Gradient::kNone>));
  m.impl("kd_loss_grad", TORCH_BOX(&kd::kd_loss<kd::Gradient::kNew>));
  m.impl("kd_loss_grad_", TORCH_BOX(&kd::kd_loss<kd::Gradient::kInPlace>));
}
