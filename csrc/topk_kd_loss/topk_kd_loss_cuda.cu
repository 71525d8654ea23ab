// topk_kd_loss on the GPU: the registration. The kernels are those of kd_loss with a list for a
// teacher.

#include <torch/csrc/stable/library.h>

#include "kd_loss/kd_loss_launch.cuh"

namespace kd {

namespace {

constexpr const char* kOp = "topk_kd_loss";

const auto dispatch_listed = []<typename Body>(Divergence divergence, const Body& body) {
  switch (divergence) {
    case Divergence::kListed:
      return body.template operator()<Divergence::kListed>();
    case Divergence::kListedEntropy:
      return body.template operator()<Divergence::kListedEntropy>();
    default:
      return body.template operator()<Divergence::kNone>();
  }
};

template <Gradient kGradient>
auto topk_kd_loss(Tensor student, Tensor topk_ids, Tensor topk_logprobs, MaybeTensor labels,
                  MaybeTensor row_weights, MaybeTensor denominator, std::vector<double> spec) {
  const Inputs in{kOp,         student,       std::nullopt,
                  topk_ids,    topk_logprobs, labels,
                  row_weights, denominator,   checked_spec(kOp, student, spec)};
  return run_operator<kGradient>(in, dispatch_listed);
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("topk_kd_loss", TORCH_BOX(&kd::topk_kd_loss<kd::Gradient::kNone>));
  m.impl("topk_kd_loss_grad", TORCH_BOX(&kd::topk_kd_loss<kd::Gradient::kNew>));
  m.impl("topk_kd_loss_grad_", TORCH_BOX(&kd::topk_kd_loss<kd::Gradient::kInPlace>));
}
