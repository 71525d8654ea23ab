"""The Triton kernels of ``interchange``: a program owns a block of columns of one position."""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl

SWAP = tl.constexpr(0)
ADD = tl.constexpr(1)
CLEAR = tl.constexpr(3)


@triton.jit
def _source_of(
    start_ptr, source_start_ptr, length_ptr, row_ptr, map_ptr, batch, at, seq, rows, positions
):
    """Position of the source that goes to a base position, or -1; see index.py."""
    if map_ptr is not None:
        found = tl.load(map_ptr + batch * seq + at)
    else:
        step = at - tl.load(start_ptr + batch)
        place = tl.load(source_start_ptr + batch) + step
        row = batch
        if row_ptr is not None:
            row = tl.load(row_ptr + batch)
        live = (step >= 0) & (step < tl.load(length_ptr + batch))
        live = live & (place >= 0) & (place < positions) & (row >= 0) & (row < rows)
        found = tl.where(live, row * positions + place, -1)
    return found


@triton.jit
def interchange_kernel(
    base_ptr,  # [batch, seq, hidden]
    source_ptr,  # [rows, positions, hidden]; not read by CLEAR
    out_ptr,  # [batch, seq, hidden]; the base itself: in place
    start_ptr,  # [batch] each, or None with a map
    source_start_ptr,
    length_ptr,
    row_ptr,  # or None: each row its own
    map_ptr,  # [batch, seq], or None
    base_row_stride, base_stride, source_row_stride, source_stride, out_row_stride, out_stride,
    seq, rows, positions, hidden, begin, end, blocks,
    MODE: tl.constexpr,
    INPLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Base, or what becomes of it where a source goes."""
    program = tl.program_id(0).to(tl.int64)
    position = program // blocks
    batch, at = position // seq, position % seq
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    found = _source_of(
        start_ptr, source_start_ptr, length_ptr, row_ptr, map_ptr, batch, at, seq, rows, positions
    )
    touched = (cols >= begin) & (cols < end) & (found >= 0)
    written = cols < hidden
    if INPLACE:
        written = touched
    # Columns that are overwritten are not read.
    read = written
    if (MODE == SWAP) | (MODE == CLEAR):
        read = written & ~touched
    base = tl.load(base_ptr + batch * base_row_stride + at * base_stride + cols, read, other=0.0)
    if MODE != CLEAR:
        source_ptr += found // positions * source_row_stride + found % positions * source_stride
        taken = tl.load(source_ptr + cols, mask=touched & written, other=0.0)
        if MODE == SWAP:
            base = tl.where(touched, taken, base)
        elif MODE == ADD:
            total = base.to(tl.float32) + taken.to(tl.float32)
            base = tl.where(touched, total.to(base.dtype), base)
        else:
            total = base.to(tl.float32) - taken.to(tl.float32)
            base = tl.where(touched, total.to(base.dtype), base)
    tl.store(out_ptr + batch * out_row_stride + at * out_stride + cols, base, mask=written)


@triton.jit
def interchange_grad_source_kernel(
    grad_ptr,  # [batch, seq, hidden]
    out_ptr,  # [rows, positions, hidden], contiguous
    start_ptr,  # [batch] each, or None with the order
    source_start_ptr,
    length_ptr,
    row_ptr,  # or None: each row its own
    order_ptr,  # [batch * seq], or None
    first_ptr,  # [rows * positions + 1]
    grad_row_stride, grad_stride, batches,
    seq, positions, hidden, begin, end, blocks,
    NEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What went to a position of the source: the sum over those that read it, in their order."""
    program = tl.program_id(0).to(tl.int64)
    place = program // blocks
    row, at = place // positions, place % positions
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    touched = (cols >= begin) & (cols < end)
    total = tl.zeros([BLOCK], tl.float32)
    if order_ptr is not None:
        for i in range(tl.load(first_ptr + place), tl.load(first_ptr + place + 1)):
            reader = tl.load(order_ptr + i)
            pointers = grad_ptr + reader // seq * grad_row_stride + reader % seq * grad_stride
            total += tl.load(pointers + cols, mask=touched, other=0.0).to(tl.float32)
    else:
        for i in range(batches):
            batch = tl.zeros([], tl.int64) + i
            step = at - tl.load(source_start_ptr + batch)
            target = tl.load(start_ptr + batch) + step
            from_row = batch
            if row_ptr is not None:
                from_row = tl.load(row_ptr + batch)
            live = (step >= 0) & (step < tl.load(length_ptr + batch)) & (from_row == row)
            if live & (target >= 0) & (target < seq):
                pointers = grad_ptr + batch * grad_row_stride + target * grad_stride
                total += tl.load(pointers + cols, mask=touched, other=0.0).to(tl.float32)
    if NEGATIVE:
        total = -total
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place * hidden + cols, out, mask=cols < hidden)
