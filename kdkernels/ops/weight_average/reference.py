"""The definition of ``weight_average`` in PyTorch: what every kernel is judged against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weight_average_reference(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    compensations: Sequence[Tensor],
    copies: Sequence[Tensor],
    weight: Tensor,  # []
) -> None:
    """See ``op.py``."""
    for i, (average, param) in enumerate(zip(averages, params, strict=True)):
        dtype = torch.float64 if average.dtype == torch.float64 else torch.float32
        old, new, w = average.to(dtype), param.to(dtype), weight.to(dtype)
        if compensations:
            old = old + compensations[i].to(dtype)
        # A weight of 1 is a copy, not one within a rounding (nor NaN, where infinities meet).
        value = torch.where(w == 1, new, old + w * (new - old))
        average.copy_(value)
        if compensations:
            compensations[i].copy_(value - average.to(dtype))
        if copies:
            copies[i].copy_(value)


def swap_reference(averages: Sequence[Tensor], params: Sequence[Tensor], back: bool) -> None:
    """See ``weight_average_swap`` of ``op.py``."""
    for average, param in zip(averages, params, strict=True):
        if average.dtype == param.dtype:
            old = average.clone()
            average.copy_(param)
            param.copy_(old)
            continue
        bits, half = average.view(torch.int32), param.view(torch.int16)
        low, upper, given = bits & 0xFFFF, bits >> 16, half.to(torch.int32)
        up = (low >> 15) & 1  # rounded up, away from zero
        if back:
            bits.copy_(((given - up) << 16) | low)
            half.copy_(upper)
        else:
            half.copy_(upper + up)
            bits.copy_((given << 16) | low)
