"""The Triton kernel of ``scale_grad_``."""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_grad_kernel(
    grad_ptr,  # [rows, columns]
    scale_ptr,  # []
    stride,
    rows,
    columns,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiplies every element by the scalar; reads and writes none when it is 1.

    The grid is capped and strides over the tensor: starting a program for every block only to
    find a factor of 1 would take longer than the launch.
    """
    scale = tl.load(scale_ptr).to(ACCUMULATE)
    if scale != 1.0:
        blocks = tl.cdiv(columns, BLOCK)
        for tile in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
            row = (tile // blocks).to(tl.int64)
            cols = (tile % blocks) * BLOCK + tl.arange(0, BLOCK)
            pointers = grad_ptr + row * stride + cols
            grad = tl.load(pointers, mask=cols < columns).to(ACCUMULATE) * scale
            tl.store(pointers, grad.to(grad_ptr.dtype.element_ty), mask=cols < columns)
