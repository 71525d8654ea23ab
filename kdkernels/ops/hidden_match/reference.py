"""The definition of ``hidden_match`` in PyTorch: what every kernel is judged against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.ops.hidden_match.spec import Kind, Spec


def hidden_match_reference(
    students: Sequence[Tensor],  # [rows, width of the layer]
    teachers: Sequence[Tensor],  # the same shapes
    mask: Tensor | None,  # [rows] bool: rows that count
    row_weights: Tensor | None,  # [rows]
    denominator: Tensor | None,  # []
    weights: Sequence[float],  # of the layers
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(loss [], parts [layers + 1], rows [rows])``; see ``op.py``."""
    dtype = torch.float64 if students[0].dtype == torch.float64 else torch.float32
    factor = students[0].new_ones(students[0].shape[0], dtype=dtype)
    if row_weights is not None:
        factor = row_weights.to(dtype)
    n_valid = factor.new_full((), factor.shape[0])
    if mask is not None:
        factor = torch.where(mask, factor, 0.0)
        n_valid = mask.sum().to(dtype)
    if denominator is not None:
        divisor = denominator.to(dtype)
    else:
        divisor = n_valid if spec.mean else torch.ones_like(n_valid)
    divisor = torch.where(divisor == 0, 1.0, divisor)
    layers = []
    for student, teacher in zip(students, teachers, strict=True):
        s, t = student.to(dtype), teacher.to(dtype)
        if mask is not None:
            # Not multiplied away: a row that does not count may hold anything.
            s, t = (torch.where(mask[:, None], x, 0.0) for x in (s, t))
        layers.append(factor * _distance(s, t, spec))
    rows = sum(w * row for w, row in zip(weights, layers, strict=True))
    assert isinstance(rows, Tensor)
    parts = torch.stack([*(row.sum() / divisor for row in layers), n_valid]).detach()
    return rows.sum() / divisor, parts, rows


def _distance(s: Tensor, t: Tensor, spec: Spec) -> Tensor:
    width = s.shape[1]
    if spec.kind == Kind.MSE.value:
        return (s - t).square().sum(1) / width
    if spec.kind == Kind.SMOOTH_L1.value:
        x = (s - t).abs()
        if spec.beta == 0.0:
            return x.sum(1) / width
        small = x < spec.beta
        return torch.where(small, x * x * (0.5 / spec.beta), x - 0.5 * spec.beta).sum(1) / width
    # Half the squared distance of the unit vectors is 1 - cos, and keeps its digits near 0.
    squares = (s * s).sum(1), (t * t).sum(1)
    live = (squares[0] != 0) & (squares[1] != 0)  # a row without a direction matches any
    inverse = [torch.where(live, square, 1.0).rsqrt()[:, None] for square in squares]
    distance = (s * inverse[0] - t * inverse[1]).square().sum(1)
    factor = 0.5 if spec.kind == Kind.COSINE.value else 1.0 / width
    return torch.where(live, factor * distance, 0.0)
