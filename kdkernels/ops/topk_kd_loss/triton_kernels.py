"""The Triton kernel that makes a sparse teacher's list ready for the rows of ``kd_loss``."""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def topk_kd_loss_list_kernel(
    topk_ids_ptr,  # [rows, entries] int64
    ids_ptr,  # [rows, entries] int32: without repetitions; -1 for none, -2 for one out of range
    words_ptr,  # [rows, words] int32, zero: gets a bit for each listed class
    entries,
    words,
    classes,
    LIST: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, LIST)
    row_ids = topk_ids_ptr + row * entries
    ids = tl.load(row_ids + place, mask=place < entries, other=-1)
    repeated = ids < 0
    for i in range(entries):
        repeated = repeated | ((ids == tl.load(row_ids + i)) & (place > i))
    wrong = (ids < -1) | (ids >= classes)
    kept = (~repeated) & (~wrong)
    ids = tl.where(wrong, -2, tl.where(kept, ids, -1)).to(tl.int32)
    tl.store(ids_ptr + row * entries + place, ids, mask=place < entries)
    bits = tl.full([LIST], 1, tl.int32) << (ids % 32)
    tl.atomic_or(words_ptr + row * words + ids // 32, bits, mask=kept)
