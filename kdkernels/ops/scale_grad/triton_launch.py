"""Launches the Triton kernel of ``scale_grad_``; imports Triton at the first launch."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._triton import device_guard
from kdkernels.ops.scale_grad.op import scale_grad_

_BLOCK = 2048  # 8 elements a thread: 16 bytes of bf16
_PROGRAMS = 2048  # fills any GPU of today: 160 multiprocessors with 8 programs of 8 warps each


@scale_grad_.launcher("triton")
def scale_grad_triton(grad: Tensor, scale: Tensor) -> None:
    """Multiplies ``grad`` by the scalar tensor ``scale`` in place."""
    import triton.language as tl

    from kdkernels.ops.scale_grad.triton_kernels import scale_grad_kernel

    rows, columns = grad.shape
    if grad.numel() == 0:
        return
    with device_guard(grad):
        scale_grad_kernel[(min(rows * -(-columns // _BLOCK), _PROGRAMS),)](
            grad,
            scale,
            grad.stride(0),
            rows,
            columns,
            ACCUMULATE=tl.float64 if grad.dtype == torch.float64 else tl.float32,
            BLOCK=_BLOCK,
            num_warps=8,
        )
