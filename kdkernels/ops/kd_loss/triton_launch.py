"""Launches the Triton kernels of ``kd_loss``.

Triton takes 0.36 s to import (measured, 3.7), so the kernels are imported by the first launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels._triton import device_guard
from kdkernels.ops.kd_loss.op import kd_loss_forward, kd_loss_grad, kd_loss_grad_
from kdkernels.ops.kd_loss.spec import LISTED, LISTED_ENTROPY, Divergence, Spec, Tail


class Flags(NamedTuple):
    """What a kernel is compiled for."""

    divergence: int
    teacher: bool  # a teacher row is read
    temperatures: int  # 1: one softmax serves all, 2: the other one is its square, 3: two
    needs_ce: bool
    needs_z: bool
    needs_labels: bool
    hard: bool  # the gradient has a part at temperature 1
    smoothing: bool
    uniform: bool  # sums over all live classes are needed
    student_cap: bool
    teacher_cap: bool
    listed: bool  # the teacher is a list
    reverse: bool  # which KL from a list
    tail: int


class List(NamedTuple):
    """A sparse teacher's list, as the row kernel reads it."""

    words: Tensor  # [rows, words] int32: a bit for each listed class
    ids: Tensor  # [rows, entries] int32: -1 for none, -2 for one out of range
    logprobs: Tensor  # [rows, entries] float32


class Scalars(NamedTuple):
    """What a kernel gets at run time."""

    beta: float
    inv_t: float
    ce_weight: float
    kd_weight: float
    label_smoothing: float
    z_loss: float
    student_scale: float
    teacher_scale: float
    student_softcap: float
    teacher_softcap: float


def flags_of(spec: Spec) -> Flags:
    """The compile-time part of a call."""
    divergence = Divergence(spec.divergence)
    at_one = spec.needs_ce or spec.needs_z
    temperatures = 1
    if at_one and spec.needs_divergence and spec.temperature != 1.0:
        temperatures = 2 if spec.temperature == 2.0 else 3
    smoothing = spec.needs_ce and spec.label_smoothing != 0.0
    spike = divergence == Divergence.SPIKE
    reverse = divergence == Divergence.REVERSE_KL
    listed = spec.tail != Tail.FULL.value and spec.needs_divergence
    spread = listed and spec.tail == Tail.UNIFORM.value
    kind = LISTED_ENTROPY if reverse and spread else LISTED
    return Flags(
        divergence=kind if listed else int(divergence),
        teacher=spec.needs_teacher,
        temperatures=temperatures,
        needs_ce=spec.needs_ce,
        needs_z=spec.needs_z,
        needs_labels=spec.needs_ce or spike,
        hard=spec.ce_weight != 0.0 or spec.needs_z,
        smoothing=smoothing,
        uniform=smoothing or spike or spread,
        student_cap=spec.student_softcap != 0.0,
        teacher_cap=spec.teacher_softcap != 0.0,
        listed=listed,
        reverse=listed and reverse,
        tail=spec.tail if listed else 0,
    )


def scalars_of(spec: Spec) -> Scalars:
    """The run-time part of a call."""
    return Scalars(
        beta=float(spec.beta),
        inv_t=1.0 / spec.temperature if spec.needs_divergence else 1.0,
        ce_weight=float(spec.ce_weight),
        kd_weight=float(spec.kd_weight),
        label_smoothing=float(spec.label_smoothing),
        z_loss=float(spec.z_loss),
        student_scale=float(spec.student_scale),
        teacher_scale=float(spec.teacher_scale),
        student_softcap=float(spec.student_softcap),
        teacher_softcap=float(spec.teacher_softcap),
    )


def block_of(columns: int) -> tuple[int, int]:
    """Columns a block and warps a program: 8 columns a thread, which is 16 bytes of bf16."""
    block = min(max(16, 1 << (columns - 1).bit_length()), 2048)
    return block, max(1, block // 256)


def list_block(entries: int) -> int:
    """Entries of a list a program works on: all, and a power of two."""
    return max(16, 1 << (entries - 1).bit_length())


# Rows a step of the two one-program kernels that go over all rows.
_ROW_BLOCK = 1024


def launch(
    student: Tensor,
    teacher: Tensor | List | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills ``grad`` where there is one; returns loss, parts and row losses."""
    from kdkernels.ops.kd_loss import triton_kernels as kernels

    rows, columns = student.shape
    classes = columns if spec.classes < 0 else spec.classes
    flags = flags_of(spec)
    words = ids = logprobs = None
    if flags.listed:
        assert isinstance(teacher, List)
        words, ids, logprobs = teacher
    if not flags.teacher or isinstance(teacher, List):
        teacher = None
    block, warps = block_of(columns)
    loss = student.new_empty((), dtype=torch.float32)
    parts = student.new_empty(4, dtype=torch.float32)
    losses = student.new_empty(rows, dtype=torch.float32)
    sums = student.new_empty(2, dtype=torch.float32)
    terms = student.new_empty((3, rows), dtype=torch.float32)
    with device_guard(student):
        kernels.kd_loss_scale_kernel[(1,)](
            labels,
            denominator,
            sums,
            rows,
            spec.ignore_index,
            MEAN=spec.mean,
            BLOCK=_ROW_BLOCK,
            num_warps=4,
        )
        if rows > 0:
            kernels.kd_loss_kernel[(rows,)](
                student,
                teacher,
                labels,
                row_weights,
                sums,
                losses,
                terms,
                grad,
                words,
                ids,
                logprobs,
                0 if words is None else words.shape[1],
                0 if ids is None else ids.shape[1],
                student.stride(0),
                0 if teacher is None else teacher.stride(0),
                0 if grad is None else grad.stride(0),
                columns,
                classes,
                spec.ignore_index,
                scalars_of(spec),
                F=flags,
                BLOCK=block,
                LIST=1 if ids is None else list_block(ids.shape[1]),
                num_warps=warps,
                enable_fp_fusion=False,
            )
        kernels.kd_loss_sum_kernel[(1,)](
            losses, terms, sums, loss, parts, rows, BLOCK=_ROW_BLOCK, num_warps=4
        )
    return loss, parts, losses


@kd_loss_forward.launcher("triton")
def kd_loss_forward_triton(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, parts and row losses; see ``op.py``."""
    return launch(student, teacher, labels, row_weights, denominator, Spec.of(spec), None)


@kd_loss_grad.launcher("triton")
def kd_loss_grad_triton(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same and the gradient for the student's logits, in one pass over the rows."""
    grad = student.new_empty(student.shape)
    args = (student, teacher, labels, row_weights, denominator, Spec.of(spec), grad)
    return (*launch(*args)[:2], grad)


@kd_loss_grad_.launcher("triton")
def kd_loss_grad_inplace_triton(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The same, the gradient written over the student's logits."""
    args = (student, teacher, labels, row_weights, denominator, Spec.of(spec), student)
    return launch(*args)[:2]
