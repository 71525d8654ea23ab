"""Launches the Triton kernel of ``hidden_match``; imports Triton at the first launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels._triton import device_guard
from kdkernels.ops.hidden_match.op import (
    gradient_offsets,
    hidden_match_forward,
    hidden_match_grad,
)
from kdkernels.ops.hidden_match.spec import Spec

_BLOCK = 2048  # 8 elements a thread, 16 bytes of bf16
_LAYERS = 32  # of one launch: pointers and numbers of a layer are kernel arguments


@hidden_match_forward.launcher("triton")
def hidden_match_triton(
    students: list[Tensor],
    teachers: list[Tensor],
    mask: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    weights: Sequence[float],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, parts and row losses; see ``op.py``."""
    return _run(students, teachers, mask, row_weights, denominator, weights, numbers, None)


@hidden_match_grad.launcher("triton")
def hidden_match_grad_triton(
    students: list[Tensor],
    teachers: list[Tensor],
    mask: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    weights: Sequence[float],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, parts and the gradients of all layers; see ``op.py``."""
    grad = students[0].new_empty((gradient_offsets(students)[-1],))
    loss, parts, _ = _run(
        students, teachers, mask, row_weights, denominator, weights, numbers, grad
    )
    return loss, parts, grad


def _run(
    students: list[Tensor],
    teachers: list[Tensor],
    mask: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    weights: Sequence[float],
    numbers: Sequence[float],
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = Spec.of(numbers)
    first, rows, layers = students[0], students[0].shape[0], len(students)
    count = first.new_zeros((), dtype=torch.float32)
    count = count + rows if mask is None else count + mask.sum()
    divisor = count if spec.mean else torch.ones_like(count)
    if denominator is not None:
        divisor = denominator
    divisor = torch.where(divisor == 0, 1.0, divisor)
    terms, weighted = first.new_empty((2, layers, rows), dtype=torch.float32)
    offsets = gradient_offsets(students)
    for begin in range(0, layers if rows > 0 else 0, _LAYERS):
        part = slice(begin, begin + _LAYERS)
        _launch(
            students[part],
            teachers[part],
            offsets[begin : min(begin + _LAYERS, layers)],
            weights[part],
            grad,
            terms[part],
            weighted[part],
            mask,
            row_weights,
            divisor,
            spec,
        )
    parts = torch.cat((terms.sum(1) / divisor, count[None]))
    return weighted.sum() / divisor, parts, weighted.sum(0)


def _launch(
    students: list[Tensor],
    teachers: list[Tensor],
    offsets: list[int],
    weights: Sequence[float],
    grad: Tensor | None,
    terms: Tensor,
    weighted: Tensor,
    mask: Tensor | None,
    row_weights: Tensor | None,
    divisor: Tensor,
    spec: Spec,
) -> None:
    """Of up to ``_LAYERS`` layers."""
    from kdkernels.ops.hidden_match.triton_kernels import match_rows_kernel

    rows, layers = students[0].shape[0], len(students)
    widest = max(x.shape[1] for x in students)
    block = min(max(16, 1 << (widest - 1).bit_length()), _BLOCK)
    with device_guard(students[0]):
        match_rows_kernel[(layers * rows,)](
            tuple(students),
            tuple(teachers),
            tuple(x.stride(0) for x in students),
            tuple(x.stride(0) for x in teachers),
            tuple(x.shape[1] for x in students),
            tuple(offsets),
            tuple(float(w) for w in weights),
            students[0] if grad is None else grad,
            terms,
            weighted,
            None if mask is None else mask.view(torch.uint8),
            row_weights,
            divisor,
            rows,
            float(spec.beta),
            LAYERS=layers,
            KIND=spec.kind,
            GRAD=grad is not None,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
