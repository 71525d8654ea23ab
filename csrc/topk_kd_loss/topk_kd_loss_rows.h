// The rows of topk_kd_loss: those of kd_loss with a list for a teacher. Compiled once per
// instruction set by common/for_each_isa.h.

#include "kd_loss/kd_loss_row.h"

namespace kd::KD_ISA {

// Rows [begin, end) of a call; `scratch` holds scratch_floats(classes), 64-byte aligned.
void topk_kd_loss_rows(const KdLossCall& call, int64_t begin, int64_t end, float* scratch,
                       RowTerms* terms) {
  switch (call.spec.listed()) {
    case Divergence::kListed:
      return with_softmax<Divergence::kListed>(call, begin, end, scratch, terms);
    case Divergence::kListedEntropy:
      return with_softmax<Divergence::kListedEntropy>(call, begin, end, scratch, terms);
    default:
      return with_softmax<Divergence::kNone>(call, begin, end, scratch, terms);
  }
}

}  // namespace kd::KD_ISA
