"""``hidden_match_loss`` with a linear projection from the student's width to the teacher's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall, hidden_match
from kdkernels.ops.hidden_match import Kind, Spec
from kdkernels.ops.linear_hidden_match import linear_hidden_match

SHAPES = {"cpu": [(8192, 768)], "cuda": [(8192, 4096)]}
WIDTH = {"cpu": 312, "cuda": 2048}  # of the student


class LinearHiddenMatchCase:
    """See :class:`kdkernels.bench.cases.Case`. A shape is ``(rows, width of the teacher)``."""

    divergences = hidden_match.CASE.divergences
    default_divergences = ("mse",)
    modes = ("forward", "full")
    rivals = ("eager", "compile", "gemms")
    row_kernels: tuple[str, ...] = ()
    unfused_kernels: tuple[str, ...] = ()
    unchecked = ("gemms",)

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """Student's states, weight and bias of the projection, teacher's states, mask."""
        rows, columns = shape
        width = WIDTH[setting.device]
        student = torch.randn(rows, width, device=setting.device)
        weight = torch.randn(columns, width, device=setting.device) / width**0.5
        bias = torch.randn(columns, device=setting.device)
        teacher = torch.randn(shape, device=setting.device).to(setting.dtype)
        mask = torch.arange(rows, device=setting.device) % 16 != 15
        leaves = (x.to(setting.dtype).requires_grad_() for x in (student, weight, bias))
        return (*leaves, teacher, mask)

    def ours(self, setting: Setting, backend: str) -> Run:
        """The op, as ``hidden_match_loss`` calls it for an ``nn.Linear``."""
        spec = Spec(hidden_match.KINDS[setting.divergence], mean=True)

        def loss(student: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> Tensor:
            teacher, mask = others
            return linear_hidden_match(
                student, teacher, mask, None, None, spec, head=(weight, bias), backend=backend
            )[0]

        return loss

    def rival(self, setting: Setting, name: str) -> Run | str:
        """The projected states in full, and what no method can save: the GEMMs alone."""
        if name == "gemms":
            return _gemms
        run = partial(_eager, setting.divergence)
        if name == "eager":
            return run
        torch._dynamo.reset()  # one shape a time: no limit on recompilations is reached
        compiled: Run = torch.compile(run, dynamic=False)
        return compiled

    def traffic(self, mode: str) -> int:
        """No bound by memory: the GEMMs are the floor."""
        return 0

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """Kinds and dtypes, in several chunks."""
        for kind in Kind:
            for dtype in hidden_match.DTYPES:
                name = f"{kind.name.lower()} {str(dtype).removeprefix('torch.')}"
                yield name, _check(kind, dtype, device, backend)

    def triton_calls(self) -> Iterator[TritonCall]:
        """None of its own: those of ``hidden_match``."""
        return iter(())


def _eager(
    kind: str, student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, mask: Tensor
) -> Tensor:
    run: Any = hidden_match.CASE.rival(Setting("cpu", student.dtype, kind), "eager")
    result: Tensor = run(F.linear(student, weight, bias), teacher, mask)
    return result


class _Gemms(torch.autograd.Function):
    """The three GEMMs, their results where they would go; nothing between them."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, weight: Tensor) -> Tensor:
        projected = student @ weight.T
        ctx.save_for_backward(
            *((projected @ weight, projected.T @ student) if any(ctx.needs_input_grad) else ())
        )
        return projected[0, 0].float()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors


def _gemms(student: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> Tensor:
    result: Tensor = _Gemms.apply(student, weight)
    return result + 0.0 * bias[0].float()


def _check(kind: Kind, dtype: torch.dtype, device: str, backend: str) -> list[Check]:
    """Loss and gradients against the reference in float64, in chunks of three rows."""
    student, teacher = torch.randn(8, 24).to(device, dtype), torch.randn(8, 40).to(device, dtype)
    weight, bias = torch.randn(40, 24).to(device, dtype), torch.randn(40).to(device, dtype)
    mask = torch.arange(8, device=device) != 2

    def run(name: str, precision: torch.dtype) -> list[Tensor]:
        leaves = [x.to(precision, copy=True).requires_grad_() for x in (student, weight, bias)]
        loss, _ = linear_hidden_match(
            leaves[0], teacher.to(precision), mask, None, None, Spec(kind, mean=True),
            head=(leaves[1], leaves[2]), chunk_rows=3, backend=name,
        )  # fmt: skip
        return [loss, *torch.autograd.grad(1024 * loss, leaves)]

    results = run(backend, dtype), run("reference", torch.float64), run("reference", dtype)
    names = ("loss", "gradient of states", "gradient of the weight", "gradient of the bias")
    return [
        compare(name, actual, oracle, reference, reference.dtype)
        for name, actual, oracle, reference in zip(names, *results, strict=True)
    ]


CASE = LinearHiddenMatchCase()
