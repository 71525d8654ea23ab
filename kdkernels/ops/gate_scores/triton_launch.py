"""Launches the Triton kernel of ``gate_scores``; imports Triton at the first launch."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._triton import device_guard
from kdkernels.ops.gate_scores.op import gate_scores_forward

_BLOCK = 256  # columns of a program: a warp reads 512 bytes of a row in bf16
_ROWS = 8  # that it reads at a time
_LEAST_ROWS, _MOST_ROWS = 32, 256  # of a program
_PROGRAMS = 1024  # with which every GPU is busy


@gate_scores_forward.launcher("triton")
def gate_scores_triton(
    activation: Tensor, grads: list[Tensor], mask: Tensor | None, width: int, examples: int
) -> Tensor:
    """Scores ``[gradients, groups]``; see ``op.py``."""
    from kdkernels.ops.gate_scores.triton_kernels import gate_scores_kernel

    rows, columns = activation.shape
    count = len(grads)
    if rows == 0:
        return activation.new_zeros((count, columns // width), dtype=torch.float32)
    example_rows = rows // examples
    block = min(max(16, 1 << (columns - 1).bit_length()), _BLOCK)
    blocks = -(-columns // block)
    part_rows = _LEAST_ROWS
    while part_rows < _MOST_ROWS and blocks * -(-rows // part_rows) > _PROGRAMS:
        part_rows *= 2
    parts = -(-example_rows // part_rows)
    sums = activation.new_empty((examples * parts, count, columns), dtype=torch.float32)
    second = grads[1] if count > 1 else None
    with device_guard(activation):
        gate_scores_kernel[(examples * parts * blocks,)](
            activation,
            grads[0],
            second,
            None if mask is None else mask.view(torch.uint8),
            sums,
            activation.stride(0),
            grads[0].stride(0),
            0 if second is None else second.stride(0),
            columns,
            example_rows,
            part_rows,
            parts,
            blocks,
            ROWS=_ROWS,
            BLOCK=block,
            num_warps=4,
        )
    dots = sums.view(examples, parts, count, columns // width, width).sum((1, 4))
    return dots.abs().sum(0)
