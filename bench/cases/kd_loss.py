"""``kd_loss``: forward KL and cross-entropy, half each, at the vocabularies of real models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import kdkernels
from kdkernels._op import Primitive
from kdkernels.bench import rivals
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Consuming, Inputs, Run, Setting, TritonCall
from kdkernels.ops.kd_loss import Divergence, Spec, kd_loss
from kdkernels.ops.kd_loss.op import kd_loss_forward, kd_loss_grad, kd_loss_grad_

# Vocabularies: 32000 Llama 2, 128256 Llama 3, 151936 Qwen 2.5; 2 and 3 are classification, where
# the time is that of the host.
SHAPES = {
    "cpu": [(512, 32000), (256, 128256), (32, 2), (32, 3)],
    "cuda": [(4096, 32000), (4096, 128256), (4096, 151936), (32, 2), (32, 3)],
}
SPREAD = 2.0  # standard deviation of the logits

Logits = tuple[Tensor, Tensor, Tensor]  # student, teacher, labels


class KDLossCase:
    """See :class:`kdkernels.bench.cases.Case`."""

    divergences = tuple(rivals.DIVERGENCES)
    default_divergences = ("forward_kl",)
    modes = ("forward", "backward", "full")
    rivals = ("eager", "compile", "liger", "trl")
    row_kernels = ("kd_loss_rows", "kd_loss_kernel")
    unchecked: tuple[str, ...] = ()
    unfused_kernels = ("kd_loss_kernel",)

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """Student and teacher logits and labels, every row valid."""
        rows, columns = shape
        student, teacher = (
            torch.randn(shape, device=setting.device).mul_(SPREAD).to(setting.dtype)
            for _ in range(2)
        )
        labels = torch.randint(columns, (rows,), device=setting.device)
        return student.requires_grad_(), teacher, labels

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.kd_loss`` as users call it."""

        def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            result = kdkernels.kd_loss(
                student,
                teacher,
                labels,
                temperature=setting.temperature,
                alpha=rivals.ALPHA,
                divergence=setting.divergence,
                beta=rivals.BETA,
                backend=backend,
            )
            assert isinstance(result, Tensor)
            return result

        return loss

    def rival(self, setting: Setting, name: str) -> Run | Consuming | str:
        """See :mod:`kdkernels.bench.rivals`."""
        if setting.divergence not in rivals.DIVERGENCES:
            return f"{name} has no {setting.divergence}"
        if name == "eager":
            return rivals.eager(setting.divergence, setting.temperature)
        build = {"compile": rivals.compiled, "liger": rivals.liger, "trl": rivals.trl}[name]
        return build(setting.divergence, setting.temperature, setting.device)

    def traffic(self, mode: str) -> int:
        """Both rows are read once, the gradient is written once.

        0 for ``backward``: who computes the gradient in the forward pass moves nothing then.
        """
        return {"forward": 2, "backward": 0, "full": 3}[mode]

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """Every divergence and dtype on plain rows, then the edge cases."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        for divergence, dtype in itertools.product(Divergence, dtypes):
            spec = Spec(divergence=int(divergence), ce_weight=0.5, kd_weight=2.0, temperature=2.0)
            logits = _logits(6, 1000)
            name = f"{divergence.name.lower()} {str(dtype).removeprefix('torch.')}"
            yield name, _check(logits, spec, dtype, device, backend)
        for divergence in Divergence:
            for name, logits, spec in _edges(divergence):
                checks = _check(logits, spec, torch.float32, device, backend)
                yield f"{divergence.name.lower()} {name}", checks

    def triton_calls(self) -> Iterator[TritonCall]:
        """Every divergence and dtype, plain and with all options; every block of the ladder."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        plain = Spec(ce_weight=0.5, kd_weight=0.5, temperature=2.0)
        kl = plain._replace(divergence=int(Divergence.FORWARD_KL))
        full = plain._replace(
            temperature=3.0,
            label_smoothing=0.1,
            z_loss=0.01,
            student_softcap=30.0,
            teacher_softcap=30.0,
            classes=30000,
        )
        for divergence, dtype in itertools.product(Divergence, dtypes):
            spec = plain._replace(divergence=int(divergence))
            name = f"{divergence.name.lower()} {str(dtype).removeprefix('torch.')}"
            yield TritonCall(name, partial(_launch, spec, dtype))
            if dtype == torch.bfloat16:
                spec = full._replace(divergence=int(divergence))
                yield TritonCall(f"{name}, options", partial(_launch, spec, dtype, full=True))
        for columns, dtype in itertools.product((1, 3, 32, 64, 128, 256, 512, 1024), dtypes):
            name = f"{columns} columns {str(dtype).removeprefix('torch.')}"
            yield TritonCall(name, partial(_launch, kl, dtype, columns=columns), columns >= 256)
        half, single = torch.float16, torch.float32
        odd = partial(_launch, kl, half, op=kd_loss_grad_, columns=50257)
        yield TritonCall("in place, odd rows", odd, wide=False)
        yield TritonCall("loss only", partial(_launch, kl, single, op=kd_loss_forward))
        unlabelled = kl._replace(ce_weight=0.0)
        yield TritonCall("no labels", partial(_launch, unlabelled, single, labels=False))
        mixed = partial(_launch, kl, single, teacher_dtype=torch.bfloat16)
        yield TritonCall("two dtypes", mixed)


def _launch(
    spec: Spec,
    dtype: torch.dtype,
    *,
    op: Primitive = kd_loss_grad,
    columns: int = 32000,
    teacher_dtype: torch.dtype | None = None,
    labels: bool = True,
    full: bool = False,
) -> None:
    """Calls the Triton launcher on memory that nobody will touch."""
    student = torch.empty(2, columns, dtype=dtype)
    teacher = torch.empty(2, columns, dtype=teacher_dtype or dtype)
    op(
        "triton",
        student,
        teacher if spec.needs_teacher else None,
        torch.zeros(2, dtype=torch.int64) if labels else None,
        torch.ones(2) if full else None,
        torch.ones(()) if full else None,
        spec,
    )


def _logits(rows: int, columns: int) -> Logits:
    student, teacher = torch.randn(2, rows, columns, dtype=torch.float64) * SPREAD
    return student, teacher, torch.randint(columns, (rows,))


def _edges(divergence: Divergence) -> Iterator[tuple[str, Logits, Spec]]:
    spec = Spec(divergence=int(divergence), ce_weight=0.5, kd_weight=0.5)
    full = spec._replace(label_smoothing=0.1, z_loss=0.01, temperature=3.0)
    yield "with smoothing and z-loss", _logits(4, 300), full
    caps = full._replace(student_softcap=5.0, teacher_softcap=4.0, student_scale=0.5)
    yield "with soft caps", _logits(4, 300), caps
    yield "one class", _logits(3, 1), spec
    yield "no rows", _logits(0, 7), spec

    student, teacher, labels = _logits(5, 3000)
    labels[1], student[1], teacher[1] = spec.ignore_index, torch.nan, torch.inf
    yield "ignored row of NaN", (student, teacher, labels), spec
    student, teacher, labels = _logits(3, 40)
    yield "all rows ignored", (student, teacher, torch.full_like(labels, spec.ignore_index)), spec

    student, teacher, labels = _logits(4, 3000)
    student[:, 100:], teacher[:, 100:] = -torch.inf, -torch.inf
    yield "masked classes", (student, teacher, labels % 100), full
    student, teacher, labels = _logits(4, 300)
    student[:, 290:] = torch.nan
    yield "padded vocabulary", (student, teacher, labels % 290), full._replace(classes=290)

    student, _, labels = _logits(4, 300)
    yield "teacher is student", (student, student.clone(), labels), spec
    student, teacher, labels = _logits(4, 300)
    # Powers of two, so that float32 holds the sum exactly enough to compare against.
    yield "large offsets", (student + 512.0, teacher - 1024.0, labels), spec


def _check(
    logits: Logits, spec: Spec, dtype: torch.dtype, device: str, backend: str
) -> list[Check]:
    """Loss, its parts and the gradient against the reference in float64."""
    student, teacher = (x.to(device, dtype) for x in logits[:2])
    labels = logits[2].to(device)

    def run(name: str, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaf = student.detach().to(precision, copy=True).requires_grad_()
        fitting = teacher.to(precision) if spec.needs_teacher else None
        loss, parts = kd_loss(leaf, fitting, labels, None, None, spec, backend=name)
        assert parts is not None
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss, parts, grad

    results = run(backend, dtype), run("reference", torch.float64), run("reference", dtype)
    names = ("loss", "parts", "gradient")
    dtypes = (torch.float32, torch.float32, dtype)
    return [
        compare(name, actual, oracle, reference, precision)
        for name, precision, actual, oracle, reference in zip(names, dtypes, *results, strict=True)
    ]


CASE = KDLossCase()
