"""``linear_kd_loss``: forward KL and cross-entropy, half each, from hidden states and two heads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.bench import rivals
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops.kd_loss import Divergence, Spec
from kdkernels.ops.linear_kd_loss import Heads, linear_kd_loss

SHAPES = {"cpu": [(1024, 32000), (512, 128256)], "cuda": [(8192, 32000), (8192, 128256)]}
WIDTH = {"cpu": 768, "cuda": 4096}  # of both models


class LinearKDLossCase:
    """See :class:`kdkernels.bench.cases.Case`."""

    divergences = tuple(rivals.DIVERGENCES)
    default_divergences = ("forward_kl",)
    modes = ("forward", "full")
    rivals = ("eager", "gemms")
    row_kernels: tuple[str, ...] = ()
    unfused_kernels: tuple[str, ...] = ()
    unchecked = ("gemms",)

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes, ``(rows, vocabulary)``."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """Hidden states and heads that give logits with a deviation of 2, and labels."""
        rows, vocab = shape
        width = WIDTH[setting.device]

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=setting.device)

        student, teacher = (normal(rows, width).to(setting.dtype) for _ in range(2))
        heads = [(normal(vocab, width) * (2 / width**0.5)).to(setting.dtype) for _ in range(2)]
        labels = torch.randint(vocab, (rows,), device=setting.device)
        return student.requires_grad_(), heads[0].requires_grad_(), teacher, heads[1], labels

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.linear_kd_loss`` as users call it."""

        def loss(
            student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor
        ) -> Tensor:
            result: Tensor = kdkernels.linear_kd_loss(
                student,
                weight,
                teacher,
                teacher_weight,
                labels,
                temperature=setting.temperature,
                alpha=rivals.ALPHA,
                divergence=setting.divergence,
                beta=rivals.BETA,
                backend=backend,
            )
            return result

        return loss

    def rival(self, setting: Setting, name: str) -> Run | str:
        """The logits in full, and what no method can save: the GEMMs alone."""
        if name == "gemms":
            return _gemms
        if name != "eager":
            return f"{name} has no case here"
        on_logits = rivals.eager(setting.divergence, setting.temperature)

        def loss(
            student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor
        ) -> Tensor:
            with torch.no_grad():
                teacher_logits = teacher @ teacher_weight.T
            return on_logits(student @ weight.T, teacher_logits, labels)

        return loss

    def traffic(self, mode: str) -> int:
        """No bound by memory: the GEMMs are the floor."""
        return 0

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """Divergences, dtypes, with and without ignored rows, in several chunks."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        for divergence, dtype in itertools.product(Divergence, dtypes):
            spec = Spec(int(divergence), ce_weight=0.5, kd_weight=2.0, temperature=2.0)
            name = f"{divergence.name.lower()} {str(dtype).removeprefix('torch.')}"
            yield name, _check(spec, dtype, device, backend)
        spec = Spec(int(Divergence.FORWARD_KL), ce_weight=0.5, kd_weight=0.5)
        yield "padded heads", _check(spec._replace(classes=250), torch.float32, device, backend)

    def triton_calls(self) -> Iterator[TritonCall]:
        """None of its own: those of ``kd_loss``."""
        return iter(())


class _Gemms(torch.autograd.Function):
    """The four GEMMs, their results where they would go; nothing between them."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        logits = student @ weight.T
        torch.mm(teacher, teacher_weight.T, out=logits)
        ctx.wanted = ctx.needs_input_grad[:2]
        ctx.save_for_backward(*((logits @ weight, logits.T @ student) if any(ctx.wanted) else ()))
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.saved_tensors, None, None


def _gemms(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor
) -> Tensor:
    result: Tensor = _Gemms.apply(student, weight, teacher, teacher_weight)
    return result


def _check(spec: Spec, dtype: torch.dtype, device: str, backend: str) -> list[Check]:
    """Loss and gradients against the reference in float64, in chunks of three rows."""
    rows, vocab, widths = 8, 300, (24, 40)
    hidden = [torch.randn(rows, width).to(device, dtype) for width in widths]
    weights = [torch.randn(vocab, width).to(device, dtype) / 2 for width in widths]
    labels = torch.randint(250, (rows,), device=device)
    labels[1] = spec.ignore_index

    def run(name: str, precision: torch.dtype) -> list[Tensor]:
        student, weight = (
            x[0].detach().to(precision, copy=True).requires_grad_() for x in (hidden, weights)
        )
        needed = spec.needs_teacher
        teacher = hidden[1].to(precision) if needed else None
        heads = Heads(weight, None, weights[1].to(precision) if needed else None)
        loss, _ = linear_kd_loss(
            student, teacher, labels, None, None, spec, heads=heads, chunk_rows=3, backend=name
        )
        return [loss, *torch.autograd.grad(loss, (student, weight))]

    results = run(backend, dtype), run("reference", torch.float64), run("reference", dtype)
    names = ("loss", "gradient of hidden states", "gradient of the head")
    return [
        compare(name, actual, oracle, reference, reference.dtype)
        for name, actual, oracle, reference in zip(names, *results, strict=True)
    ]


CASE = LinearKDLossCase()
