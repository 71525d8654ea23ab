"""The definition of ``adamw_average`` in PyTorch: what every kernel is judged against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Constants(NamedTuple):
    """The numbers of a step that the host knows."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


def adamw_average_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],  # [] each, this one included
    averages: Sequence[Tensor],  # or none
    masters: Sequence[Tensor],  # or none
    weight: Tensor,  # []
    lr: Tensor,  # []
    factor: Tensor,  # []
    found_inf: Tensor | None,  # []
    constants: Constants,
) -> None:
    """See ``op.py``."""
    beta1, beta2, eps, weight_decay, maximize = constants
    for i, param in enumerate(params):
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        rate, t, w = lr.to(dtype), steps[i].to(dtype), weight.to(dtype)
        g = grads[i].to(dtype) * factor.to(dtype)
        if maximize:
            g = -g
        p = masters[i] if masters else param.to(dtype)
        p = p - (rate * weight_decay) * p
        m = exp_avgs[i] + (1 - beta1) * (g - exp_avgs[i])
        v = beta2 * exp_avg_sqs[i] + (1 - beta2) * (g * g)
        step_size = rate / _correction(beta1, t)
        p = p - step_size * m / (v.sqrt() / _correction(beta2, t).sqrt() + eps)
        new = {exp_avgs[i]: m, exp_avg_sqs[i]: v, param: p.to(param.dtype)}
        if masters:
            new[masters[i]] = p
        if averages:
            now, old = p if masters else new[param].to(dtype), averages[i]
            # A weight of 1 is a copy, not one within a rounding.
            new[old] = torch.where(w == 1, now, old + w * (now - old))
        for x, value in new.items():
            x.copy_(value if found_inf is None else torch.where(found_inf == 0, value, x))


def _correction(beta: float, t: Tensor) -> Tensor:
    """``1 - beta**t``, to the last digit also where ``beta**t`` is near 1."""
    return -torch.expm1(t * (math.log(beta) if beta > 0 else -math.inf))
