"""The definition of ``gate_scores`` in PyTorch: what every kernel is judged against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gate_scores_reference(
    activation: Tensor,  # [rows, groups * width]
    grads: Sequence[Tensor],  # the same shape
    mask: Tensor | None,  # [rows] bool: rows that count
    width: int,
    examples: int,
) -> Tensor:
    """Returns ``[len(grads), groups]``; see ``op.py``."""
    wide = torch.float64 if activation.dtype == torch.float64 else torch.float32
    rows, columns = activation.shape
    if rows == 0:
        return activation.new_zeros((len(grads), columns // width), dtype=wide)
    scores = []
    for grad in grads:
        product = activation.to(wide) * grad.to(wide)
        if mask is not None:
            # Not multiplied away: a row that does not count may hold anything.
            product = torch.where(mask[:, None], product, 0.0)
        dots = product.reshape(examples, rows // examples, columns // width, width).sum((1, 3))
        scores.append(dots.abs().sum(0))
    return torch.stack(scores)
