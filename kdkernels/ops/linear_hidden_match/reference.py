"""The definition of ``linear_hidden_match`` in PyTorch: the projected states in full."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.ops.hidden_match.reference import hidden_match_reference
from kdkernels.ops.hidden_match.spec import Spec


def linear_hidden_match_reference(
    student: Tensor,  # [rows, width]
    weight: Tensor,  # [teacher's width, width]
    bias: Tensor | None,  # [teacher's width]
    teacher: Tensor,  # [rows, teacher's width]
    mask: Tensor | None,  # [rows] bool
    row_weights: Tensor | None,  # [rows]
    denominator: Tensor | None,  # []
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(loss [], parts [2], rows [rows])``; see ``op.py``."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    states = student.to(dtype)
    if mask is not None:
        # What does not count may hold anything, and the weight's gradient would meet it.
        states = torch.where(mask[:, None], states, 0.0)
    projected = states @ weight.to(dtype).T
    if bias is not None:
        projected = projected + bias.to(dtype)
    return hidden_match_reference(
        [projected], [teacher], mask, row_weights, denominator, [1.0], spec
    )
