"""What users call: losses with masks, reductions and papers' conventions, modules, presets."""

if __name__ != "kdkernels.api":
    # A script started in the repository root would otherwise load every class twice.
    raise ImportError("this folder is the import package kdkernels.api: import kdkernels instead")

from kdkernels.api import cache, compat, functional, nn, optim, parallel
from kdkernels.api.averaging import WeightAverager, ema_update_, swa_update_
from kdkernels.api.backends import available_backends, explain, use_backend
from kdkernels.api.cache import TeacherCache, TeacherCacheWriter
from kdkernels.api.capture import Capture
from kdkernels.api.counterfactual import Counterfactual
from kdkernels.api.domain_prototypes import domain_prototypes
from kdkernels.api.functional import (
    KDParts,
    MatchParts,
    TopK,
    attention_match_loss,
    confidence_penalty_loss,
    hidden_match_loss,
    hidden_match_many,
    kd_loss,
    label_smoothing_loss,
    linear_kd_loss,
    linear_topk_kd_loss,
    multi_teacher_kd_loss,
    relation_match_loss,
    tfkd_reg_loss,
    tfkd_self_loss,
    topk_kd_loss,
    topk_logprobs,
)
from kdkernels.api.gate_scores import gate_scores
from kdkernels.api.interchange import interchange, interchange_at, interchange_subspace
from kdkernels.api.intervention import Interchange, Positions, Spans
from kdkernels.api.layers import LayerMap, Projections
from kdkernels.api.methods import (
    DIITO,
    SWA,
    AlignedLayers,
    Alignment,
    DIITOParts,
    LabelRegulariser,
    MetaKD,
    MetaKDParts,
    MetaTeacher,
    MetaTeacherParts,
    SparseTeacher,
    TeacherScores,
    expertise_weights,
    masked_positions,
    sample_positions,
    sample_spans,
)
from kdkernels.api.nn import (
    AttentionMatchLoss,
    ConfidencePenaltyLoss,
    HiddenMatchLoss,
    HiddenMatchMany,
    KDLoss,
    LabelSmoothingLoss,
    LinearKDLoss,
    LinearTopKKDLoss,
    RelationMatchLoss,
    TfKDRegLoss,
    TfKDSelfLoss,
    TopKKDLoss,
)
from kdkernels.api.optim import AdamWAverage
from kdkernels.api.parallel import global_valid_count
from kdkernels.api.prototypes import instance_scores, prototype_scores

__all__ = [
    "DIITO",
    "SWA",
    "AdamWAverage",
    "AlignedLayers",
    "Alignment",
    "AttentionMatchLoss",
    "Capture",
    "ConfidencePenaltyLoss",
    "Counterfactual",
    "DIITOParts",
    "HiddenMatchLoss",
    "HiddenMatchMany",
    "Interchange",
    "KDLoss",
    "KDParts",
    "LabelRegulariser",
    "LabelSmoothingLoss",
    "LayerMap",
    "LinearKDLoss",
    "LinearTopKKDLoss",
    "MatchParts",
    "MetaKD",
    "MetaKDParts",
    "MetaTeacher",
    "MetaTeacherParts",
    "Positions",
    "Projections",
    "RelationMatchLoss",
    "Spans",
    "SparseTeacher",
    "TeacherCache",
    "TeacherCacheWriter",
    "TeacherScores",
    "TfKDRegLoss",
    "TfKDSelfLoss",
    "TopK",
    "TopKKDLoss",
    "WeightAverager",
    "attention_match_loss",
    "available_backends",
    "cache",
    "compat",
    "confidence_penalty_loss",
    "domain_prototypes",
    "ema_update_",
    "expertise_weights",
    "explain",
    "functional",
    "gate_scores",
    "global_valid_count",
    "hidden_match_loss",
    "hidden_match_many",
    "instance_scores",
    "interchange",
    "interchange_at",
    "interchange_subspace",
    "kd_loss",
    "label_smoothing_loss",
    "linear_kd_loss",
    "linear_topk_kd_loss",
    "masked_positions",
    "multi_teacher_kd_loss",
    "nn",
    "optim",
    "parallel",
    "prototype_scores",
    "relation_match_loss",
    "sample_positions",
    "sample_spans",
    "swa_update_",
    "tfkd_reg_loss",
    "tfkd_self_loss",
    "topk_kd_loss",
    "topk_logprobs",
    "use_backend",
]
