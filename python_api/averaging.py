"""Updates of running averages, over lists of tensors: SWA and EMA."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kdkernels.api._averaged import local
from kdkernels.api._spec import integer, number
from kdkernels.api.averager import WeightAverager
from kdkernels.ops.weight_average import Plan, weight_average_

__all__ = ["WeightAverager", "ema_update_", "swa_update_"]


def ema_update_(
    shadow: Iterable[Tensor],
    params: Iterable[Tensor],
    *,
    decay: float = 0.999,
    step: int | Tensor | None = None,
) -> None:
    r"""Exponential moving average of lists of tensors, in place, in one launch.

    ``shadow = decay * shadow + (1 - decay) * params``. With ``step`` the decay warms up::

        decay_t = min(decay, (1 + step) / (10 + step))

    Args:
        shadow: float32 (or float64) tensors. A 16-bit average would never move at these decays;
            :class:`WeightAverager` keeps compensated ones.
        params: of the same shapes and strides, float32, bfloat16 or float16, e.g.
            ``model.parameters()``; sharded tensors by their local parts.
        decay: in [0, 1].
        step: number of updates so far, an int or a tensor of one element. On the tensors' device it
            is read there, without a synchronisation.

    Raises:
        ValueError: lists that do not fit; the message names the place.

    Note:
        The lists are checked at every call; :class:`WeightAverager` does that once.

    Example:
        >>> import kdkernels, torch
        >>> model = torch.nn.Linear(4, 2).bfloat16()
        >>> shadow = [p.detach().float() for p in model.parameters()]
        >>> kdkernels.ema_update_(shadow, model.parameters(), decay=0.99, step=100)
    """
    number("ema_update_", "decay", decay, 0.0, 1.0)
    plan = _plan_of("ema_update_", shadow, params)
    weight: float | Tensor = 1.0 - decay
    if step is not None:
        # 1 - (1 + step) / (10 + step), without the difference of near numbers.
        count = _count("ema_update_", "step", step, plan.device)
        ramp = 9.0 / (10.0 + count)
        weight = ramp.clamp(min=weight) if isinstance(ramp, Tensor) else max(weight, ramp)
    weight_average_(plan, _as_weight(weight, plan.device))


def swa_update_(
    shadow: Iterable[Tensor], params: Iterable[Tensor], *, n_averaged: int | Tensor
) -> None:
    r"""Running mean of lists of tensors, in place, in one launch.

    ``shadow += (params - shadow) / (n_averaged + 1)``: the mean of ``n_averaged`` models becomes
    that of one more. With 0 it is a copy, whatever ``shadow`` holds.

    Args:
        shadow: as in :func:`ema_update_`.
        params: as in :func:`ema_update_`.
        n_averaged: models in ``shadow`` so far, an int or a tensor of one element. It is not
            changed. On the tensors' device it is read there, without a synchronisation.

    Raises:
        ValueError: lists that do not fit; the message names the place.

    References:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, arXiv
        1803.05407; Lu et al., Improving Generalization of Pre-trained Language Models via
        Stochastic Weight Averaging, arXiv 2212.05956.

    Example:
        >>> import kdkernels, torch
        >>> mean, models = [torch.empty(2)], [[torch.tensor([i, 1.0])] for i in range(3)]
        >>> for n, model in enumerate(models):
        ...     kdkernels.swa_update_(mean, model, n_averaged=n)
        >>> mean
        [tensor([1., 1.])]
    """
    plan = _plan_of("swa_update_", shadow, params)
    count = _count("swa_update_", "n_averaged", n_averaged, plan.device)
    weight_average_(plan, _as_weight(1.0 / (count + 1.0), plan.device))


def _plan_of(name: str, shadow: Iterable[Tensor], params: Iterable[Tensor]) -> Plan:
    averages, sources = ([local(x).detach() for x in xs] for xs in (shadow, params))
    for i, average in enumerate(averages):
        if average.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: shadow[{i}] must be float32 or float64, got {average.dtype}")
    try:
        return Plan(averages, sources)
    except ValueError as error:
        message = str(error).replace("weight_average:", f"{name}:")
        raise ValueError(re.sub(r"\baverages\b", "shadow", message)) from None


def _count(name: str, argument: str, value: Any, device: torch.device) -> Any:
    """A counter as a float, or on the device as a float64."""
    if not isinstance(value, Tensor):
        integer(name, argument, value, 0)
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"{name}: {argument} must be one number, got shape {list(value.shape)}")
    if value.device.type != "cpu" and value.device != device:
        raise ValueError(f"{name}: {argument} must be on {device}, got {value.device}")
    # Of the CPU: no synchronisation either way.
    return value.detach().reshape(()).double() if value.device == device else float(value)


def _as_weight(weight: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.float()
    return torch.full((), weight, dtype=torch.float32, device=device)
