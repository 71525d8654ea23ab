"""``topk_kd_loss``: forward KL from 64 listed classes and cross-entropy, half each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels
from kdkernels._op import Primitive
from kdkernels.bench import rivals
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops.kd_loss import Divergence, Spec, Tail
from kdkernels.ops.topk_kd_loss import TopKTeacher, topk_kd_loss
from kdkernels.ops.topk_kd_loss.op import (
    topk_kd_loss_forward,
    topk_kd_loss_grad,
    topk_kd_loss_grad_,
)

SHAPES = {
    "cpu": [(1024, 32000), (512, 128256)],
    "cuda": [(4096, 32000), (4096, 128256), (4096, 151936)],
}
ENTRIES = 64
SPREAD = 2.0  # standard deviation of the logits
TAILS = [t for t in Tail if t is not Tail.FULL]
KINDS = list(itertools.product((Divergence.FORWARD_KL, Divergence.REVERSE_KL), TAILS))


class TopKKDLossCase:
    """See :class:`kdkernels.bench.cases.Case`."""

    divergences = ("forward_kl", "reverse_kl")
    default_divergences = ("forward_kl",)
    modes = ("forward", "backward", "full")
    rivals = ("eager", "cross_entropy", "compile")
    row_kernels = ("kd_loss_rows", "kd_loss_kernel")
    unchecked = ("cross_entropy",)
    unfused_kernels = ("kd_loss_kernel",)

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """The student's logits, the list of a teacher of its own, labels."""
        rows, columns = shape
        student = torch.randn(shape, device=setting.device).mul_(SPREAD).to(setting.dtype)
        # Distinct ids without a second tensor of this size: one of each stretch of the row.
        entries = min(ENTRIES, columns)
        stretch = columns // entries
        ids = torch.arange(entries, device=setting.device) * stretch
        ids = ids + torch.randint(stretch, (rows, entries), device=setting.device)
        logprobs = (torch.randn(rows, entries, device=setting.device) * SPREAD).log_softmax(1) - 0.2
        labels = torch.randint(columns, (rows,), device=setting.device)
        return student.requires_grad_(), ids, logprobs, labels

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.topk_kd_loss`` as users call it."""

        def loss(student: Tensor, ids: Tensor, logprobs: Tensor, labels: Tensor) -> Tensor:
            result: Tensor = kdkernels.topk_kd_loss(
                student,
                ids,
                logprobs,
                labels,
                temperature=setting.temperature,
                alpha=rivals.ALPHA,
                divergence=setting.divergence,
                backend=backend,
            )
            return result

        return loss

    def rival(self, setting: Setting, name: str) -> Run | str:
        """Plain PyTorch, and what no method can save: our cross-entropy alone."""
        if name == "cross_entropy":
            return lambda student, ids, logprobs, labels: kdkernels.kd_loss(student, None, labels)
        if setting.divergence not in ("forward_kl", "reverse_kl"):
            return f"{name} has no {setting.divergence}"
        run = partial(_eager, setting.divergence, setting.temperature)
        if name == "eager":
            return run
        if name == "compile":
            torch._dynamo.reset()  # one shape a time: no limit on recompilations is reached
            compiled: Run = torch.compile(run, dynamic=False)
            return compiled
        return f"{name} has no case here"

    def traffic(self, mode: str) -> int:
        """The student's row is read once, its gradient written once; a list is next to nothing."""
        return {"forward": 1, "backward": 0, "full": 2}[mode]

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """Both directions, every tail and dtype; then options."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        for (divergence, tail), dtype in itertools.product(KINDS, dtypes):
            spec = Spec(
                int(divergence), ce_weight=0.5, kd_weight=2.0, temperature=2.0, tail=int(tail)
            )
            name = f"{divergence.name} {tail.name} {str(dtype).removeprefix('torch.')}".lower()
            yield name, _check(6, 1000, 20, spec, dtype, device, backend)
        for divergence, tail in KINDS:
            spec = Spec(
                int(divergence),
                temperature=3.0,
                ce_weight=0.5,
                kd_weight=0.5,
                label_smoothing=0.1,
                z_loss=0.01,
                student_softcap=8.0,
                classes=290,
                tail=int(tail),
            )
            name = f"{divergence.name} {tail.name} with options".lower()
            yield name, _check(4, 300, 70, spec, torch.float32, device, backend)

    def triton_calls(self) -> Iterator[TritonCall]:
        """Every direction, tail and dtype; every length of the list."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        for (divergence, tail), dtype in itertools.product(KINDS, dtypes):
            spec = Spec(
                int(divergence), ce_weight=0.5, kd_weight=0.5, temperature=2.0, tail=int(tail)
            )
            name = f"{divergence.name} {tail.name} {str(dtype).removeprefix('torch.')}".lower()
            yield TritonCall(name, partial(_launch, spec, dtype))
        spec = Spec(
            1,
            temperature=3.0,
            ce_weight=0.5,
            kd_weight=0.5,
            label_smoothing=0.1,
            z_loss=0.01,
            student_softcap=30.0,
            classes=30000,
            tail=int(Tail.UNIFORM),
        )
        yield TritonCall("options", partial(_launch, spec, torch.bfloat16))
        for entries in (1, 128, 1024):
            name = f"{entries} entries"
            yield TritonCall(name, partial(_launch, spec, torch.bfloat16, entries=entries))
        odd = partial(_launch, spec, torch.float16, op=topk_kd_loss_grad_, columns=50257)
        yield TritonCall("in place, odd rows", odd, wide=False)
        yield TritonCall("loss only", partial(_launch, spec, dtypes[0], op=topk_kd_loss_forward))


def _eager(
    divergence: str,
    temperature: float,
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    labels: Tensor,
) -> Tensor:
    """Plain PyTorch with a bucket for the rest, the softmax in float32 as careful users have it."""
    student = student.float()
    log_q = F.log_softmax(student / temperature, dim=-1).gather(-1, ids)

    def with_rest(x: Tensor) -> Tensor:
        rest = torch.log1p(-x.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
        return torch.cat((x, rest), -1)

    log_s, log_t = with_rest(log_q), with_rest(logprobs)
    first, second = (log_t, log_s) if divergence == "forward_kl" else (log_s, log_t)
    kd = (first.exp() * (first - second)).sum(-1).mean() * temperature**2
    return rivals.ALPHA * kd + (1 - rivals.ALPHA) * F.cross_entropy(student, labels)


def _launch(
    spec: Spec,
    dtype: torch.dtype,
    *,
    op: Primitive = topk_kd_loss_grad,
    columns: int = 32000,
    entries: int = 64,
) -> None:
    """Calls the Triton launcher on memory that nobody will touch."""
    op(
        "triton",
        torch.empty(2, columns, dtype=dtype),
        torch.empty(2, entries, dtype=torch.int64),
        torch.empty(2, entries),
        torch.zeros(2, dtype=torch.int64),
        torch.ones(2),
        torch.ones(()),
        spec,
    )


def _check(
    rows: int,
    columns: int,
    entries: int,
    spec: Spec,
    dtype: torch.dtype,
    device: str,
    backend: str,
) -> list[Check]:
    """Loss, its parts and the gradient against the reference in float64."""
    classes = columns if spec.classes < 0 else spec.classes
    logits = torch.randn(rows, columns, dtype=torch.float64) * SPREAD
    teacher = logits[:, :classes] + torch.randn(rows, classes, dtype=torch.float64)
    top = (teacher / spec.temperature).log_softmax(1).topk(entries)
    ids, logprobs = top.indices, top.values.float()
    ids[0, 3], ids[1, 4] = -1, ids[1, 2]  # no entry; a repetition
    labels = torch.randint(classes, (rows,))
    labels[2], labels[3] = ids[2, 0], spec.ignore_index
    student = logits.to(device, dtype)
    labels, listed = labels.to(device), TopKTeacher(ids.to(device), logprobs.to(device))

    def run(name: str, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaf = student.detach().to(precision, copy=True).requires_grad_()
        loss, parts = topk_kd_loss(leaf, listed, labels, None, None, spec, backend=name)
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


CASE = TopKKDLossCase()
