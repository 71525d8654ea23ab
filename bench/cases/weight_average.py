"""``weight_average_`` of many tensors, and the exchange of averages and weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdkernels.bench import rivals
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops.weight_average import Plan, weight_average_, weight_average_swap_
from kdkernels.ops.weight_average.op import weight_average_swap, weight_average_update
from kdkernels.ops.weight_average.plan import CHUNK, DTYPES, HALVES

# Tensors and elements of each: about BERT-base (113M parameters), and as many vectors as a deep
# model has, where the time is that of the launches.
SHAPES = [(144, 768 * 1024), (2000, 768)]
DECAY = 0.999

Lists = tuple[list[Tensor], list[Tensor]]


class WeightAverageCase:
    """See :class:`kdkernels.bench.cases.Case`. A shape is ``(tensors, elements of each)``.

    The dtype is that of the parameters. ``ema`` has a float32 average, ``compensated`` a bfloat16
    pair, ``swap`` is one exchange with float32 averages.
    """

    divergences = ("ema", "compensated", "swap")
    default_divergences = ("ema",)
    modes = ("forward",)
    rivals = ("loop", "foreach", "swa_utils", "ema_pytorch")
    row_kernels = ("average_chunks", "average_kernel")
    search_loops = 1  # for the tensor of a chunk
    unchecked: tuple[str, ...] = ()
    unfused_kernels: tuple[str, ...] = ()

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes, ``(tensors, elements)``."""
        return SHAPES

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """Averages and parameters, a row each."""
        dtype, kept = setting.dtype, torch.float32
        if setting.divergence == "compensated":
            kept = torch.bfloat16
        elif setting.divergence == "swap" and dtype == torch.float16:
            dtype = torch.bfloat16  # of the same size: float16 cannot be exchanged
        params = torch.randn(shape, device=setting.device).to(dtype)
        return torch.randn(shape, device=setting.device).to(kept), params

    def ours(self, setting: Setting, backend: str) -> Run:
        """The op on a plan that was made before, as in training."""
        weight = torch.tensor(1 - DECAY, device=setting.device)
        plan_of = _Prepared(_plan)

        def run(averages: Tensor, params: Tensor) -> Tensor:
            plan = plan_of(averages, params)
            if setting.divergence == "swap":
                weight_average_swap_(plan, backend=backend)
                return params
            weight_average_(plan, weight, backend=backend)
            return averages

        return run

    def rival(self, setting: Setting, name: str) -> Run | str:
        """What users write, on lists that were made before."""
        if setting.divergence == "compensated":
            return f"{name} has no compensated averages"
        if name == "swa_utils":
            return _swa_utils(setting)
        if name == "ema_pytorch":
            return _ema_pytorch(setting)
        lists_of = _Prepared(_rows)
        update = {
            ("ema", "loop"): _loop,
            ("ema", "foreach"): _foreach,
            ("swap", "loop"): _loop_swap,
            ("swap", "foreach"): _foreach_swap,
        }[setting.divergence, name]

        def run(averages: Tensor, params: Tensor) -> Tensor:
            update(*lists_of(averages, params))
            return params if setting.divergence == "swap" else averages

        return run

    def traffic(self, mode: str) -> int:
        """Of float32 parameters; see ``mixed_traffic``."""
        return 3

    def mixed_traffic(self, setting: Setting) -> int:
        """Average (or pair) and, exchanged, parameter are read and written, in parameters."""
        size = setting.dtype.itemsize
        return (8 + (2 if setting.divergence == "swap" else 1) * size) // size

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """dtypes, copies, sizes off the boundaries, exchanges."""
        for average, param, copy in _dtypes():
            names = (str(d).removeprefix("torch.") for d in (average, param, copy))
            name = "{} of {}, copy {}".format(*names)
            for size in (768, 2 * CHUNK + 13):
                yield (
                    f"{name}, {size} elements",
                    _check(average, param, copy, size, device, backend),
                )
        for param in (torch.float32, torch.bfloat16):
            yield f"exchange with {param}", _check_swap(param, device, backend)

    def triton_calls(self) -> Iterator[TritonCall]:
        """Every combination of dtypes."""
        for average, param, copy in _dtypes():
            numbers = [-1 if d is None else DTYPES.index(d) for d in (average, param, copy)]
            yield TritonCall(f"{numbers}", partial(_average_nothing, numbers))
        for place in (0, 1):
            yield TritonCall(f"exchange {place}", partial(_swap_nothing, [0, place, -1]))


class _Prepared:
    """What is made once for an input set, found again by its addresses."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        self._make = make
        self._made: dict[Any, Any] = {}

    def __call__(self, averages: Tensor, params: Tensor) -> Any:
        # It holds their memory, so nothing else can come to lie there.
        key = averages.data_ptr(), params.data_ptr(), averages.shape, averages.dtype
        if key not in self._made:
            self._made[key] = self._make(averages, params)
        return self._made[key]


def _rows(averages: Tensor, params: Tensor) -> Lists:
    return list(averages.unbind()), list(params.unbind())


def _plan(averages: Tensor, params: Tensor) -> Plan:
    half = averages.dtype in HALVES
    rest = [torch.zeros_like(x) for x in averages.unbind()] if half else []
    return Plan(*_rows(averages, params), compensations=rest)


def _loop(averages: list[Tensor], params: list[Tensor]) -> None:
    for average, param in zip(averages, params, strict=True):
        average.lerp_(param.to(average.dtype), 1 - DECAY)


def _foreach(averages: list[Tensor], params: list[Tensor]) -> None:
    torch._foreach_lerp_(
        averages, [p.to(a.dtype) for a, p in zip(averages, params, strict=True)], 1 - DECAY
    )


def _loop_swap(averages: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    kept = [param.clone() for param in params]
    for average, param in zip(averages, params, strict=True):
        param.copy_(average)
    return kept


def _foreach_swap(averages: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    kept = [param.clone() for param in params]
    torch._foreach_copy_(params, averages)
    return kept


def _swa_utils(setting: Setting) -> Run | str:
    if setting.divergence == "swap":
        return "swa_utils exchanges nothing"
    if setting.dtype != torch.float32:
        return "swa_utils keeps averages in the dtype of the parameters"

    def prepare(averages: Tensor, params: Tensor) -> tuple[AveragedModel, nn.Module]:
        kept, model = _modules(averages, params)
        averaged = AveragedModel(nn.Module(), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        averaged.module = kept
        averaged.n_averaged.fill_(1)  # 0 copies
        return averaged, model

    made = _Prepared(prepare)

    def run(averages: Tensor, params: Tensor) -> Tensor:
        averaged, model = made(averages, params)
        averaged.update_parameters(model)
        return averages

    return run


def _ema_pytorch(setting: Setting) -> Run | str:
    if setting.divergence == "swap":
        return "ema_pytorch exchanges nothing"
    if reason := rivals.absent("ema_pytorch", setting.device, needs_gpu=False):
        return reason
    from ema_pytorch import EMA

    def prepare(averages: Tensor, params: Tensor) -> Any:
        kept, model = _modules(averages, params)
        # A constant decay from the first update on; the average takes any dtype.
        options = {"beta": DECAY, "min_value": DECAY, "update_after_step": 0, "update_every": 1}
        ema = EMA(model, kept, use_foreach=True, coerce_dtype=True, **options)
        ema.initted.fill_(True)
        ema.step.fill_(10)
        return ema

    made = _Prepared(prepare)

    def run(averages: Tensor, params: Tensor) -> Tensor:
        made(averages, params).update()
        return averages

    return run


def _modules(averages: Tensor, params: Tensor) -> tuple[nn.ParameterList, nn.ParameterList]:
    return nn.ParameterList(averages.unbind()), nn.ParameterList(params.unbind())


def _dtypes() -> Iterator[tuple[torch.dtype, torch.dtype, torch.dtype | None]]:
    yield from itertools.product((torch.float32,), DTYPES, (None, *DTYPES))
    yield from itertools.product(HALVES, DTYPES, (None,))


def _check(
    average: torch.dtype,
    param: torch.dtype,
    copy: torch.dtype | None,
    size: int,
    device: str,
    backend: str,
) -> list[Check]:
    averages = [torch.randn(n).to(device, average) for n in (size, 5)]
    params = [torch.randn_like(x, dtype=torch.float32).to(param) for x in averages]
    weight = torch.tensor(0.3, device=device)

    def run(name: str, precise: bool) -> list[Tensor]:
        dtype = torch.float64 if precise else average
        kept = [x.to(dtype, copy=True) for x in averages]
        rest = [] if precise or average not in HALVES else [torch.zeros_like(x) for x in kept]
        copies = [] if copy is None else [torch.empty_like(x, dtype=copy) for x in kept]
        if precise and copies:
            copies = [torch.empty_like(x) for x in kept]
        source = [x.to(dtype) if precise else x for x in params]
        weight_average_(Plan(kept, source, compensations=rest, copies=copies), weight, backend=name)
        return [*kept, *copies]

    results = run(backend, False), run("reference", True), run("reference", False)
    return [
        compare("average" if i < 2 else "copy", actual, oracle, reference, reference.dtype)
        for i, (actual, oracle, reference) in enumerate(zip(*results, strict=True))
    ]


def _check_swap(param: torch.dtype, device: str, backend: str) -> list[Check]:
    averages = [torch.randn(n).to(device) for n in (CHUNK + 13, 5)]
    params = [torch.randn_like(x).to(param) for x in averages]
    before = [x.clone() for x in (*averages, *params)]
    plan = Plan(averages, params)
    weight_average_swap_(plan, backend=backend)
    found = [
        compare("exchanged", p, a.double(), a.to(param), param)
        for p, a in zip(params, before, strict=False)
    ]
    weight_average_swap_(plan, back=True, backend=backend)
    for now, was in zip((*averages, *params), before, strict=True):
        # To the bit: no rounding is allowed.
        found.append(Check("exchanged back", float((now != was).sum()), 0.0))
    return found


def _average_nothing(dtypes: list[int]) -> None:
    table = torch.zeros(1, 6, dtype=torch.int64)
    weight_average_update("triton", table, torch.ones(()), dtypes, 1)


def _swap_nothing(dtypes: list[int]) -> None:
    weight_average_swap("triton", torch.zeros(1, 6, dtype=torch.int64), dtypes, 1, False)


CASE = WeightAverageCase()
