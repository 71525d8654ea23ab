"""The tensors of a call: leading dimensions, mask and shift folded away, results reduced."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._op import transforms_active
from kdkernels.api._spec import number
from kdkernels.ops import kd_loss as op
from kdkernels.ops.kd_loss import Spec

_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8)


class KDParts(NamedTuple):
    """A loss and what it is made of: ``loss = ce_weight * ce + kd_weight * kd + extra``.

    Every field is a 0-dim tensor on the device of the logits, reduced like the loss; only ``loss``
    carries a gradient. Nothing was synchronised to make them: log them when you sync anyway.
    """

    loss: Tensor
    kd: Tensor  # divergence, T^2 included where scale_t2 is on
    ce: Tensor  # hard cross-entropy
    extra: Tensor  # z_loss * mean logsumexp^2
    n_valid: Tensor  # valid rows of this call


def reduce_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    spec: Spec,
    t2: float,
    *,
    mask: Tensor | None,
    shift: int,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    row_weights: Tensor | None,
    backend: str | None,
    inplace: bool = False,
    return_parts: bool = False,
    name: str = "kd_loss",
    reduced: Callable[..., tuple[Tensor, Tensor | None]] = op.kd_loss,
    per_row: Callable[..., Tensor] = op.kd_loss_rows,
) -> Any:
    """Flattens leading dimensions, folds mask and shift into labels, reduces.

    ``reduced`` and ``per_row`` are the two forms of the op called ``name``.
    """
    leading = student.shape[:-1]
    # The op itself checks plain labels of plain rows.
    plain = len(leading) == 1 and (labels is None or labels.dtype is torch.int64)
    if not plain or mask is not None or row_weights is not None or shift:
        labels, row_weights = _fold(
            name, student, labels, mask, row_weights, spec.ignore_index, shift
        )
    if len(leading) != 1:
        _same_leading(name, student, teacher)
        student = student.reshape(-1, student.shape[-1])
        teacher = None if teacher is None else teacher.reshape(-1, teacher.shape[-1])
    if reduction == "none":
        if return_parts or num_items_in_batch is not None or inplace:
            raise ValueError(
                f"{name}: reduction must not be 'none' with return_parts, num_items_in_batch or "
                "inplace, got 'none'"
            )
        rows = per_row(student, teacher, labels, row_weights, spec, backend=backend)
        return rows.view(leading)
    denominator = None
    if num_items_in_batch is not None:
        denominator = denominator_of(name, student, num_items_in_batch)
    elif reduction == "batchmean":
        denominator = torch.full((), leading[0] if leading else 1, device=student.device).float()
    loss, parts = reduced(
        student,
        teacher,
        labels,
        row_weights,
        denominator,
        spec,
        inplace=inplace,
        want_parts=return_parts,
        backend=backend,
    )
    if not return_parts:
        return loss
    assert parts is not None
    return KDParts(loss, parts[1] * t2, parts[0], parts[2] * spec.z_loss, parts[3])


def _fold(
    name: str,
    student: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    row_weights: Tensor | None,
    ignore_index: int,
    shift: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Labels with mask and shift in them, and row weights, both flat."""
    leading = student.shape[:-1]
    for argument, x in (("labels", labels), ("mask", mask), ("row_weights", row_weights)):
        if x is not None and x.shape != leading:
            raise ValueError(
                f"{name}: {argument} must have the leading shape of student {list(leading)}, "
                f"got {list(x.shape)}"
            )
    if labels is not None and labels.dtype != torch.int64:
        if labels.dtype not in _INTEGERS:
            raise TypeError(f"{name}: labels must be integers, got {labels.dtype}")
        labels = labels.long()
    used = 0 if ignore_index != 0 else 1  # stands for a row that counts, where there are no labels
    if mask is not None:
        _checks.same_device(name, "mask", mask, student.device)
        keep = mask if mask.dtype == torch.bool else mask != 0
        labels = torch.where(keep, used if labels is None else labels, ignore_index)
    if shift:
        if shift != 1:
            raise ValueError(f"{name}: shift must be 0 or 1, got {shift!r}")
        if len(leading) < 1:
            raise ValueError(
                f"{name}: student must be [..., sequence, classes] with shift=1, got shape "
                f"{list(student.shape)}"
            )
    if shift and leading[-1] > 0:
        if labels is None:
            labels = torch.full(leading, used, device=student.device)
        labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
        if row_weights is not None:
            row_weights = torch.nn.functional.pad(row_weights[..., 1:], (0, 1))
    if labels is not None and labels.dim() != 1:
        labels = labels.reshape(-1)
    if row_weights is not None:
        row_weights = row_weights.reshape(-1)
        check_weights(name, row_weights, None if labels is None else labels != ignore_index)
    return labels, row_weights


def check_weights(name: str, row_weights: Tensor, counts: Tensor | None) -> None:
    """Weights on the CPU can be looked at without a synchronisation; those of rows that do not
    count may be anything.
    """
    if row_weights.device.type != "cpu" or torch.compiler.is_compiling() or transforms_active():
        return
    bad = ~torch.isfinite(row_weights)
    if counts is not None and counts.device == row_weights.device:
        bad = bad & counts
    if bad.any():
        raise ValueError(f"{name}: row_weights must be finite, got NaN or inf")


def _same_leading(name: str, student: Tensor, teacher: Tensor | None) -> None:
    if teacher is not None and teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"{name}: teacher must have the shape of student {list(student.shape)}, "
            f"got {list(teacher.shape)}"
        )


def denominator_of(name: str, student: Tensor, count: int | Tensor) -> Tensor:
    """``num_items_in_batch`` as the ops take it."""
    # A tensor, also for a number: a number that changes each step would recompile each step.
    if isinstance(count, Tensor):
        if count.numel() != 1:
            raise ValueError(
                f"{name}: num_items_in_batch must be one number, got shape {list(count.shape)}"
            )
        return count.detach().reshape(()).to(student.device, torch.float32)
    number(name, "num_items_in_batch", count, 0.0, math.inf)
    return torch.full((), count, device=student.device, dtype=torch.float32)
