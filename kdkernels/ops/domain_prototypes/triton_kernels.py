"""The Triton kernels of ``domain_prototypes``: sums of positions, then of groups of examples."""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def position_sums_kernel(
    hidden_ptr,  # [batch, seq, columns]
    mask_ptr,  # [batch, seq] uint8, or None
    sums_ptr,  # [batch, parts, columns] float32
    positions_ptr,  # [batch, parts] int32
    example_stride, position_stride,
    columns, seq, part_rows, parts, blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums a block of columns over the positions of a part of an example."""
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    example = part // parts
    begin = (part % parts) * part_rows
    end = tl.minimum(begin + part_rows, seq)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        live = rows < end
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + example * seq + rows, mask=live, other=0) != 0)
        at = example * example_stride + rows[:, None] * position_stride + cols[None, :]
        read = live[:, None] & inside[None, :]
        sums += tl.load(hidden_ptr + at, mask=read, other=0.0).to(tl.float32)
        count += live.to(tl.int32)
    tl.store(sums_ptr + part * columns + cols, tl.sum(sums, 0), mask=inside)
    if program % blocks == 0:
        tl.store(positions_ptr + part, tl.sum(count, 0))


@triton.jit
def group_sums_kernel(
    sums_ptr,  # [batch, parts, columns] float32
    positions_ptr,  # [batch, parts] int32
    groups_ptr,  # [batch] int64
    means_ptr,  # [batch, columns] float32
    totals_ptr,  # [n_groups, columns] float32
    counts_ptr,  # [n_groups] int64
    columns, batch, parts, blocks, n_groups,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,  # examples of a sum, before it is put aside: more would lose digits
):  # fmt: skip
    """Means and their sum over the examples of a group; the last program's are in none."""
    program = tl.program_id(0).to(tl.int64)
    group = program // blocks
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    total = tl.zeros([BLOCK], tl.float32)
    members = tl.zeros([], tl.int64)
    for start in range(0, batch, RUN):
        recent = tl.zeros([BLOCK], tl.float32)
        for example in range(start, tl.minimum(start + RUN, batch)):
            found = tl.load(groups_ptr + example)
            if tl.where((found < 0) | (found >= n_groups), n_groups, found) == group:
                row = tl.cast(example, tl.int64)
                mean = tl.zeros([BLOCK], tl.float32)
                count = tl.zeros([], tl.int32)
                for part in range(parts):
                    at = row * parts + part
                    mean += tl.load(sums_ptr + at * columns + cols, mask=inside, other=0.0)
                    count += tl.load(positions_ptr + at)
                mean = mean / tl.maximum(count, 1).to(tl.float32)
                tl.store(means_ptr + row * columns + cols, mean, mask=inside)
                recent += mean
                members += (count > 0).to(tl.int64)
        total += recent
    if group < n_groups:
        tl.store(totals_ptr + group * columns + cols, total, mask=inside)
        if program % blocks == 0:
            tl.store(counts_ptr + group, members)
