"""Triton kernels of ``weight_average``: one program owns one chunk of one tensor."""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels._triton.multi_tensor import chunk_of, row_of, tensor_at

_COLUMNS = tl.constexpr(6)  # of the table


@triton.jit
def _average_block(
    row_ptr,
    weight,
    first,
    size,
    AVERAGE: tl.constexpr,
    PARAM: tl.constexpr,
    COPY: tl.constexpr,
    COMPENSATED: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # the block is, and all tensors begin on 16-byte boundaries
):
    at = first + tl.arange(0, BLOCK)
    inside = None if WHOLE else at < size
    average_ptr = tensor_at(tl.load(row_ptr), AVERAGE, WHOLE) + at
    old = tl.load(average_ptr, mask=inside).to(tl.float32)
    if COMPENSATED:
        rest_ptr = tensor_at(tl.load(row_ptr + 2), AVERAGE, WHOLE) + at
        old += tl.load(rest_ptr, mask=inside).to(tl.float32)
    param_ptr = tensor_at(tl.load(row_ptr + 1), PARAM, WHOLE) + at
    now = tl.load(param_ptr, mask=inside).to(tl.float32)
    # A weight of 1 is a copy, not one within a rounding.
    value = tl.where(weight == 1.0, now, old + weight * (now - old))
    rounded = value.to(average_ptr.dtype.element_ty)
    tl.store(average_ptr, rounded, mask=inside)
    if COMPENSATED:
        rest = value - rounded.to(tl.float32)
        tl.store(rest_ptr, rest.to(rest_ptr.dtype.element_ty), mask=inside)
    if COPY >= 0:
        copy_ptr = tensor_at(tl.load(row_ptr + 3), COPY, WHOLE) + at
        tl.store(copy_ptr, value.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def average_kernel(
    table_ptr,  # [tensors, 6] int64, see Plan of plan.py
    weight_ptr,  # [] float32
    tensors,
    AVERAGE: tl.constexpr,
    PARAM: tl.constexpr,
    COPY: tl.constexpr,  # -1: none
    COMPENSATED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``average += weight * (param - average)``."""
    chunk = tl.program_id(0).to(tl.int64)
    row_ptr = row_of(table_ptr, tensors, chunk, _COLUMNS)
    first, size = chunk_of(row_ptr, chunk, _COLUMNS, CHUNK)
    weight = tl.load(weight_ptr)
    addresses = (
        tl.load(row_ptr) | tl.load(row_ptr + 1) | tl.load(row_ptr + 2) | tl.load(row_ptr + 3)
    )
    aligned = addresses % 16 == 0  # no tensor: address 0
    for start in range(first, tl.minimum(first + CHUNK, size), BLOCK):
        # Else the masked form would move all blocks element by element.
        if aligned & (start + BLOCK <= size):
            _average_block(
                row_ptr, weight, start, size,
                AVERAGE, PARAM, COPY, COMPENSATED, BLOCK, WHOLE=True,
            )  # fmt: skip
        else:
            _average_block(
                row_ptr, weight, start, size,
                AVERAGE, PARAM, COPY, COMPENSATED, BLOCK, WHOLE=False,
            )  # fmt: skip


@triton.jit
def swap_kernel(
    table_ptr,
    tensors,
    back,
    AVERAGE: tl.constexpr,
    PARAM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Exchanges averages and params; see ``weight_average_swap_`` of ``op.py``."""
    chunk = tl.program_id(0).to(tl.int64)
    row_ptr = row_of(table_ptr, tensors, chunk, _COLUMNS)
    first, size = chunk_of(row_ptr, chunk, _COLUMNS, CHUNK)
    for start in range(0, CHUNK, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        inside = at < size
        if AVERAGE == PARAM:
            average_ptr = tensor_at(tl.load(row_ptr), AVERAGE, False)
            param_ptr = tensor_at(tl.load(row_ptr + 1), PARAM, False)
            average = tl.load(average_ptr + at, mask=inside)
            param = tl.load(param_ptr + at, mask=inside)
            tl.store(average_ptr + at, param, mask=inside)
            tl.store(param_ptr + at, average, mask=inside)
        else:
            bits_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.int32))
            half_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.int16))
            bits = tl.load(bits_ptr + at, mask=inside, other=0)
            given = tl.load(half_ptr + at, mask=inside, other=0).to(tl.int32)
            low, upper = bits & 0xFFFF, bits >> 16
            up = low >> 15  # rounded up, away from zero
            bits = tl.where(back != 0, ((given - up) << 16) | low, (given << 16) | low)
            half = tl.where(back != 0, upper, upper + up)
            tl.store(bits_ptr + at, bits, mask=inside)
            tl.store(half_ptr + at, half.to(tl.int16), mask=inside)
