"""What users call: losses with masks, reductions and papers' conventions, modules, presets."""

if __name__ != "kdkernels.api":
    # A script started in the repository root would otherwise load every class twice.
    raise ImportError("this folder is the import package kdkernels.api: import kdkernels instead")

from kdkernels.api import cache, compat, functional, nn
from kdkernels.api.backends import available_backends, explain, use_backend
from kdkernels.api.cache import TeacherCache, TeacherCacheWriter
from kdkernels.api.functional import (
    KDParts,
    TopK,
    attention_match_loss,
    confidence_penalty_loss,
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
from kdkernels.api.nn import (
    AttentionMatchLoss,
    ConfidencePenaltyLoss,
    KDLoss,
    LabelSmoothingLoss,
    LinearKDLoss,
    LinearTopKKDLoss,
    RelationMatchLoss,
    TfKDRegLoss,
    TfKDSelfLoss,
    TopKKDLoss,
)

__all__ = [
    "AttentionMatchLoss",
    "ConfidencePenaltyLoss",
    "KDLoss",
    "KDParts",
    "LabelSmoothingLoss",
    "LinearKDLoss",
    "LinearTopKKDLoss",
    "RelationMatchLoss",
    "TeacherCache",
    "TeacherCacheWriter",
    "TfKDRegLoss",
    "TfKDSelfLoss",
    "TopK",
    "TopKKDLoss",
    "attention_match_loss",
    "available_backends",
    "cache",
    "compat",
    "confidence_penalty_loss",
    "explain",
    "functional",
    "kd_loss",
    "label_smoothing_loss",
    "linear_kd_loss",
    "linear_topk_kd_loss",
    "multi_teacher_kd_loss",
    "nn",
    "relation_match_loss",
    "tfkd_reg_loss",
    "tfkd_self_loss",
    "topk_kd_loss",
    "topk_logprobs",
    "use_backend",
]
