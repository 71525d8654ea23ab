// The rows of kd_loss; compiled once per instruction set by common/for_each_isa.h.

#include "kd_loss/kd_loss_row.h"

namespace kd::KD_ISA {

// Rows [begin, end) of a call; `scratch` holds scratch_floats(classes), 64-byte aligned.
void kd_loss_rows(const KdLossCall& call, int64_t begin, int64_t end, float* scratch,
                  RowTerms* terms) {
  switch (call.spec.divergence) {
    case Divergence::kNone:
      return with_softmax<Divergence::kNone>(call, begin, end, scratch, terms);
    case Divergence::kForwardKl:
      return with_softmax<Divergence::kForwardKl>(call, begin, end, scratch, terms);
    case Divergence::kSoftCe:
      return with_softmax<Divergence::kSoftCe>(call, begin, end, scratch, terms);
    case Divergence::kReverseKl:
      return with_softmax<Divergence::kReverseKl>(call, begin, end, scratch, terms);
    case Divergence::kJsd:
      return with_softmax<Divergence::kJsd>(call, begin, end, scratch, terms);
    case Divergence::kTvd:
      return with_softmax<Divergence::kTvd>(call, begin, end, scratch, terms);
    case Divergence::kSpike:
      return with_softmax<Divergence::kSpike>(call, begin, end, scratch, terms);
    case Divergence::kNegEntropy:
      return with_softmax<Divergence::kNegEntropy>(call, begin, end, scratch, terms);
    case Divergence::kListed:
    case Divergence::kListedEntropy:
      break;  // topk_kd_loss_rows.h
  }
}

}  // namespace kd::KD_ISA
