"""The Triton kernel of ``gate_scores``: a program adds up some rows of a block of columns."""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_scores_kernel(
    activation_ptr,  # [rows, columns]
    first_ptr,  # [rows, columns], the first gradient
    second_ptr,  # or None
    mask_ptr,  # [rows] uint8, or None
    sums_ptr,  # [examples * parts, gradients, columns] float32
    activation_stride, first_stride, second_stride,
    columns, example_rows, part_rows, parts, blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of products over the rows of a part of an example."""
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    example = part // parts * example_rows
    begin = (part % parts) * part_rows
    end = tl.minimum(begin + part_rows, example_rows)
    first_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    second_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(begin, end, ROWS):
        step = start + tl.arange(0, ROWS)
        live = step < end
        rows = (example + step).to(tl.int64)
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + rows, mask=live, other=0) != 0)
        read = live[:, None] & inside[None, :]
        at = rows[:, None] * activation_stride + cols[None, :]
        a = tl.load(activation_ptr + at, mask=read, other=0.0).to(tl.float32)
        at = rows[:, None] * first_stride + cols[None, :]
        first_sums += a * tl.load(first_ptr + at, mask=read, other=0.0).to(tl.float32)
        if second_ptr is not None:
            at = rows[:, None] * second_stride + cols[None, :]
            second_sums += a * tl.load(second_ptr + at, mask=read, other=0.0).to(tl.float32)
    if second_ptr is not None:
        tl.store(sums_ptr + part * 2 * columns + cols, tl.sum(first_sums, 0), mask=inside)
        tl.store(sums_ptr + (part * 2 + 1) * columns + cols, tl.sum(second_sums, 0), mask=inside)
    else:
        tl.store(sums_ptr + part * columns + cols, tl.sum(first_sums, 0), mask=inside)
