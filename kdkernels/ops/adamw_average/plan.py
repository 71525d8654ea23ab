"""Which tensors a step of AdamW works on: checked and laid out once, for many steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels.ops._shared.multi_tensor import DTYPES, HALVES, check_dense, check_like, tables

OP = "adamw_average"


@dataclass
class Group:
    """Tensors of one combination of dtypes, as the kernels read them.

    ``table`` is ``[tensors, 9]`` int64, on the device of the tensors: the addresses of param, grad,
    exp_avg, exp_avg_sq, average, master (0: none) and step, the number of elements, and of the
    chunks of all tensors up to and with this one.
    """

    table: Tensor
    dtypes: tuple[int, int]  # of param and gradient, places in DTYPES
    chunks: int  # of all tensors
    places: list[int]  # of the tensors in the lists
    addresses: list[int]  # of the gradients in the table; empty: unknown


class Plan:
    """Lists of tensors that AdamW and the average work on, in place.

    Args:
        params: dense tensors, float32, bfloat16 or float16, or (reference) float64.
        exp_avgs: first moments, of the shapes and strides of ``params``; they, the second moments,
            averages and masters are float32, or float64 with float64 params.
        exp_avg_sqs: second moments.
        steps: ``[]`` float32, the steps of each param so far.
        averages: the averages of the params; there need not be any.
        masters: what each 16-bit param is the rounding of; there need not be any.

    Raises:
        ValueError: lists that do not fit, named with the place.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        *,
        averages: Sequence[Tensor] = (),
        masters: Sequence[Tensor] = (),
    ) -> None:
        self.params, self.exp_avgs = list(params), list(exp_avgs)
        self.exp_avg_sqs, self.steps = list(exp_avg_sqs), list(steps)
        self.averages, self.masters = list(averages), list(masters)
        self._lists = {
            "exp_avgs": self.exp_avgs,
            "exp_avg_sqs": self.exp_avg_sqs,
            "averages": self.averages,
            "masters": self.masters,
            "steps": self.steps,
        }
        self._check()
        self._made_for: tuple[list[int], list[torch.dtype]] = ([], [])
        self._groups: list[Group] = []

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.params[0].device if self.params else torch.device("cpu")

    def groups(self, grads: Sequence[Tensor]) -> list[Group]:
        """Made anew where a tensor has moved or a gradient has another dtype.

        Where only gradients have moved, their addresses in the tables are not yet the new ones.
        """
        self._check_grads(grads)
        addresses = [x.data_ptr() for xs in (self.params, *self._lists.values()) for x in xs]
        made_for = addresses, [g.dtype for g in grads]
        if made_for != self._made_for:
            self._check()
            self._made_for, self._groups = made_for, self._grouped(grads)
        return self._groups

    def _grouped(self, grads: Sequence[Tensor]) -> list[Group]:
        params, first, second, averages, masters, steps = (
            [x.data_ptr() for x in xs] for xs in (self.params, *self._lists.values())
        )
        found = [g.data_ptr() for g in grads]
        columns = [params, found, first, second, averages, masters, steps]
        keys = [
            None if p.dtype == torch.float64 else (DTYPES.index(p.dtype), DTYPES.index(g.dtype))
            for p, g in zip(self.params, grads, strict=True)
        ]
        sizes = [p.numel() for p in self.params]
        return [
            Group(t.rows, dtypes, t.chunks, t.places, [found[i] for i in t.places])
            for dtypes, t in tables(columns, sizes, keys, self.device).items()
        ]

    def _check_grads(self, grads: Sequence[Tensor]) -> None:
        if len(grads) != len(self.params):
            raise ValueError(
                f"{OP}: grads must be as many as params, {len(self.params)}, got {len(grads)}"
            )
        for i, (grad, param) in enumerate(zip(grads, self.params, strict=True)):
            wide = grad.dtype == torch.float32 and param.dtype != torch.float64
            if grad.dtype != param.dtype and not wide:
                raise ValueError(
                    f"{OP}: grads[{i}] must be {_name(param)} as its param, or float32, got "
                    f"{_name(grad)}"
                )
            # First what is quick and nearly always so.
            if grad.shape != param.shape or grad.stride() != param.stride():
                check_like(OP, f"grads[{i}]", grad, "param", param)
            elif grad.device != param.device:
                _checks.same_device(OP, f"grads[{i}]", grad, param.device)

    def _check(self) -> None:
        count = len(self.params)
        self.wide = any(p.dtype == torch.float64 for p in self.params)
        for name, xs in self._lists.items():
            optional = name in ("averages", "masters")
            if len(xs) != count and (xs or not optional):
                raise ValueError(f"{OP}: {name} must be as many as params, {count}, got {len(xs)}")
        for i, param in enumerate(self.params):
            if param.dtype not in (*DTYPES, torch.float64):
                raise ValueError(
                    f"{OP}: params[{i}] must be float32, bfloat16, float16 or float64, got "
                    f"{_name(param)}"
                )
            check_dense(OP, f"params[{i}]", param)
            _checks.same_device(OP, f"params[{i}]", param, self.device)
            dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
            for name, xs in self._lists.items():
                if not xs:
                    continue
                x, where = xs[i], f"{name}[{i}]"
                if name == "steps":
                    _check_step(where, x, self.device)
                    continue
                check_like(OP, where, x, "param", param)
                if x.dtype != dtype:
                    raise ValueError(
                        f"{OP}: {where} must be {str(dtype).removeprefix('torch.')} with a param "
                        f"of {_name(param)}, got {_name(x)}"
                    )
            if self.masters and param.dtype not in HALVES:
                raise ValueError(
                    f"{OP}: masters must be of 16-bit params, got params[{i}] of {_name(param)}"
                )


def _check_step(name: str, step: Tensor, device: torch.device) -> None:
    if step.numel() != 1 or step.dtype != torch.float32:
        raise ValueError(
            f"{OP}: {name} must be one float32, got {_name(step)} of shape {list(step.shape)}"
        )
    _checks.same_device(OP, name, step, device)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
