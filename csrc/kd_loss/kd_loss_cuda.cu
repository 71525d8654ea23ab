// kd_loss on the GPU: the divergences and the registration. The kernels are in kd_loss_kernel.cuh,
// their launches in kd_loss_launch.cuh.

#include <torch/csrc/stable/library.h>

#include "kd_loss/kd_loss_launch.cuh"

namespace kd {

namespace {

constexpr const char* kOp = "kd_loss";

const auto dispatch_divergence = []<typename Body>(Divergence divergence, const Body& body) {
  switch (divergence) {
    case Divergence::kNone:
      return body.template operator()<Divergence::kNone>();
    case Divergence::kForwardKl:
      return body.template operator()<Divergence::kForwardKl>();
    case Divergence::kSoftCe:
      return body.template operator()<Divergence::kSoftCe>();
    case Divergence::kReverseKl:
      return body.template operator()<Divergence::kReverseKl>();
    case Divergence::kJsd:
      return body.template operator()<Divergence::kJsd>();
    case Divergence::kTvd:
      return body.template operator()<Divergence::kTvd>();
    case Divergence::kSpike:
      return body.template operator()<Divergence::kSpike>();
    case Divergence::kNegEntropy:
      return body.template operator()<Divergence::kNegEntropy>();
    case Divergence::kListed:
    case Divergence::kListedEntropy:
      break;
  }
  STD_TORCH_CHECK(false, kOp, ": divergence must be one of 0 to 7, got ",
                  static_cast<int>(divergence));
};

template <Gradient kGradient>
auto kd_loss(Tensor student, MaybeTensor teacher, MaybeTensor labels, MaybeTensor row_weights,
             MaybeTensor denominator, std::vector<double> spec) {
  const Inputs in{kOp,          student,      teacher,
                  std::nullopt, std::nullopt, labels,
                  row_weights,  denominator,  checked_spec(kOp, student, spec)};
  return run_operator<kGradient>(in, dispatch_divergence);
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("kd_loss", TORCH_BOX(&kd::kd_loss<kd::Gradient::kNone>));
  m.impl("kd_loss_grad", TORCH_BOX(&kd::kd_loss<kd::Gradient::kNew>));
  m.impl("kd_loss_grad_", TORCH_BOX(&kd::kd_loss<kd::Gradient::kInPlace>));
}
