"""Triton kernels of ``topk_logprobs``: one program owns one row.

The first kernel finds the maxima of as many groups of logits as its blocks have columns. At least
k logits are not smaller than the k-th largest of these maxima, and hardly more are: those are the
candidates, whose ids it writes in ascending order. The exponentials of all others are summed up as
what is left. Should there be too many candidates, a bisection raises the bound, one reading of the
row a step, and equal logits are taken by id. The second kernel counts for each candidate the ones
before it: its place in the result.

Logits are compared as whole numbers in their order, so that the bisection ends after 32 steps.
"""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels._triton.device import to_z

_INF = tl.constexpr(float("inf"))


@triton.jit
def _key(x):
    """Whole numbers in the order of floats; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _load(row_ptr, cols, classes):
    return tl.load(row_ptr + cols, mask=cols < classes, other=-_INF).to(tl.float32)


@triton.jit
def _count_above(row_ptr, classes, bound, BLOCK: tl.constexpr):
    """How many logits of the row are above a bound."""
    bound = bound.to(tl.int32)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, classes, BLOCK):
        x = _load(row_ptr, start + tl.arange(0, BLOCK), classes)
        found += ((_key(x) > bound) & (x == x)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def _first_bound(groups, k):
    """A bound above which there are at least k groups, and few more; the lowest one if need be."""
    keys = _key(groups)
    low = _key(tl.full((), -_INF, tl.float32)).to(tl.int64)
    high = tl.max(keys, 0).to(tl.int64)
    found = tl.sum((keys > low.to(tl.int32)).to(tl.int32), 0)
    # A few candidates more take less time than steps of the bisection.
    while (high - low > 1) & (found > k + k // 8):
        middle = low + (high - low) // 2
        above = tl.sum((keys > middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(above >= k, middle, low)
        high = tl.where(above >= k, high, middle)
        found = tl.where(above >= k, above, found)
    return low


@triton.jit
def _raised_bound(row_ptr, classes, low, high, k, capacity, BLOCK: tl.constexpr):
    """A bound above which there are at least k logits and at most ``capacity``, and 0; or the k-th
    largest logit, and how many that equal it are wanted.
    """
    found = capacity + 1
    while (high - low > 1) & (found > capacity):
        middle = low + (high - low) // 2
        above = _count_above(row_ptr, classes, middle, BLOCK)
        low = tl.where(above >= k, middle, low)
        high = tl.where(above >= k, high, middle)
        found = tl.where(above >= k, above, found)
    ties = tl.full((), 0, tl.int32)
    if found > capacity:
        ties = k - _count_above(row_ptr, classes, high, BLOCK)
        low = high
    return low, ties


@triton.jit
def _gather(
    row_ptr, picked_ptr, classes, bound, ties, top, capacity, s,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the ids of the logits above the bound, and of the first that equal it; returns their
    number, and the exponentials of all others.
    """
    bound = bound.to(tl.int32)
    count = tl.full((), 0, tl.int32)
    tied = tl.full((), 0, tl.int32)
    rest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load(row_ptr, cols, classes)
        key = _key(x)
        chosen = (key > bound) & (x == x)
        if ties > 0:
            same = (key == bound).to(tl.int32)
            chosen = chosen | ((same > 0) & (tied + tl.cumsum(same, 0) <= ties))
            tied += tl.sum(same, 0)
        number = tl.sum(chosen.to(tl.int32), 0)
        if number > 0:
            at = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(picked_ptr + at, cols, mask=chosen & (at < capacity))
        count += number
        e = tl.exp((to_z(x, s.scale, s.softcap, SOFTCAP) - top) * s.inv_t)
        rest += tl.where(chosen, 0.0, e)
    return count, tl.sum(rest, 0)


@triton.jit
def topk_select_kernel(
    x_ptr,  # [rows, >= classes]
    picked_ptr,  # [rows, capacity] int32: ids of candidates
    counts_ptr,  # [rows] int32: their number
    stats_ptr,  # [rows, 2] float32: the largest z, the exponentials of all others
    stride,
    classes,
    k,
    capacity,
    s,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finds the candidates of a row; ``s`` is ``Scalars`` of ``triton_launch``."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * stride
    picked_row = picked_ptr + row * capacity
    groups = tl.full([BLOCK], -_INF, tl.float32)
    for start in range(0, classes, BLOCK):
        x = _load(row_ptr, start + tl.arange(0, BLOCK), classes)
        groups = tl.where(x > groups, x, groups)  # a NaN is no maximum
    largest = tl.max(groups, 0)
    top = to_z(largest, s.scale, s.softcap, SOFTCAP)
    top = tl.where(top == -_INF, 0.0, top)
    bound = _first_bound(groups, k)
    ties = tl.full((), 0, tl.int32)
    count, rest = _gather(
        row_ptr, picked_row, classes, bound, ties, top, capacity, s, SOFTCAP, BLOCK
    )
    if count > capacity:
        high = _key(largest).to(tl.int64)
        bound, ties = _raised_bound(row_ptr, classes, bound, high, k, capacity, BLOCK)
        count, rest = _gather(
            row_ptr, picked_row, classes, bound, ties, top, capacity, s, SOFTCAP, BLOCK
        )
    tl.store(counts_ptr + row, count)
    tl.store(stats_ptr + 2 * row, top)
    tl.store(stats_ptr + 2 * row + 1, rest)


@triton.jit
def _candidates(row_ptr, picked_ptr, start, count, PART: tl.constexpr):
    """Ids and logits of some candidates; of -inf behind the last."""
    at = start + tl.arange(0, PART)
    ids = tl.load(picked_ptr + at, mask=at < count, other=0)
    return at, ids, tl.load(row_ptr + ids, mask=at < count, other=-_INF).to(tl.float32)


@triton.jit
def topk_rank_kernel(
    x_ptr,  # [rows, >= classes]
    picked_ptr,  # [rows, capacity] int32, ascending
    counts_ptr,  # [rows] int32
    stats_ptr,  # [rows, 2] float32
    ids_ptr,  # [rows, k] int64
    logprobs_ptr,  # [rows, k] float32
    tail_ptr,  # [rows] float32
    stride,
    k,
    capacity,
    s,
    SOFTCAP: tl.constexpr,
    PART: tl.constexpr,
):
    """Puts the candidates of a row in order."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * stride
    picked_row = picked_ptr + row * capacity
    count = tl.load(counts_ptr + row)
    top = tl.load(stats_ptr + 2 * row)
    rest = tl.load(stats_ptr + 2 * row + 1)
    total = tl.zeros([PART], tl.float32)
    for start in range(0, count, PART):
        at, ids, x = _candidates(row_ptr, picked_row, start, count, PART)
        total += tl.exp((to_z(x, s.scale, s.softcap, SOFTCAP) - top) * s.inv_t)
    total = tl.sum(total, 0) + rest
    log_total = tl.log(total)
    dropped = tl.zeros([PART], tl.float32)
    for start in range(0, count, PART):
        at, ids, x = _candidates(row_ptr, picked_row, start, count, PART)
        key = _key(x)
        before = tl.zeros([PART], tl.int32)
        for other in range(0, count, PART):
            at_2, _, x_2 = _candidates(row_ptr, picked_row, other, count, PART)
            key_2 = _key(x_2)
            ahead = key_2[None, :] > key[:, None]
            ahead = ahead | ((key_2[None, :] == key[:, None]) & (at_2[None, :] < at[:, None]))
            before += tl.sum((ahead & (at_2[None, :] < count)).to(tl.int32), 1)
        chosen = (at < count) & (before < k)
        exponent = (to_z(x, s.scale, s.softcap, SOFTCAP) - top) * s.inv_t
        tl.store(ids_ptr + row * k + before, ids.to(tl.int64), mask=chosen)
        tl.store(logprobs_ptr + row * k + before, exponent - log_total, mask=chosen)
        dropped += tl.where(chosen, 0.0, tl.exp(exponent))
    for start in range(count, k, PART):
        at = start + tl.arange(0, PART)
        tl.store(ids_ptr + row * k + at, tl.full([PART], -1, tl.int64), mask=at < k)
        tl.store(logprobs_ptr + row * k + at, tl.full([PART], -_INF, tl.float32), mask=at < k)
    # Without a live class nothing is left; of NaN everything is NaN.
    left = rest + tl.sum(dropped, 0)
    tl.store(tail_ptr + row, tl.where(total == 0.0, 0.0, left / total))
