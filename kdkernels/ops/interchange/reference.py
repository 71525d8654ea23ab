"""The definition of ``interchange`` in PyTorch: what every kernel is judged against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.ops.interchange.index import MAP_TENSORS, map_of_spans
from kdkernels.ops.interchange.spec import Mode


def interchange_reference(
    base: Tensor,  # [batch, seq, hidden]
    source: Tensor,  # [rows, positions, hidden]
    index: Sequence[Tensor],  # see index.py
    mode: int,
    begin: int,  # of the columns that are touched
    end: int,
) -> Tensor:
    """Returns ``[batch, seq, hidden]``; see ``op.py``."""
    rows, positions, hidden = source.shape
    sources = index[0]
    if len(index) != MAP_TENSORS:
        sources = map_of_spans(index, base.shape[1], rows, positions)
    if rows * positions == 0 or base.numel() == 0:
        return base + 0 * source.sum()  # nothing, but with a gradient for both
    # Wide, so that the gradients of those that read one position add up in it.
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    taken = source.to(wide).reshape(rows * positions, hidden)[sources.clamp(min=0)]
    if mode != Mode.SWAP:
        taken = base + taken if mode == Mode.ADD else base - taken
    columns = torch.arange(hidden, device=base.device)
    touched = (sources >= 0)[..., None] & (columns >= begin) & (columns < end)
    return torch.where(touched, taken.to(base.dtype), base)
