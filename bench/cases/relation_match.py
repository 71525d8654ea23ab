"""``relation_match`` as MiniLM has it: a layer's queries (or keys, or values) with themselves.

A shape is ``(batch * seq, width)``: sequences of 512 tokens (one of all rows where 512 does not
divide them), heads of width 64 (one head where 64 does not divide the width).
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops.relation_match import Kind, Spec, relation_match

SHAPES = {"cpu": [(4096, 768), (1024, 1024)], "cuda": [(8192, 768), (32768, 1024)]}
SEQ, HEAD_WIDTH = 512, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RelationMatchCase:
    """See :class:`kdkernels.bench.cases.Case`."""

    divergences = default_divergences = ("kl",)
    modes = ("forward", "full")
    rivals = ("eager", "compile", "gemms")
    row_kernels: tuple[str, ...] = ()
    unfused_kernels: tuple[str, ...] = ()
    unchecked = ("gemms",)

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes, ``(batch * seq, width)``."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """States of two models, ``[batch, seq, width]``."""
        rows, width = shape
        seq = SEQ if rows % SEQ == 0 else rows
        student, teacher = (
            torch.randn(rows // seq, seq, width, device=setting.device).to(setting.dtype)
            for _ in range(2)
        )
        return student.requires_grad_(), teacher

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.relation_match_loss`` as users call it."""

        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            result: Tensor = kdkernels.relation_match_loss(
                student, teacher, num_relation_heads=_heads(student), backend=backend
            )
            return result

        return loss

    def rival(self, setting: Setting, name: str) -> Run | str:
        """All relations at once, and what no method can save: the GEMMs, an example at a time."""
        if name == "eager":
            return _eager
        if name == "gemms":
            return _gemms
        if name != "compile":
            return f"{name} has no case here"
        if setting.device == "cpu" and not any(shutil.which(n) for n in ("g++", "clang++")):
            return "torch.compile needs a C++ compiler on the CPU, none was found"
        torch._dynamo.reset()  # one shape a time: no limit on recompilations is reached
        run: Run = torch.compile(_eager, dynamic=False)
        return run

    def traffic(self, mode: str) -> int:
        """No bound by memory: the GEMMs are the floor."""
        return 0

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """Kinds and dtypes, with padding and without, causal or not, in tiles."""
        for kind, dtype, masked, causal in itertools.product(
            Kind, DTYPES, (False, True), (False, True)
        ):
            words = [kind.name, str(dtype).removeprefix("torch.")]
            words += ["padded"] * masked + ["causal"] * causal
            yield (
                " ".join(words).lower(),
                _check(Spec(int(kind), 0.3, 0.4, causal, True), dtype, masked, device, backend),
            )

    def triton_calls(self) -> Iterator[TritonCall]:
        """None of its own: those of ``kd_loss`` and ``hidden_match``."""
        return iter(())


def _heads(x: Tensor) -> int:
    width = x.shape[2]
    return int(width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1)


def _split(x: Tensor) -> Tensor:
    return x.unflatten(2, (_heads(x), -1)).transpose(1, 2)


def _eager(student: Tensor, teacher: Tensor) -> Tensor:
    logs = []
    for x in (student, teacher):
        a = _split(x)
        scores = (a @ a.transpose(2, 3)).float() * a.shape[3] ** -0.5
        logs.append(F.log_softmax(scores, dim=-1).flatten(0, 2))
    return F.kl_div(logs[0], logs[1], log_target=True, reduction="batchmean")


class _Gemms(torch.autograd.Function):
    """Scores of both models and, with a gradient, the two GEMMs back; nothing between them."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        a, b = _split(student), _split(teacher)
        grad = torch.empty_like(a) if ctx.needs_input_grad[0] else None
        for i in range(a.shape[0]):
            _ = b[i] @ b[i].transpose(1, 2)
            scores = a[i] @ a[i].transpose(1, 2)
            if grad is not None:
                grad[i] = scores @ a[i]
                grad[i] += scores.transpose(1, 2) @ a[i]
        if grad is not None:
            ctx.save_for_backward(grad.transpose(1, 2).flatten(2))
        return scores[0, 0, 0].float()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad, None


def _gemms(student: Tensor, teacher: Tensor) -> Tensor:
    result: Tensor = _Gemms.apply(student, teacher)
    return result


def _check(spec: Spec, dtype: torch.dtype, masked: bool, device: str, backend: str) -> list[Check]:
    """Loss and gradients against the reference in float64; grouped keys, tiles of a few rows."""
    batch, heads, seq, width = 2, 4, 13, 8
    shapes = (batch, heads, seq, width), (batch, 2, seq, width)
    leaves = [(1.5 * torch.randn(shape)).to(device, dtype) for shape in shapes]
    teacher = [(1.5 * torch.randn(shape)).to(device, dtype) for shape in shapes]
    lengths = torch.tensor([[9], [13]], device=device)
    mask = torch.arange(seq, device=device) < lengths if masked else None

    def run(name: str, precision: torch.dtype) -> list[Tensor]:
        q, k = (x.to(precision, copy=True).requires_grad_() for x in leaves)
        t = teacher[0].to(precision), teacher[1].to(precision)
        loss = relation_match(
            (q, k), t, mask, None, None, spec, tile_bytes=8 * seq * 20, backend=name
        )
        return [loss, *torch.autograd.grad(loss, (q, k))]

    results = run(backend, dtype), run("reference", torch.float64), run("reference", dtype)
    names = ("loss", "gradient of queries", "gradient of keys")
    return [
        compare(name, actual, oracle, reference, reference.dtype)
        for name, actual, oracle, reference in zip(names, *results, strict=True)
    ]


CASE = RelationMatchCase()
