"""Launches the Triton kernels of ``domain_prototypes``; imports Triton at the first launch."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._triton import device_guard
from kdkernels.ops.domain_prototypes.op import domain_prototypes_forward

_BLOCK = 256  # columns of a program: a warp reads 512 bytes of a row in bf16
_ROWS = 8  # that it reads at a time
_LEAST_ROWS, _MOST_ROWS = 32, 256  # of a program
_PROGRAMS = 1024  # with which every GPU is busy
_GROUP_BLOCK = 128  # columns of a program of the second launch
_RUN = 32  # examples that it adds up one after the other


@domain_prototypes_forward.launcher("triton")
def domain_prototypes_triton(
    hidden: Tensor, groups: Tensor, mask: Tensor | None, n_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, sums and counts; see ``op.py``."""
    from kdkernels.ops.domain_prototypes.triton_kernels import (
        group_sums_kernel,
        position_sums_kernel,
    )

    batch, seq, columns = hidden.shape
    block = min(max(16, 1 << (columns - 1).bit_length()), _BLOCK)
    blocks = -(-columns // block)
    part_rows = _LEAST_ROWS
    while part_rows < _MOST_ROWS and blocks * batch * -(-seq // part_rows) > _PROGRAMS:
        part_rows *= 2
    parts = max(1, -(-seq // part_rows))
    sums = hidden.new_empty((batch, parts, columns), dtype=torch.float32)
    positions = hidden.new_empty((batch, parts), dtype=torch.int32)
    means = hidden.new_empty((batch, columns), dtype=torch.float32)
    totals = hidden.new_empty((n_groups, columns), dtype=torch.float32)
    counts = hidden.new_empty((n_groups,), dtype=torch.int64)
    with device_guard(hidden):
        if batch > 0:
            position_sums_kernel[(batch * parts * blocks,)](
                hidden,
                None if mask is None else mask.view(torch.uint8),
                sums,
                positions,
                hidden.stride(0),
                hidden.stride(1),
                columns,
                seq,
                part_rows,
                parts,
                blocks,
                ROWS=_ROWS,
                BLOCK=block,
                num_warps=4,
            )
        block = min(block, _GROUP_BLOCK)
        blocks = -(-columns // block)
        group_sums_kernel[((n_groups + 1) * blocks,)](
            sums,
            positions,
            groups,
            means,
            totals,
            counts,
            columns,
            batch,
            parts,
            blocks,
            n_groups,
            BLOCK=block,
            RUN=_RUN,
            num_warps=1,
        )
    return means, totals, counts
