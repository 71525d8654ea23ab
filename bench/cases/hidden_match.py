"""``hidden_match_many`` of some layers of one shape, with a row mask."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops.hidden_match import Kind, Spec, hidden_match
from kdkernels.ops.hidden_match.op import hidden_match_forward, hidden_match_grad

LAYERS = {"cpu": 6, "cuda": 32}
SHAPES = {"cpu": [(8192, 768)], "cuda": [(8192, 4096), (8192, 768)]}
# One row in so many is padding. The floor counts it all the same: its gradient is written.
PADDED = 16
KINDS = {kind.name.lower(): kind for kind in Kind}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HiddenMatchCase:
    """See :class:`kdkernels.bench.cases.Case`. A shape is ``(rows, width)`` of each layer."""

    divergences = tuple(KINDS)
    default_divergences = ("mse", "cosine")
    modes = ("forward", "full")
    rivals = ("eager", "compile")
    row_kernels = ("match_rows", "match_rows_kernel")
    unchecked: tuple[str, ...] = ()
    unfused_kernels: tuple[str, ...] = ()

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes, ``(rows, width)``."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """Students, teachers that are like them, and the mask of the rows."""
        count = LAYERS[setting.device]
        teachers = [torch.randn(shape, device=setting.device) for _ in range(count)]
        students = [t + 0.5 * torch.randn_like(t) for t in teachers]
        mask = torch.arange(shape[0], device=setting.device) % PADDED != PADDED - 1
        return (
            *(s.to(setting.dtype).requires_grad_() for s in students),
            *(t.to(setting.dtype) for t in teachers),
            mask,
        )

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.hidden_match_many`` as users call it."""

        def loss(*tensors: Tensor) -> Tensor:
            students, teachers, mask = _taken_apart(tensors)
            result: Tensor = kdkernels.hidden_match_many(
                list(zip(students, teachers, strict=True)),
                kind=setting.divergence,
                mask=mask,
                backend=backend,
            )
            return result

        return loss

    def rival(self, setting: Setting, name: str) -> Run | str:
        """What users write: layer by layer, in float32, the mask multiplied in."""
        run = partial(_eager, setting.divergence)
        if name == "eager":
            return run
        torch._dynamo.reset()  # one shape a time: no limit on recompilations is reached
        compiled: Run = torch.compile(run, dynamic=False)
        return compiled

    def traffic(self, mode: str) -> int:
        """Both states of every layer are read once, the gradient is written once."""
        layers = LAYERS["cuda" if torch.cuda.is_available() else "cpu"]
        return layers * (2 if mode == "forward" else 3)

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """Kinds, dtypes, masks, mixed and odd widths."""
        for kind, dtype in itertools.product(Kind, DTYPES):
            name = f"{kind.name.lower()} {str(dtype).removeprefix('torch.')}"
            for widths in ((768, 768), (312, 33, 2049)):
                yield f"{name} {widths}", _check(kind, dtype, widths, 6, device, backend)
        yield "no rows", _check(Kind.COSINE, torch.float32, (20,), 0, device, backend)

    def triton_calls(self) -> Iterator[TritonCall]:
        """Kinds, dtypes, with and without a gradient, wide and odd rows."""
        for kind, dtype, grad in itertools.product(Kind, DTYPES, (True, False)):
            for width in (768, 4096, 333):
                name = f"{kind.name} {width} {str(dtype).removeprefix('torch.')} {grad}"
                call = partial(_match_nothing, kind, dtype, width, grad)
                yield TritonCall(name, call, wide=width % 8 == 0)


def _taken_apart(tensors: tuple[Tensor, ...]) -> tuple[Any, Any, Tensor]:
    count = (len(tensors) - 1) // 2
    return tensors[:count], tensors[count:-1], tensors[-1]


def _eager(kind: str, *tensors: Tensor) -> Tensor:
    students, teachers, mask = _taken_apart(tensors)
    kept = mask.float()
    total: Any = 0.0
    for s, t in zip(students, teachers, strict=True):
        wide = torch.float64 if s.dtype == torch.float64 else torch.float32
        s, t = s.to(wide), t.to(wide)
        if kind == "cosine":
            rows = 1.0 - F.cosine_similarity(s, t, dim=-1)
        elif kind == "pkd":
            rows = (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().mean(-1)
        elif kind == "smooth_l1":
            rows = F.smooth_l1_loss(s, t, reduction="none").mean(-1)
        else:
            rows = F.mse_loss(s, t, reduction="none").mean(-1)
        total = total + (rows * kept).sum() / kept.sum()
    result: Tensor = total
    return result


def _match_nothing(kind: Kind, dtype: torch.dtype, width: int, grad: bool) -> None:
    states = [torch.empty(3, width, dtype=dtype) for _ in range(2)]
    mask = torch.ones(3, dtype=torch.bool)
    primitive = hidden_match_grad if grad else hidden_match_forward
    primitive("triton", states, states, mask, None, None, [1.0, 1.0], Spec(kind))


def _check(
    kind: Kind, dtype: torch.dtype, widths: tuple[int, ...], rows: int, device: str, backend: str
) -> list[Check]:
    teachers = [torch.randn(rows, width).to(device) for width in widths]
    students = [(t + torch.randn_like(t)).to(dtype) for t in teachers]
    mask = torch.arange(rows, device=device) != 2

    def run(name: str, precision: torch.dtype) -> list[Tensor]:
        leaves = [s.to(precision, copy=True).requires_grad_() for s in students]
        loss, parts = hidden_match(
            leaves,
            [t.to(dtype).to(precision) for t in teachers],
            mask,
            None,
            None,
            [1.0] * len(widths),
            Spec(kind, mean=True),
            backend=name,
        )
        return [loss, parts, *torch.autograd.grad(1024 * loss, leaves)]

    results = run(backend, dtype), run("reference", torch.float64), run("reference", dtype)
    names = ["loss", "parts", *("gradient" for _ in widths)]
    return [
        compare(name, actual, oracle, reference, reference.dtype)
        for name, actual, oracle, reference in zip(names, *results, strict=True)
    ]


CASE = HiddenMatchCase()
