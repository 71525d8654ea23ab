"""The contract of ``linear_topk_kd_loss``: the library's GEMMs and the rows of ``topk_kd_loss``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdkernels import _backend, _checks
from kdkernels.ops import topk_kd_loss as topk
from kdkernels.ops._shared import linear_loss
from kdkernels.ops._shared.chunks import Call, listed_teacher, loss_on_logits
from kdkernels.ops.kd_loss.spec import Spec
from kdkernels.ops.linear_topk_kd_loss.reference import linear_topk_kd_loss_reference
from kdkernels.ops.topk_kd_loss.op import (
    TopKTeacher,
    check_divergence,
    check_ids,
    check_teacher,
    topk_kd_loss_forward,
    topk_kd_loss_grad_,
)

# Its kernels are those of this op; it has none of its own.
COMPOSED_OF = "topk_kd_loss"
_OP = "linear_topk_kd_loss"

linear_topk_kd_loss_forward, linear_topk_kd_loss_grad = linear_loss.declare(
    _OP, "Tensor topk_ids, Tensor topk_logprobs, Tensor? labels"
)
_reduced, _per_row = linear_loss.differentiable(
    _OP, linear_topk_kd_loss_forward, linear_topk_kd_loss_grad
)

Head = tuple[Tensor, Tensor | None]  # weight [columns, width], bias [columns]


def linear_topk_kd_loss(
    student: Tensor,
    teacher: TopKTeacher,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    *,
    head: Head,
    chunk_rows: int | None = None,
    inplace: bool = False,
    want_parts: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As ``topk_kd_loss`` of the logits ``student @ weight.T + bias``.

    Args:
        student: hidden states, ``[rows, width]``; see ``linear_kd_loss``.
        teacher: as in ``topk_kd_loss``.
        labels: as in ``linear_kd_loss``.
        row_weights: as in ``kd_loss``.
        denominator: as in ``kd_loss``.
        spec: as in ``topk_kd_loss``.
        head: weight ``[columns, width]`` and bias ``[columns]`` of the student, which get a
            gradient.
        chunk_rows: rows whose logits exist at a time; ``None``: planned, as in
            ``linear_kd_loss``.
        inplace: must be ``False``.
        want_parts: as in ``kd_loss``.
        backend: as in ``kd_loss``.

    Returns:
        ``loss`` and ``parts`` as ``kd_loss``.
    """
    if inplace:
        raise ValueError(f"{_OP}: inplace must be False, got True")
    name, tensors, chunk = _prepare(
        student, teacher, labels, row_weights, denominator, spec, head, chunk_rows, backend
    )
    if name == "reference":
        loss, parts, _ = linear_topk_kd_loss_reference(*(*tensors, spec))
        return loss, parts
    return _reduced(name, tensors, spec, chunk)


def linear_topk_kd_loss_rows(
    student: Tensor,
    teacher: TopKTeacher,
    labels: Tensor | None,
    row_weights: Tensor | None,
    spec: Spec,
    *,
    head: Head,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """As :func:`linear_topk_kd_loss`, one value a row; the gradient is computed in the backward
    pass.
    """
    name, tensors, chunk = _prepare(
        student, teacher, labels, row_weights, None, spec, head, chunk_rows, backend
    )
    if name == "reference":
        return linear_topk_kd_loss_reference(*(*tensors, spec))[2]
    return _per_row(name, tensors, spec, chunk)


def unsupported(
    backend: str, student: Tensor, topk_ids: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can."""
    return topk.unsupported(backend, student, topk_ids, device=device or student.device.type)


def _call(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *others: Any,
) -> Call:
    def side(spec: Spec, classes: int) -> Any:
        return listed_teacher(topk_ids, topk_logprobs)

    return loss_on_logits(student, weight, bias, side, *others)


def attach(backend: str) -> None:
    """Makes a backend of ``topk_kd_loss`` one of this op."""
    primitives = linear_topk_kd_loss_forward, linear_topk_kd_loss_grad
    linear_loss.attach_logits(
        backend, primitives, (topk_kd_loss_forward, topk_kd_loss_grad_), _call
    )


def _prepare(
    student: Tensor,
    teacher: TopKTeacher,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    head: Head,
    chunk_rows: int | None,
    backend: str | None,
) -> tuple[str, Any, int]:
    """Checks; returns the backend, the tensors in the order of the operators, rows a chunk."""
    student, weight, bias = linear_loss.autocast(student, *head)
    classes = linear_loss.check_student(_OP, student, weight, bias, spec)
    check_divergence(_OP, spec)
    teacher = check_teacher(_OP, student, teacher)
    per_row = _checks.row_inputs(_OP, student, labels, row_weights, denominator)
    if labels is None and spec.needs_labels:
        raise ValueError(f"{_OP}: labels must be given for a loss on labels, got None")
    if labels is not None:
        _checks.labels_in_range(_OP, labels, classes, spec)
    if spec.needs_divergence:
        check_ids(_OP, teacher.ids, labels, classes, spec)
    chunk = linear_loss.chunk_rows_of(_OP, student.shape[0], classes, spec, chunk_rows)
    name = _backend.choose(_OP, student.device.type, backend, unsupported, student, teacher.ids)
    return name, (student, weight, bias, *teacher, *per_row), chunk


for _name in ("native", "triton"):
    attach(_name)
