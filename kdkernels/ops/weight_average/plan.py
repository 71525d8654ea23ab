"""Which tensors are averaged: checked and laid out once, for many updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.ops._shared.multi_tensor import (
    CHUNK,
    DTYPES,
    HALVES,
    check_dense,
    check_like,
    tables,
)

__all__ = ["CHUNK", "DTYPES", "HALVES", "OP", "Group", "Plan"]

OP = "weight_average"


class Group(NamedTuple):
    """Tensors of one combination of dtypes, as the kernels read them.

    ``table`` is ``[tensors, 6]`` int64, on the device of the tensors: the addresses of average,
    param, compensation and copy (0: none), the number of elements, and of the chunks of all tensors
    up to and with this one.
    """

    table: Tensor
    dtypes: tuple[int, int, int]  # of average, param and copy, places in DTYPES; -1: no copy
    chunks: int  # of all tensors
    places: list[int]  # of the tensors in the lists


class Plan:
    """Lists of tensors to average, in place.

    Args:
        averages: dense tensors, float32; or bfloat16 or float16 with ``compensations``; or
            (reference) float64.
        params: of the same shapes and strides, float32, bfloat16 or float16 (float64 with a float64
            average).
        compensations: what each 16-bit average lacks, in its dtype: the average is the sum of both.
        copies: get the new averages rounded to their dtype (an EMA teacher), in the same pass; not
            together with ``compensations``, where the averages are low in precision themselves.

    Raises:
        ValueError: lists that do not fit, named with the place.
    """

    def __init__(
        self,
        averages: Sequence[Tensor],
        params: Sequence[Tensor],
        *,
        compensations: Sequence[Tensor] = (),
        copies: Sequence[Tensor] = (),
    ) -> None:
        self.averages, self.params = list(averages), list(params)
        self.compensations, self.copies = list(compensations), list(copies)
        self._check()
        self._lists = (self.averages, self.params, self.compensations, self.copies)
        self._addresses: list[int] = []
        self._groups: list[Group] = []

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.averages[0].device if self.averages else torch.device("cpu")

    def groups(self) -> list[Group]:
        """Made anew where a tensor has moved (``module.to()``, a new ``.data``)."""
        addresses = [x.data_ptr() for xs in self._lists for x in xs]
        if addresses != self._addresses:
            self._check()
            self._addresses, self._groups = addresses, self._grouped(addresses)
        return self._groups

    def _grouped(self, addresses: list[int]) -> list[Group]:
        columns, begin = [], 0
        for xs in self._lists:
            columns.append(addresses[begin : begin + len(xs)])
            begin += len(xs)
        keys: list[tuple[int, int, int] | None] = []
        for i, (average, param) in enumerate(zip(self.averages, self.params, strict=True)):
            if average.dtype == torch.float64:
                keys.append(None)
                continue
            copy = DTYPES.index(self.copies[i].dtype) if self.copies else -1
            keys.append((DTYPES.index(average.dtype), DTYPES.index(param.dtype), copy))
        sizes = [average.numel() for average in self.averages]
        found = tables(columns, sizes, keys, self.device)
        return [Group(t.rows, dtypes, t.chunks, t.places) for dtypes, t in found.items()]

    def _check(self) -> None:
        if len(self.params) != len(self.averages):
            raise ValueError(
                f"{OP}: params must be as many as averages, {len(self.averages)}, got "
                f"{len(self.params)}"
            )
        for name, xs in (("compensations", self.compensations), ("copies", self.copies)):
            if xs and len(xs) != len(self.averages):
                raise ValueError(
                    f"{OP}: {name} must be as many as averages, {len(self.averages)}, got {len(xs)}"
                )
        if self.compensations and self.copies:
            raise ValueError(f"{OP}: copies must not be given together with compensations")
        self.wide = any(x.dtype == torch.float64 for x in self.averages)
        for i, average in enumerate(self.averages):
            half = average.dtype in HALVES
            if half != bool(self.compensations):
                raise ValueError(
                    f"{OP}: compensations must be given exactly for 16-bit averages, got "
                    f"averages[{i}] of {average.dtype} {'without' if half else 'with'} them"
                )
            check_dense(OP, f"averages[{i}]", average)
            _check_like(f"averages[{i}]", average, average, self.device)
            _check_like(f"params[{i}]", self.params[i], average, self.device)
            if self.copies:
                _check_like(f"copies[{i}]", self.copies[i], average, self.device)
            if half:
                other = self.compensations[i]
                _check_like(f"compensations[{i}]", other, average, self.device)
                if other.dtype != average.dtype:
                    raise ValueError(
                        f"{OP}: compensations[{i}] must be {average.dtype} as its average, got "
                        f"{other.dtype}"
                    )


def _check_like(name: str, x: Tensor, average: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{OP}: {name} must be on {device}, got {x.device}")
    if x.dtype not in DTYPES and not x.dtype == average.dtype == torch.float64:
        raise ValueError(f"{OP}: {name} must be float32, bfloat16 or float16, got {x.dtype}")
    check_like(OP, name, x, "average", average)
