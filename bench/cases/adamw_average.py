"""``adamw_average_`` of many tensors: a step of AdamW and of the average of the weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops._shared.multi_tensor import CHUNK, DTYPES, HALVES
from kdkernels.ops.adamw_average import Plan, adamw_average_
from kdkernels.ops.adamw_average.op import adamw_average_grads, adamw_average_update

# Tensors and elements of each, as of weight_average.
SHAPES = [(144, 768 * 1024), (2000, 768)]
# As large as to show in the result that is compared.
LR, WEIGHT = 0.1, 0.5
# Steps that the moments are taken to have seen.
STEPS = 100.0


@dataclass
class Lists:
    """What a step works on, made once for an input set."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    averages: list[Tensor]
    masters: list[Tensor]
    steps: list[Tensor]
    state: Tensor  # moments and averages: what is compared

    @classmethod
    def of(cls, master: bool, params: Tensor, grads: Tensor) -> Lists:
        """Of two inputs, a row each; float64 params are their own masters."""
        wide = torch.float64 if params.dtype == torch.float64 else torch.float32
        moments, start = grads.to(wide), params.to(wide)
        state = torch.stack([0.5 * moments, moments.square(), start])
        return cls(
            params=list(params.unbind()),
            grads=list(grads.unbind()),
            exp_avgs=list(state[0].unbind()),
            exp_avg_sqs=list(state[1].unbind()),
            averages=list(state[2].unbind()),
            masters=list(start.clone().unbind()) if master and params.dtype in HALVES else [],
            steps=[torch.tensor(STEPS, device=params.device) for _ in range(len(params))],
            state=state,
        )

    def plan(self) -> Plan:
        """For the op."""
        return Plan(
            self.params,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            averages=self.averages,
            masters=self.masters,
        )


class AdamwAverageCase:
    """See :class:`kdkernels.bench.cases.Case`. A shape is ``(tensors, elements of each)``.

    The dtype is that of the parameters and gradients. ``plain`` has no masters, ``master`` has
    float32 ones of 16-bit parameters.
    """

    divergences = ("plain", "master")
    default_divergences = ("plain",)
    modes = ("forward",)
    rivals = ("foreach", "fused")
    row_kernels = ("adamw_chunks", "adamw_kernel")
    search_loops = 1  # for the tensor of a chunk
    unchecked: tuple[str, ...] = ()
    unfused_kernels: tuple[str, ...] = ()

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes, ``(tensors, elements)``."""
        return SHAPES

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """Parameters and gradients, a row each."""
        params, grads = (torch.randn(shape, device=setting.device) for _ in range(2))
        return params.to(setting.dtype), grads.to(setting.dtype)

    def ours(self, setting: Setting, backend: str) -> Run:
        """The op on a plan that was made before, as in training."""
        lr, weight, factor = (torch.tensor(x, device=setting.device) for x in (LR, WEIGHT, 1.0))
        master = _has_masters(setting)
        made = _Prepared(lambda *inputs: _with_plan(Lists.of(master, *inputs)))

        def run(params: Tensor, grads: Tensor) -> Tensor:
            lists, plan = made(params, grads)
            adamw_average_(plan, lists.grads, lr=lr, factor=factor, weight=weight, backend=backend)
            return lists.state

        return run

    def rival(self, setting: Setting, name: str) -> Run | str:
        """Torch's optimizer and a lerp, on parameters (or masters) that were made before."""
        if setting.dtype == torch.float64:
            return f"{name} is not measured in float64"
        master = _has_masters(setting)
        made = _Prepared(lambda *inputs: _with_optimizer(Lists.of(master, *inputs), name))

        def run(params: Tensor, grads: Tensor) -> Tensor:
            lists, optimizer = made(params, grads)
            if lists.masters:
                # As mixed precision does it: float32 gradients, then the rounded parameters.
                for x, grad in zip(lists.masters, lists.grads, strict=True):
                    x.grad = grad.float()
            optimizer.step()
            trained = lists.masters or lists.params
            with torch.no_grad():
                if lists.masters:
                    torch._foreach_copy_(lists.params, trained)
                sources = [x.to(torch.float32) for x in trained]
                torch._foreach_lerp_(lists.averages, sources, WEIGHT)
            return lists.state

        return run

    def traffic(self, mode: str) -> int:
        """Of float32 parameters; see ``mixed_traffic``."""
        return 9

    def mixed_traffic(self, setting: Setting) -> int:
        """Moments and average (and master) read and written, gradient read, in parameters."""
        size = setting.dtype.itemsize
        # With a master the parameter is only written.
        moved = 8 + 8 + 8 + size + (8 + size if _has_masters(setting) else 2 * size)
        return moved // size

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """dtypes, masters, averages, sizes off the boundaries."""
        for param, grad, average, master in _combinations():
            names = [str(d).removeprefix("torch.") for d in (param, grad)]
            name = f"{names[0]}, gradient {names[1]}"
            name += ("", ", average")[average] + ("", ", master")[master]
            for size in (768, 2 * CHUNK + 13):
                yield (
                    f"{name}, {size} elements",
                    _check(param, grad, average, master, size, device, backend),
                )

    def triton_calls(self) -> Iterator[TritonCall]:
        """Every combination of dtypes, with and without a flag for overflows."""
        for param, grad, average, master in _combinations():
            numbers = [DTYPES.index(param), DTYPES.index(grad), average - 1, master - 1]
            for found in (None, torch.zeros(())):
                name = f"{numbers}{'' if found is None else ' found_inf'}"
                yield TritonCall(name, partial(_step_nothing, numbers, found))


class _Prepared:
    """What is made once for an input set, found again by its addresses."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        self._make = make
        self._made: dict[Any, Any] = {}

    def __call__(self, params: Tensor, grads: Tensor) -> Any:
        # It holds their memory, so nothing else can come to lie there.
        key = params.data_ptr(), grads.data_ptr(), params.shape, params.dtype
        if key not in self._made:
            self._made[key] = self._make(params, grads)
        return self._made[key]


def _has_masters(setting: Setting) -> bool:
    return setting.divergence == "master" and setting.dtype in HALVES


def _with_plan(lists: Lists) -> tuple[Lists, Plan]:
    return lists, lists.plan()


def _with_optimizer(lists: Lists, name: str) -> tuple[Lists, torch.optim.AdamW]:
    trained = [x.detach() for x in lists.masters or lists.params]
    for x, grad in zip(trained, lists.grads, strict=True):
        x.requires_grad_().grad = grad.to(x.dtype)
    if lists.masters:
        lists.masters = trained
    else:
        lists.params = trained
    options: dict[str, Any] = {name: True}
    optimizer = torch.optim.AdamW(trained, lr=LR, **options)
    for i, x in enumerate(trained):
        # 16-bit parameters have moments of their dtype there.
        optimizer.state[x] = {
            "step": lists.steps[i] if name == "fused" else lists.steps[i].cpu(),
            "exp_avg": lists.exp_avgs[i].to(x.dtype),
            "exp_avg_sq": lists.exp_avg_sqs[i].to(x.dtype),
        }
    return lists, optimizer


def _combinations() -> Iterator[tuple[torch.dtype, torch.dtype, bool, bool]]:
    for param in DTYPES:
        half = param in HALVES
        grads = (param, torch.float32) if half else (param,)
        masters = (False, True) if half else (False,)
        yield from itertools.product((param,), grads, (False, True), masters)


def _check(
    param: torch.dtype,
    grad: torch.dtype,
    average: bool,
    master: bool,
    size: int,
    device: str,
    backend: str,
) -> list[Check]:
    given = [torch.randn(2, n, device=device) for n in (size, 5)]
    numbers = [torch.tensor(x, device=device) for x in (0.01, 0.5, 0.3)]

    def run(name: str, precise: bool) -> list[Tensor]:
        parts = [
            Lists.of(
                master and not precise,
                x[:1].to(param).to(torch.float64 if precise else param, copy=True),
                x[1:].to(grad).to(torch.float64 if precise else grad),
            )
            for x in given
        ]
        lists = parts[0]
        for part in ("params", "grads", "exp_avgs", "exp_avg_sqs", "averages", "masters", "steps"):
            getattr(lists, part).extend(getattr(parts[1], part))
        if not average:
            lists.averages = []
        lr, factor, weight = numbers
        adamw_average_(
            lists.plan(),
            lists.grads,
            lr=lr,
            factor=factor,
            weight=weight if average else None,
            backend=name,
        )
        masters = lists.params if precise and master else lists.masters
        return [*lists.params, *lists.exp_avgs, *lists.exp_avg_sqs, *lists.averages, *masters]

    results = run(backend, False), run("reference", True), run("reference", False)
    names = ["param", "exp_avg", "exp_avg_sq"] + ["average"] * average + ["master"] * master
    found = []
    for i, (actual, oracle, reference) in enumerate(zip(*results, strict=True)):
        # An average is that of rounded params.
        rounds = names[i // 2] == "average" and not master
        found.append(
            compare(names[i // 2], actual, oracle, reference, param if rounds else reference.dtype)
        )
    return found


def _step_nothing(dtypes: list[int], found_inf: Tensor | None) -> None:
    table, one = torch.zeros(1, 9, dtype=torch.int64), torch.ones(())
    adamw_average_grads("triton", table, [0])
    constants = [0.9, 0.999, 1e-8, 0.01, 0.0]
    adamw_average_update("triton", table, one, one, one, found_inf, constants, dtypes, 1)


CASE = AdamwAverageCase()
