"""Launches the Triton kernels of ``kd_shard``; imports Triton at the first launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels._triton import device_guard
from kdkernels.ops.kd_loss.spec import Spec
from kdkernels.ops.kd_loss.triton_launch import block_of, flags_of, scalars_of
from kdkernels.ops.kd_shard.op import (
    kd_shard_found,
    kd_shard_grad,
    kd_shard_grad_,
    kd_shard_middle,
)
from kdkernels.ops.kd_shard.spec import Found


def _launch(
    kernel: Any,
    student: Tensor,
    teacher: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    numbers: Sequence[float],
) -> None:
    """Runs a step's kernel over the rows."""
    rows, classes = student.shape
    if rows == 0:
        return
    spec = Spec.of(numbers)
    flags = flags_of(spec)
    if not flags.teacher:
        teacher = None
    block, warps = block_of(classes)
    with device_guard(student):
        kernel[(rows,)](
            student,
            teacher,
            *tensors,
            student.stride(0),
            0 if teacher is None else teacher.stride(0),
            *strides,
            classes,
            scalars_of(spec),
            F=flags,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=False,
        )


@kd_shard_found.launcher("triton")
def kd_shard_found_triton(
    student: Tensor, teacher: Tensor | None, places: Tensor | None, spec: Sequence[float]
) -> Tensor:
    """The first step; see ``op.py``."""
    from kdkernels.ops.kd_shard.triton_kernels import kd_shard_found_kernel

    found = student.new_empty((len(Found), student.shape[0]), dtype=torch.float32)
    _launch(kd_shard_found_kernel, student, teacher, (places, found), (), spec)
    return found


@kd_shard_middle.launcher("triton")
def kd_shard_middle_triton(
    student: Tensor,
    teacher: Tensor | None,
    places: Tensor | None,
    merged: Tensor,
    spec: Sequence[float],
) -> Tensor:
    """The second step; see ``op.py``."""
    from kdkernels.ops.kd_shard.triton_kernels import kd_shard_middle_kernel

    sums = student.new_empty((2, student.shape[0]), dtype=torch.float32)
    _launch(kd_shard_middle_kernel, student, teacher, (places, merged, sums), (), spec)
    return sums


@kd_shard_grad.launcher("triton")
def kd_shard_grad_triton(
    student: Tensor,
    teacher: Tensor | None,
    places: Tensor | None,
    merged: Tensor,
    spec: Sequence[float],
) -> Tensor:
    """The last step; see ``op.py``."""
    grad = student.new_empty(student.shape)
    kd_shard_grad_inplace_triton(student, teacher, places, merged, spec, grad)
    return grad


@kd_shard_grad_.launcher("triton")
def kd_shard_grad_inplace_triton(
    student: Tensor,
    teacher: Tensor | None,
    places: Tensor | None,
    merged: Tensor,
    spec: Sequence[float],
    grad: Tensor,
) -> None:
    """The same, into ``grad``, which may be the student."""
    from kdkernels.ops.kd_shard.triton_kernels import kd_shard_gradient_kernel

    strides = (grad.stride(0),)
    _launch(kd_shard_gradient_kernel, student, teacher, (places, merged, grad), strides, spec)
