"""Kernel contracts: 2-D, per row, no conventions. Users call :mod:`kdkernels.api`."""

from kdkernels.ops import (
    adamw_average,
    domain_prototypes,
    gate_scores,
    hidden_match,
    interchange,
    kd_loss,
    kd_shard,
    linear_hidden_match,
    linear_kd_loss,
    linear_topk_kd_loss,
    relation_match,
    scale_grad,
    topk_kd_loss,
    topk_logprobs,
    weight_average,
)

__all__ = [
    "adamw_average",
    "domain_prototypes",
    "gate_scores",
    "hidden_match",
    "interchange",
    "kd_loss",
    "kd_shard",
    "linear_hidden_match",
    "linear_kd_loss",
    "linear_topk_kd_loss",
    "relation_match",
    "scale_grad",
    "topk_kd_loss",
    "topk_logprobs",
    "weight_average",
]
