"""Where the positions of an ``interchange`` come from.

Every backend reads one of two indices, lists of int64 tensors on the device:

``[base_start, source_start, length]`` or with a fourth, ``source_row``, each ``[batch]``: one span
a row of the base. A kernel looks the spans up itself: nothing is launched to prepare them.

``[sources]``, ``[batch, seq]``: for every position of the base the position of the source that goes
there, ``row * source_seq + position``, or -1. Any pairing can be written so; it takes some small
launches to make (:func:`map_of_pairs`) and, for the gradient of the source, to invert
(:func:`readers_of_map`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAP_TENSORS = 1  # more are spans


def map_of_spans(index: Sequence[Tensor], seq: int, rows: int, positions: int) -> Tensor:
    """The map ``[batch, seq]`` of one span a row; what is out of range has no source."""
    base_start, source_start, length = (x[:, None] for x in index[:3])
    batch = base_start.shape[0]
    device = base_start.device
    row = torch.arange(batch, device=device)[:, None] if len(index) == 3 else index[3][:, None]
    step = torch.arange(seq, device=device) - base_start
    position = source_start + step
    live = (step >= 0) & (step < length) & (position >= 0) & (position < positions)
    live = live & (row >= 0) & (row < rows)
    return torch.where(live, row * positions + position, -1)


def map_of_pairs(
    base_index: Tensor,  # [n, 2]: row, position
    source_index: Tensor,  # [n, 2]
    base: torch.Size,
    source: torch.Size,
) -> Tensor:
    """The map ``[batch, seq]`` of pairs; of pairs with one base position the last counts."""
    (base_row, base_at), (row, at) = base_index.unbind(1), source_index.unbind(1)
    live = _inside(base_row, base[0]) & _inside(base_at, base[1])
    live = live & _inside(row, source[0]) & _inside(at, source[1])
    size = base[0] * base[1]
    # A place behind the last for pairs that are left out; the largest number is the last pair, in
    # whatever order the device works.
    slots = torch.where(live, base_row * base[1] + base_at, size)
    numbers = torch.arange(slots.shape[0], device=slots.device)
    last = torch.full((size + 1,), -1, dtype=torch.int64, device=slots.device)
    last = last.scatter_reduce(0, slots, numbers, "amax")[:size]
    none = last.new_full((1,), -1)  # also what the number -1 finds
    return torch.cat((row * source[1] + at, none))[last].view(base[0], base[1])


def readers_of_map(sources: Tensor, rows: int, positions: int) -> list[Tensor]:
    """The map turned round: ``[order, first]``.

    Positions of the base, ``order[first[p]:first[p + 1]]``, that read position ``p`` of the source:
    ascending, so that sums over them are the same every time.
    """
    read, order = sources.flatten().sort(stable=True)
    first = torch.searchsorted(read, torch.arange(rows * positions + 1, device=read.device))
    return [order, first]


def check_spans(op: str, index: Sequence[Tensor], base: torch.Size, source: torch.Size) -> None:
    """Raises for a span out of range, naming its row, where looking costs no synchronisation."""
    if not _can_look(index[0]):
        return
    base_start, source_start, length = index[:3]
    wrong = length < 0
    _raise_first(op, "length", wrong, "be 0 or more", lambda b: int(length[b]))
    for name, start, seq in (
        ("base_start", base_start, base[1]),
        ("source_start", source_start, source[1]),
    ):
        wrong = (length > 0) & ((start < 0) | (start + length > seq))
        _raise_first(
            op,
            name,
            wrong,
            f"begin a span inside of [0, {seq})",
            lambda b, start=start: f"[{int(start[b])}, {int(start[b] + length[b])})",
        )
    if len(index) == 4:
        row = index[3]
        wrong = (length > 0) & ~_inside(row, source[0])
        _raise_first(op, "source_row", wrong, f"be in [0, {source[0]})", lambda b: int(row[b]))
    elif source[0] < base[0]:
        wrong = (length > 0) & (torch.arange(base[0]) >= source[0])
        _raise_first(op, "source_row", wrong, f"be in [0, {source[0]})", lambda b: b)


def check_pairs(op: str, name: str, index: Tensor, x: torch.Size, unused: Tensor) -> None:
    """Raises for a pair out of range, as :func:`check_spans`; those that are unused may be."""
    if not _can_look(index):
        return
    inside = _inside(index[:, 0], x[0]) & _inside(index[:, 1], x[1])
    _raise_first(
        op,
        name,
        ~inside & ~unused,
        f"be rows and positions in [0, {x[0]}) and [0, {x[1]})",
        lambda i: index[i].tolist(),
    )


def _inside(x: Tensor, end: int) -> Tensor:
    return (x >= 0) & (x < end)


def _can_look(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return type(x) is Tensor  # no functional or fake one


def _raise_first(op: str, name: str, wrong: Tensor, contract: str, fact: object) -> None:
    if wrong.any():
        row = int(wrong.to(torch.uint8).argmax())
        assert callable(fact)
        raise ValueError(f"{op}: {name} must {contract}, got {fact(row)} in row {row}")
