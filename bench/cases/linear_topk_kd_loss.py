"""``linear_topk_kd_loss``: forward KL from 64 listed classes and cross-entropy, half each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.bench import cases, rivals
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops.kd_loss import Divergence, Spec, Tail
from kdkernels.ops.linear_topk_kd_loss import linear_topk_kd_loss
from kdkernels.ops.topk_kd_loss import TopKTeacher

SHAPES = {"cpu": [(1024, 32000), (512, 128256)], "cuda": [(8192, 32000), (8192, 128256)]}
WIDTH = {"cpu": 768, "cuda": 4096}


class LinearTopKKDLossCase:
    """See :class:`kdkernels.bench.cases.Case`."""

    divergences = ("forward_kl", "reverse_kl")
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
        """Hidden states and head that give logits with a deviation of 2; a list and labels."""
        rows, vocab = shape
        width = WIDTH[setting.device]
        hidden = torch.randn(rows, width, device=setting.device).to(setting.dtype)
        weight = torch.randn(vocab, width, device=setting.device) * (2 / width**0.5)
        _, ids, logprobs, labels = cases.load("topk_kd_loss").inputs(setting, shape)
        weight = weight.to(setting.dtype).requires_grad_()
        return hidden.requires_grad_(), weight, ids, logprobs, labels

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.linear_topk_kd_loss`` as users call it."""

        def loss(*tensors: Tensor) -> Tensor:
            result: Tensor = kdkernels.linear_topk_kd_loss(
                *tensors,
                temperature=setting.temperature,
                alpha=rivals.ALPHA,
                divergence=setting.divergence,
                backend=backend,
            )
            return result

        return loss

    def rival(self, setting: Setting, name: str) -> Run | str:
        """The logits in full, and what no method can save: the GEMMs alone."""
        if name == "gemms":
            return _gemms
        on_logits: Any = cases.load("topk_kd_loss").rival(setting, name)
        if isinstance(on_logits, str) or name != "eager":
            return f"{name} has no case here"

        def loss(hidden: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
            result: Tensor = on_logits(hidden @ weight.T, *others)
            return result

        return loss

    def traffic(self, mode: str) -> int:
        """No bound by memory: the GEMMs are the floor."""
        return 0

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """Both directions, every tail and dtype, with an ignored row, in several chunks."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        tails = [t for t in Tail if t is not Tail.FULL]
        kinds = (Divergence.FORWARD_KL, Divergence.REVERSE_KL)
        for divergence, tail, dtype in itertools.product(kinds, tails, dtypes):
            spec = Spec(
                int(divergence), ce_weight=0.5, kd_weight=2.0, temperature=2.0, tail=int(tail)
            )
            name = f"{divergence.name} {tail.name} {str(dtype).removeprefix('torch.')}".lower()
            yield name, _check(spec, dtype, device, backend)

    def triton_calls(self) -> Iterator[TritonCall]:
        """None of its own: those of ``topk_kd_loss``."""
        return iter(())


class _Gemms(torch.autograd.Function):
    """The three GEMMs, their results where they would go; nothing between them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        ctx.save_for_backward(
            *((logits @ weight, logits.T @ hidden) if any(ctx.needs_input_grad) else ())
        )
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors


def _gemms(hidden: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
    result: Tensor = _Gemms.apply(hidden, weight)
    return result


def _check(spec: Spec, dtype: torch.dtype, device: str, backend: str) -> list[Check]:
    """Loss and gradients against the reference in float64, in chunks of three rows."""
    rows, vocab, width = 8, 300, 24
    hidden = torch.randn(rows, width).to(device, dtype)
    weight = (torch.randn(vocab, width) / 2).to(device, dtype)
    top = torch.randn(rows, vocab).log_softmax(1).topk(9)
    teacher = TopKTeacher(top.indices.to(device), top.values.to(device))
    labels = torch.randint(vocab, (rows,), device=device)
    labels[1] = spec.ignore_index

    def run(name: str, precision: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(precision, copy=True).requires_grad_() for x in (hidden, weight)]
        loss, _ = linear_topk_kd_loss(
            leaves[0], teacher, labels, None, None, spec,
            head=(leaves[1], None), chunk_rows=3, backend=name,
        )  # fmt: skip
        return [loss, *torch.autograd.grad(loss, leaves)]

    results = run(backend, dtype), run("reference", torch.float64), run("reference", dtype)
    names = ("loss", "gradient of hidden states", "gradient of the head")
    return [
        compare(name, actual, oracle, reference, reference.dtype)
        for name, actual, oracle, reference in zip(names, *results, strict=True)
    ]


CASE = LinearTopKKDLossCase()
