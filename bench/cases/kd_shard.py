"""``kd_shard``: the loss of ``kd_loss`` where logits come in shards, here on one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels._op import Primitive
from kdkernels.bench import rivals
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.bench.cases.kd_loss import CASE as WHOLE
from kdkernels.bench.cases.kd_loss import SPREAD
from kdkernels.bench.sharded import chunks_of
from kdkernels.ops._shared import vocab_shards
from kdkernels.ops._shared.vocab_rows import Chunk, Shard
from kdkernels.ops.kd_loss import Divergence, Spec
from kdkernels.ops.kd_loss.reference import kd_loss_reference
from kdkernels.ops.kd_shard.op import (
    kd_shard_found,
    kd_shard_grad,
    kd_shard_grad_,
    kd_shard_middle,
    shard_spec,
)
from kdkernels.ops.kd_shard.spec import Merged

SHAPES = {
    "cpu": [(512, 32000), (256, 128256)],
    "cuda": [(4096, 32000), (4096, 128256)],
}
KINDS = [d for d in Divergence if Divergence.FORWARD_KL <= d <= Divergence.TVD]


class KDShardCase:
    """See :class:`kdkernels.bench.cases.Case`."""

    divergences = tuple(rivals.DIVERGENCES)
    default_divergences = ("forward_kl",)
    modes = ("forward", "full")
    rivals = ("eager", "kd_loss")
    row_kernels = (
        "kd_shard_found_rows",
        "kd_shard_middle_rows",
        "kd_shard_gradient_rows",
        "kd_shard_found_kernel",
        "kd_shard_middle_kernel",
        "kd_shard_gradient_kernel",
    )
    narrow_stores = (
        "kd_shard_found_rows",
        "kd_shard_middle_rows",
        "kd_shard_found_kernel",
        "kd_shard_middle_kernel",
    )
    unchecked: tuple[str, ...] = ()
    unfused_kernels = (
        "kd_shard_found_kernel",
        "kd_shard_middle_kernel",
        "kd_shard_gradient_kernel",
    )

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """Those of ``kd_loss``."""
        return WHOLE.inputs(setting, shape)

    def ours(self, setting: Setting, backend: str) -> Run:
        """What ``vocab_parallel_kd_loss`` runs, in a group of one: nothing is sent."""
        spec = Spec(
            int(Divergence[setting.divergence.upper()]),
            beta=rivals.BETA,
            temperature=setting.temperature,
            ce_weight=1.0 - rivals.ALPHA,
            kd_weight=rivals.ALPHA * setting.temperature**2,
        )

        def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            rows, classes = student.shape
            shard = Shard(None, 0, 1, 0, classes, classes, rows, backend)
            others = teacher, None, None, labels, None, None
            return vocab_shards.reduced(student, None, None, others, spec, shard)[0]

        return loss

    def rival(self, setting: Setting, name: str) -> Run | str:
        """Of the whole rows: plain PyTorch, and ``kd_loss``, which nothing has to be sent for."""
        if setting.divergence not in rivals.DIVERGENCES:
            return f"{name} has no {setting.divergence}"
        if name == "eager":
            return rivals.eager(setting.divergence, setting.temperature)
        return WHOLE.ours(setting, "native")

    def traffic(self, mode: str) -> int:
        """Both rows are read before what is found is sent, and after; the gradient is written."""
        return {"forward": 2, "full": 5}[mode]

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """Three shards against the whole: every divergence and dtype, then edge cases."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        for divergence, dtype in itertools.product(KINDS, dtypes):
            spec = Spec(int(divergence), ce_weight=0.5, kd_weight=2.0, temperature=2.0)
            name = f"{divergence.name.lower()} {str(dtype).removeprefix('torch.')}"
            yield name, _check(_logits(6, 3000), spec, dtype, device, backend)
        for divergence in (Divergence.NONE, *KINDS):
            full = Spec(
                int(divergence),
                ce_weight=0.5,
                kd_weight=0.5,
                temperature=3.0,
                label_smoothing=0.1,
                z_loss=0.01,
                student_softcap=8.0,
            )
            student, teacher, labels = _logits(5, 300)
            student[:, 100:200], teacher[:, 100:200] = -torch.inf, -torch.inf
            labels = labels % 100
            labels[1], student[1], teacher[1] = full.ignore_index, torch.nan, torch.inf
            logits = student, teacher, labels
            yield (
                f"{divergence.name.lower()} with options, masked classes, an ignored row",
                _check(logits, full, torch.float32, device, backend),
            )

    def triton_calls(self) -> Iterator[TritonCall]:
        """Every step and divergence, plain and with all options; every dtype."""
        dtypes = (torch.bfloat16, torch.float32, torch.float16)
        plain = Spec(ce_weight=0.5, kd_weight=0.5, temperature=2.0)
        options: dict[str, Any] = {
            "temperature": 3.0,
            "label_smoothing": 0.1,
            "z_loss": 0.01,
            "student_softcap": 30.0,
            "teacher_softcap": 30.0,
        }
        for divergence in (Divergence.NONE, *KINDS):
            spec, kind = plain._replace(divergence=int(divergence)), divergence.name.lower()
            steps = [kd_shard_found, kd_shard_grad]
            if divergence in (Divergence.JSD, Divergence.TVD):
                steps.append(kd_shard_middle)
            # A dtype is another load and store, whatever the divergence.
            of_all = divergence == Divergence.FORWARD_KL
            for step, dtype in itertools.product(steps, dtypes if of_all else dtypes[:1]):
                name = f"{kind} {str(dtype).removeprefix('torch.')} {step.name}"
                yield TritonCall(name, partial(_launch, spec, dtype, step))
            for step in steps:
                full = partial(_launch, spec._replace(**options), torch.bfloat16, step)
                yield TritonCall(f"{kind} {step.name}, options", full)
        kl = plain._replace(divergence=int(Divergence.FORWARD_KL))
        for columns in (1, 64, 1024):
            call = partial(_launch, kl, torch.bfloat16, kd_shard_found, columns=columns)
            yield TritonCall(f"{columns} columns", call, columns >= 256)
        odd = partial(_launch, kl, torch.float16, kd_shard_grad_, columns=25129)
        yield TritonCall("in place, odd rows", odd, wide=False)


def _launch(spec: Spec, dtype: torch.dtype, step: Primitive, *, columns: int = 16000) -> None:
    """Calls a step's Triton launcher on memory that nobody will touch."""
    student, teacher = torch.empty(2, 2, columns, dtype=dtype)
    inputs = student, teacher if spec.needs_teacher else None, torch.zeros(2, dtype=torch.int64)
    merged = () if step is kd_shard_found else (torch.ones(len(Merged), 2),)
    grad = (student,) if step is kd_shard_grad_ else ()
    step("triton", *inputs, *merged, shard_spec(spec), *grad)


def _logits(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, rows, columns, dtype=torch.float64) * SPREAD
    return student, teacher, torch.randint(columns, (rows,))


def _check(
    logits: tuple[Tensor, Tensor, Tensor],
    spec: Spec,
    dtype: torch.dtype,
    device: str,
    backend: str,
) -> list[Check]:
    """The rows' losses and the gradient of their sum against the reference in float64."""
    student, teacher = (x.to(device, dtype) for x in logits[:2])
    labels, classes = logits[2].to(device), logits[0].shape[1]
    spec = spec._replace(mean=False)
    sizes = [classes // 3, 5, classes - classes // 3 - 5]

    def make(shard: Shard) -> Chunk:
        here = slice(shard.start, shard.start + shard.size)
        of_teacher = teacher[:, here] if spec.needs_teacher else None
        return Chunk(shard, student[:, here], of_teacher, labels, None, None, spec)

    def whole(precision: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = student.to(precision, copy=True).requires_grad_()
        of_teacher = teacher.to(precision) if spec.needs_teacher else None
        rows = kd_loss_reference(leaf, of_teacher, labels, None, None, spec)[2]
        return rows.detach(), torch.autograd.grad(rows.sum(), leaf)[0]

    chunks = chunks_of(sizes, backend, len(student), make)
    actual = chunks[0].results()[2], torch.cat([chunk.gradient() for chunk in chunks], 1)
    oracle, low = whole(torch.float64), whole(torch.float32)
    dtypes = torch.float32, dtype
    return [
        compare(name, x, wide, narrow.to(precision), precision)
        for name, precision, x, wide, narrow in zip(
            ("rows", "gradient"), dtypes, actual, oracle, low, strict=True
        )
    ]


CASE = KDShardCase()
