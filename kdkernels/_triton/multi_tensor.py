"""Device functions of kernels over lists of tensors; see ``kdkernels/ops/_shared/multi_tensor.py``.

A row of the table ends with the number of elements and the chunks up to and with its tensor.
"""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(table_ptr, tensors, chunk, COLUMNS: tl.constexpr):
    """The first row of the table whose chunks end behind this one."""
    low = tl.full((), 0, tl.int64)
    high = tl.full((), 0, tl.int64) + tensors - 1
    while low < high:
        middle = (low + high) // 2
        behind = tl.load(table_ptr + COLUMNS * middle + COLUMNS - 1) > chunk
        high = tl.where(behind, middle, high)
        low = tl.where(behind, low, middle + 1)
    return table_ptr + COLUMNS * low


@triton.jit
def chunk_of(row_ptr, chunk, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """Its first element, and the number of elements of the tensor."""
    size = tl.load(row_ptr + COLUMNS - 2)
    chunks = (size + CHUNK - 1) // CHUNK
    first = (chunk - (tl.load(row_ptr + COLUMNS - 1) - chunks)) * CHUNK
    return first, size


@triton.jit
def tensor_at(address, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The address as a pointer to float32, bfloat16 or float16."""
    if KIND == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    # What the compiler cannot know of an address that it reads.
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer
