"""The definition of ``domain_prototypes`` in PyTorch: what every kernel is judged against."""

from __future__ import annotations

import torch
from torch import Tensor


def domain_prototypes_reference(
    hidden: Tensor,  # [batch, seq, columns]
    groups: Tensor,  # [batch] int64; outside of [0, n_groups): in no group
    mask: Tensor | None,  # [batch, seq] bool: positions that count
    n_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns means, sums and counts; see ``op.py``."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    states = hidden.to(wide)
    if mask is None:
        positions = torch.full_like(groups, hidden.shape[1])
    else:
        # Not multiplied away: a position that does not count may hold anything.
        states = torch.where(mask[:, :, None], states, 0.0)
        positions = mask.sum(1)
    means = states.sum(1) / positions.clamp(min=1).to(wide)[:, None]
    sums, counts = [], []
    for group in range(n_groups):  # index_add has no fixed order on a GPU
        member = (groups == group) & (positions > 0)
        sums.append(torch.where(member[:, None], means, 0.0).sum(0))
        counts.append(member.sum())
    return means, torch.stack(sums), torch.stack(counts)
