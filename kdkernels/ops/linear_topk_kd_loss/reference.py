"""The definition of ``linear_topk_kd_loss`` in PyTorch: the logits in full, then the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.ops.kd_loss.spec import Spec
from kdkernels.ops.linear_kd_loss.reference import logits_of
from kdkernels.ops.topk_kd_loss.reference import topk_kd_loss_reference


def linear_topk_kd_loss_reference(
    student: Tensor,  # [rows, width]
    student_weight: Tensor,  # [columns, width]
    student_bias: Tensor | None,  # [columns]
    topk_ids: Tensor,  # [rows, k] int64
    topk_logprobs: Tensor,  # [rows, k]
    labels: Tensor | None,  # [rows] int64
    row_weights: Tensor | None,  # [rows]
    denominator: Tensor | None,  # []
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(loss [], parts [4], rows [rows])``; see ``op.py`` for the contract."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    valid = None if labels is None else labels != spec.ignore_index
    logits = logits_of(student, student_weight, student_bias, valid, dtype)
    return topk_kd_loss_reference(
        logits, topk_ids, topk_logprobs, labels, row_weights, denominator, spec
    )
