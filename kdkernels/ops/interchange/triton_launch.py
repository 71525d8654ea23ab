"""Launches the Triton kernels of ``interchange``; imports Triton at the first launch."""

from __future__ import annotations

from torch import Tensor

from kdkernels._triton import device_guard
from kdkernels.ops.interchange.index import MAP_TENSORS
from kdkernels.ops.interchange.op import (
    interchange_,
    interchange_forward,
    interchange_grad_base,
    interchange_grad_source,
)

_BLOCK = 2048  # 8 elements a thread, 16 bytes of bf16
_CLEAR = 3  # besides the numbers of Mode


@interchange_forward.launcher("triton")
def interchange_triton(
    base: Tensor, source: Tensor, index: list[Tensor], mode: int, begin: int, end: int
) -> Tensor:
    """The base with positions of the source in it; see ``op.py``."""
    out = base.new_empty(base.shape)
    _launch(base, source, out, index, source.shape[0], source.shape[1], mode, begin, end)
    return out


@interchange_.launcher("triton")
def interchange_triton_(
    base: Tensor, source: Tensor, index: list[Tensor], mode: int, begin: int, end: int
) -> None:
    """The same in place."""
    _launch(base, source, base, index, source.shape[0], source.shape[1], mode, begin, end)


@interchange_grad_base.launcher("triton")
def interchange_grad_base_triton(
    grad: Tensor, index: list[Tensor], rows: int, positions: int, begin: int, end: int
) -> Tensor:
    """The gradient with zeros where the base was overwritten; see ``op.py``."""
    out = grad.new_empty(grad.shape)
    _launch(grad, None, out, index, rows, positions, _CLEAR, begin, end)
    return out


@interchange_grad_source.launcher("triton")
def interchange_grad_source_triton(
    grad: Tensor,
    index: list[Tensor],
    rows: int,
    positions: int,
    negative: bool,
    begin: int,
    end: int,
) -> Tensor:
    """What went to each position of the source; see ``op.py``."""
    from kdkernels.ops.interchange.triton_kernels import interchange_grad_source_kernel

    batch, seq, hidden = grad.shape
    out = grad.new_empty((rows, positions, hidden))
    if out.numel() == 0:
        return out
    turned = len(index) == MAP_TENSORS + 1
    spans = (None,) * 4 if turned else _spans(index)
    block, warps = _shape(hidden)
    blocks = -(-hidden // block)
    with device_guard(grad):
        interchange_grad_source_kernel[(rows * positions * blocks,)](
            grad,
            out,
            *spans,
            *(index if turned else (None, None)),
            grad.stride(0),
            grad.stride(1),
            batch,
            seq,
            positions,
            hidden,
            begin,
            end,
            blocks,
            NEGATIVE=negative,
            BLOCK=block,
            num_warps=warps,
        )
    return out


def _launch(
    base: Tensor,
    source: Tensor | None,
    out: Tensor,
    index: list[Tensor],
    rows: int,
    positions: int,
    mode: int,
    begin: int,
    end: int,
) -> None:
    from kdkernels.ops.interchange.triton_kernels import interchange_kernel

    batch, seq, hidden = base.shape
    if base.numel() == 0:
        return
    mapped = len(index) == MAP_TENSORS
    spans = (None,) * 4 if mapped else _spans(index)
    block, warps = _shape(hidden)
    blocks = -(-hidden // block)
    given = base if source is None else source
    with device_guard(base):
        interchange_kernel[(batch * seq * blocks,)](
            base,
            given,
            out,
            *spans,
            index[0] if mapped else None,
            base.stride(0),
            base.stride(1),
            given.stride(0),
            given.stride(1),
            out.stride(0),
            out.stride(1),
            seq,
            rows,
            positions,
            hidden,
            begin,
            end,
            blocks,
            MODE=mode,
            INPLACE=out is base,
            BLOCK=block,
            num_warps=warps,
        )


def _spans(index: list[Tensor]) -> tuple[Tensor | None, ...]:
    return (*index, None) if len(index) == 3 else tuple(index)


def _shape(hidden: int) -> tuple[int, int]:
    """Columns of a program, and its warps."""
    block = min(max(16, 1 << (hidden - 1).bit_length()), _BLOCK)
    return block, max(1, min(8, block // 256))
