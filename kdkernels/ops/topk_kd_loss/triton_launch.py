"""Launches the Triton kernels of ``topk_kd_loss``: those of ``kd_loss``, a list for a teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels._triton import device_guard
from kdkernels.ops.kd_loss.spec import Spec
from kdkernels.ops.kd_loss.triton_launch import List, launch, list_block
from kdkernels.ops.topk_kd_loss.op import (
    topk_kd_loss_forward,
    topk_kd_loss_grad,
    topk_kd_loss_grad_,
)


def _list(student: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, spec: Spec) -> List:
    from kdkernels.ops.topk_kd_loss.triton_kernels import topk_kd_loss_list_kernel

    rows, entries = topk_ids.shape
    classes = student.shape[1] if spec.classes < 0 else spec.classes
    ids = torch.empty_like(topk_ids, dtype=torch.int32)
    words = student.new_zeros((rows, -(-classes // 32)), dtype=torch.int32)
    if rows > 0 and spec.needs_divergence:
        block = list_block(entries)
        with device_guard(student):
            topk_kd_loss_list_kernel[(rows,)](
                topk_ids,
                ids,
                words,
                entries,
                words.shape[1],
                classes,
                LIST=block,
                num_warps=max(1, block // 128),
            )
    return List(words, ids, topk_logprobs)


def _launch(
    student: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    numbers: Sequence[float],
    grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = Spec.of(numbers)
    teacher = _list(student, topk_ids, topk_logprobs, spec)
    return launch(student, teacher, labels, row_weights, denominator, spec, grad)


@topk_kd_loss_forward.launcher("triton")
def topk_kd_loss_forward_triton(
    student: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, parts and row losses; see ``op.py``."""
    return _launch(student, topk_ids, topk_logprobs, labels, row_weights, denominator, spec, None)


@topk_kd_loss_grad.launcher("triton")
def topk_kd_loss_grad_triton(
    student: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same and the gradient for the student's logits, in one pass over the rows."""
    grad = student.new_empty(student.shape)
    args = (student, topk_ids, topk_logprobs, labels, row_weights, denominator, spec, grad)
    return (*_launch(*args)[:2], grad)


@topk_kd_loss_grad_.launcher("triton")
def topk_kd_loss_grad_inplace_triton(
    student: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The same, the gradient written over the student's logits."""
    args = (student, topk_ids, topk_logprobs, labels, row_weights, denominator, spec, student)
    return _launch(*args)[:2]
