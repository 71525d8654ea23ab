"""The Triton kernel of ``scale_grad_``."""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_grad_kernel(grad_ptr, scale_ptr, size, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiplies ``size`` dense elements by the scalar; reads and writes none when it is 1.

    The grid is capped and strides over the tensor: starting one program a block only to find a
    factor of 1 would take longer than the launch.
    """
    scale = tl.load(scale_ptr).to(ACCUMULATE)
    if scale != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, size, tl.num_programs(0) * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < size
            grad = tl.load(grad_ptr + offsets, mask=inside).to(ACCUMULATE) * scale
            tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=inside)
