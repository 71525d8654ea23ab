"""The contract of ``linear_kd_loss``: the library's GEMMs and the rows of ``kd_loss``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import _backend, _checks
from kdkernels.ops import kd_loss as kd
from kdkernels.ops._shared import linear_loss
from kdkernels.ops._shared.chunks import Call, dense_teacher, loss_on_logits
from kdkernels.ops.kd_loss.op import kd_loss_forward, kd_loss_grad_
from kdkernels.ops.kd_loss.spec import Spec
from kdkernels.ops.linear_kd_loss.reference import linear_kd_loss_reference

# Its kernels are those of this op; it has none of its own.
COMPOSED_OF = "kd_loss"
_OP = "linear_kd_loss"

linear_kd_loss_forward, linear_kd_loss_grad = linear_loss.declare(
    _OP, "Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? labels"
)
_reduced, _per_row = linear_loss.differentiable(_OP, linear_kd_loss_forward, linear_kd_loss_grad)


class Heads(NamedTuple):
    """The linear maps from hidden states to logits: ``x @ weight.T + bias``."""

    student_weight: Tensor  # [columns, student width]
    student_bias: Tensor | None = None  # [columns]
    teacher_weight: Tensor | None = None  # [columns, teacher width]
    teacher_bias: Tensor | None = None


def linear_kd_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    *,
    heads: Heads,
    chunk_rows: int | None = None,
    inplace: bool = False,
    want_parts: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As ``kd_loss`` of the logits ``student @ heads.student_weight.T + heads.student_bias``.

    Args:
        student: hidden states, ``[rows, student width]``; float32, bfloat16, float16 or float64.
        teacher: hidden states, ``[rows, teacher width]``; no gradient. ``None`` where ``spec``
            needs none.
        labels: as in ``kd_loss``. On the CPU, rows that are not valid are dropped before the
            GEMMs; elsewhere that would synchronise, and they only get no weight.
        row_weights: as in ``kd_loss``.
        denominator: as in ``kd_loss``.
        spec: as in ``kd_loss``.
        heads: weights ``[columns, width]`` and biases ``[columns]``, in the dtypes of the hidden
            states (under autocast everything is cast to its dtype). The student's get a gradient.
        chunk_rows: rows whose logits exist at a time; ``None``: see
            :func:`~kdkernels.ops.linear_kd_loss.plan_chunk_rows`.
        inplace: must be ``False``.
        want_parts: as in ``kd_loss``.
        backend: as in ``kd_loss``.

    Returns:
        ``loss`` and ``parts`` as ``kd_loss``.

    Numerics: logits and the sums of all gradients are float32 (float64 for float64); gradients are
    rounded to the dtypes of their tensors once.
    """
    if inplace:
        raise ValueError("linear_kd_loss: inplace must be False, got True")
    name, tensors, chunk = _prepare(
        student, teacher, labels, row_weights, denominator, spec, heads, chunk_rows, backend
    )
    if name == "reference":
        loss, parts, _ = linear_kd_loss_reference(*(*tensors, spec))
        return loss, parts
    return _reduced(name, tensors, spec, chunk)


def linear_kd_loss_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    spec: Spec,
    *,
    heads: Heads,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """As :func:`linear_kd_loss`, one value a row; the gradient is computed in the backward pass."""
    name, tensors, chunk = _prepare(
        student, teacher, labels, row_weights, None, spec, heads, chunk_rows, backend
    )
    if name == "reference":
        return linear_kd_loss_reference(*(*tensors, spec))[2]
    return _per_row(name, tensors, spec, chunk)


def unsupported(
    backend: str, student: Tensor, teacher: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can."""
    # Its logits are float64 exactly where the hidden states are, and of one dtype.
    return kd.unsupported(backend, student, device=device or student.device.type)


def _call(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    *others: Any,
) -> Call:
    def side(spec: Spec, classes: int) -> Any:
        hidden = teacher if spec.needs_teacher else None
        return dense_teacher(hidden, teacher_weight, teacher_bias, classes)

    return loss_on_logits(student, weight, bias, side, *others)


def attach(backend: str) -> None:
    """Makes a backend of ``kd_loss`` one of this op."""
    primitives = linear_kd_loss_forward, linear_kd_loss_grad
    linear_loss.attach_logits(backend, primitives, (kd_loss_forward, kd_loss_grad_), _call)


def _prepare(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    heads: Heads,
    chunk_rows: int | None,
    backend: str | None,
) -> tuple[str, Any, int]:
    """Checks; returns the backend, the tensors in the order of the operators, rows a chunk."""
    student, teacher, *cast = linear_loss.autocast(student, teacher, *heads)
    heads = Heads(*cast)
    weight, bias, teacher_weight, teacher_bias = heads
    classes = linear_loss.check_student(_OP, student, weight, bias, spec)
    if teacher is None and spec.needs_teacher:
        raise ValueError(f"{_OP}: teacher must be given for this divergence, got None")
    if teacher is not None:
        _check_teacher(_OP, student, teacher, heads, spec, classes)
    if labels is None and spec.needs_labels:
        raise ValueError(f"{_OP}: labels must be given for a loss on labels, got None")
    per_row = _checks.row_inputs(_OP, student, labels, row_weights, denominator)
    if labels is not None:
        _checks.labels_in_range(_OP, labels, classes, spec)
    chunk = linear_loss.chunk_rows_of(_OP, student.shape[0], classes, spec, chunk_rows)
    name = _backend.choose(_OP, student.device.type, backend, unsupported, student, teacher)
    tensors = (student, weight, bias, teacher, teacher_weight, teacher_bias, *per_row)
    return name, tensors, chunk


def _check_teacher(
    op: str, student: Tensor, teacher: Tensor, heads: Heads, spec: Spec, classes: int
) -> None:
    _checks.float_matrix(op, "teacher", teacher)
    _checks.same_device(op, "teacher", teacher, student.device)
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"{op}: teacher must have the rows of student, {student.shape[0]}, "
            f"got {teacher.shape[0]}"
        )
    if heads.teacher_weight is None:
        raise ValueError(f"{op}: teacher_weight must be given with a teacher, got None")
    _checks.head(op, "teacher_", teacher, heads.teacher_weight, heads.teacher_bias)
    named = {"": teacher, "_weight": heads.teacher_weight, "_bias": heads.teacher_bias}
    for suffix, x in named.items():
        if x is not None:
            _checks.no_grad(op, f"teacher{suffix}", x)
    columns, own = heads.teacher_weight.shape[0], heads.student_weight.shape[0]
    if spec.classes < 0 and columns != own:
        raise ValueError(
            f"{op}: teacher_weight must have the vocabulary of student_weight, {own}, got "
            f"{columns}; if the rest is padding, pass vocab_size={min(own, columns)} or less"
        )
    if columns < classes:
        raise ValueError(f"{op}: teacher_weight must have at least {classes} rows, got {columns}")
    if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
        raise TypeError(
            f"{op}: teacher must be float64 exactly if student is, got "
            f"{str(teacher.dtype).removeprefix('torch.')}"
        )


for _name in ("native", "triton"):
    attach(_name)
