"""The definition of ``linear_kd_loss`` in PyTorch: the logits in full, then ``kd_loss``."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.ops.kd_loss.reference import kd_loss_reference
from kdkernels.ops.kd_loss.spec import Spec


def linear_kd_loss_reference(
    student: Tensor,  # [rows, student width]
    student_weight: Tensor,  # [columns, student width]
    student_bias: Tensor | None,  # [columns]
    teacher: Tensor | None,  # [rows, teacher width]
    teacher_weight: Tensor | None,  # [columns, teacher width]
    teacher_bias: Tensor | None,  # [columns]
    labels: Tensor | None,  # [rows] int64
    row_weights: Tensor | None,  # [rows]
    denominator: Tensor | None,  # []
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(loss [], parts [4], rows [rows])``; see ``op.py`` for the contract."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    valid = None if labels is None else labels != spec.ignore_index
    student_logits = logits_of(student, student_weight, student_bias, valid, dtype)
    teacher_logits = None
    if teacher is not None and teacher_weight is not None:
        teacher_logits = logits_of(teacher, teacher_weight, teacher_bias, valid, dtype)
    return kd_loss_reference(student_logits, teacher_logits, labels, row_weights, denominator, spec)


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Logits in ``dtype``, 0 (or the bias) for rows that are not valid."""
    x = hidden.to(dtype)
    if valid is not None:  # an ignored row may hold NaN, which the weight's gradient would meet
        x = x.masked_fill(~valid[:, None], 0.0)
    logits = x @ weight.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)
