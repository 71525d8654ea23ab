"""The contract of ``topk_kd_loss``: primitives, backend support, checks.

The row kernels are those of ``kd_loss`` with another teacher: a few classes of a row are met one by
one, all others as one lot, so a row costs what cross-entropy alone does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import _backend, _checks, _native, _triton
from kdkernels._op import transforms_active
from kdkernels.ops._shared.row_loss import Others, declare, differentiable
from kdkernels.ops.kd_loss.spec import Divergence, Spec
from kdkernels.ops.topk_kd_loss.reference import topk_kd_loss_reference

# Entries a row on a GPU: a block keeps them in shared memory, and looks for repetitions in pairs.
MOST_ENTRIES = 1024
_OP = "topk_kd_loss"
_DIVERGENCES = (Divergence.NONE.value, Divergence.FORWARD_KL.value, Divergence.REVERSE_KL.value)

topk_kd_loss_forward, topk_kd_loss_grad, topk_kd_loss_grad_ = declare(
    _OP, "Tensor topk_ids, Tensor topk_logprobs"
)
_reduced, _per_row = differentiable(
    _OP, topk_kd_loss_forward, topk_kd_loss_grad, topk_kd_loss_grad_
)


class TopKTeacher(NamedTuple):
    """What is listed of a teacher's distribution."""

    ids: Tensor  # [rows, k] int64; -1: no entry
    logprobs: Tensor  # [rows, k], at the temperature


def topk_kd_loss(
    student: Tensor,
    teacher: TopKTeacher,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    *,
    inplace: bool = False,
    want_parts: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As ``kd_loss``, from the teacher's ``k`` listed classes of each row.

    Args:
        student: as in ``kd_loss``.
        teacher: ids in ``[0, classes)``, or -1 for entries that do not count, and their
            log-probabilities *at the temperature*. Of an id that is repeated in a row the first
            entry counts. Where the probabilities of a row sum to more than 1, by rounding, they are
            divided by that sum.
        labels: as in ``kd_loss``. Rows that are not valid may hold any ids.
        row_weights: as in ``kd_loss``.
        denominator: as in ``kd_loss``.
        spec: ``divergence`` is ``FORWARD_KL``, ``REVERSE_KL`` or ``NONE``; ``tail`` says what
            stands for the mass that is not listed.
        inplace: as in ``kd_loss``.
        want_parts: as in ``kd_loss``.
        backend: as in ``kd_loss``.

    Returns:
        ``loss`` and ``parts`` as ``kd_loss``.

    Numerics: the student's mass outside of the list is summed, never taken as a difference from 1.
    An out-of-range id raises on CPU; on CUDA it makes its row's loss and gradient NaN.
    """
    name, student, others = _prepare(
        student, teacher, labels, row_weights, denominator, spec, backend
    )
    if name == "reference":
        if inplace:
            raise NotImplementedError(f"{_OP}: inplace must be False for the reference backend")
        loss, parts, _ = topk_kd_loss_reference(student, *others)
        return loss, parts
    return _reduced(name, student, others, inplace, want_parts)


def topk_kd_loss_rows(
    student: Tensor,
    teacher: TopKTeacher,
    labels: Tensor | None,
    row_weights: Tensor | None,
    spec: Spec,
    *,
    backend: str | None = None,
) -> Tensor:
    """As :func:`topk_kd_loss`, one value a row; the gradient is computed in the backward pass."""
    name, student, others = _prepare(student, teacher, labels, row_weights, None, spec, backend)
    if name == "reference":
        return topk_kd_loss_reference(student, *others)[2]
    return _per_row(name, student, others)


def unsupported(
    backend: str, student: Tensor, topk_ids: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can."""
    device = device or student.device.type
    if backend == "reference":
        return None
    if transforms_active():
        return "torch.func and forward-mode differentiation need the reference"
    if student.dtype == torch.float64:
        return "the kernels take float32, bfloat16 and float16, not float64"
    many = topk_ids is not None and topk_ids.shape[1] > MOST_ENTRIES
    if many and (device == "cuda" or backend != "native"):
        return f"the GPU kernels take at most {MOST_ENTRIES} entries a row"
    if backend == "native":
        return _native.reason(device)
    return _triton.reason(device) if backend == "triton" else None


def check_teacher(op: str, student: Tensor, teacher: TopKTeacher) -> TopKTeacher:
    """Raises for a list that breaks the contract; returns it as every kernel reads it."""
    ids, logprobs = teacher
    rows = student.shape[0]
    if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] < 1:
        raise ValueError(f"{op}: topk_ids must be [{rows}, k], got shape {list(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{op}: topk_ids must be int64 or int32, got {str(ids.dtype).removeprefix('torch.')}"
        )
    if logprobs.shape != ids.shape:
        raise ValueError(
            f"{op}: topk_logprobs must have the shape of topk_ids {list(ids.shape)}, "
            f"got {list(logprobs.shape)}"
        )
    if logprobs.dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(
            f"{op}: topk_logprobs must be floating-point, got "
            f"{str(logprobs.dtype).removeprefix('torch.')}"
        )
    _checks.no_grad(op, "topk_logprobs", logprobs)
    for name, x in (("topk_ids", ids), ("topk_logprobs", logprobs)):
        _checks.same_device(op, name, x, student.device)
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    return TopKTeacher(ids.long().contiguous(), logprobs.to(wide).contiguous())


def check_ids(op: str, ids: Tensor, labels: Tensor | None, classes: int, spec: Spec) -> None:
    """Raises for an out-of-range id where looking costs no synchronisation."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or transforms_active():
        return
    wrong = (ids < -1) | (ids >= classes)
    if labels is not None:
        wrong &= (labels != spec.ignore_index)[:, None]
    if wrong.any():
        row, entry = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{op}: topk_ids must be in [0, {classes}), or -1 for no entry, got "
            f"{int(ids[row, entry])} in row {row}"
        )


def _prepare(
    student: Tensor,
    teacher: TopKTeacher,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    backend: str | None,
) -> tuple[str, Tensor, Others]:
    """Checks the tensors; returns the backend, and the tensors as every kernel reads them."""
    _checks.float_matrix(_OP, "student", student)
    classes = student.shape[1] if spec.classes < 0 else spec.classes
    if classes > student.shape[1]:
        raise ValueError(
            f"{_OP}: student must have at least {classes} classes, got {student.shape[1]}"
        )
    check_divergence(_OP, spec)
    teacher = check_teacher(_OP, student, teacher)
    per_row = _checks.row_inputs(_OP, student, labels, row_weights, denominator)
    if labels is None and spec.needs_labels:
        raise ValueError(f"{_OP}: labels must be given for a loss on labels, got None")
    name = _backend.choose(_OP, student.device.type, backend, unsupported, student, teacher.ids)
    if name == "reference":  # the kernels look themselves
        if spec.needs_divergence:
            check_ids(_OP, teacher.ids, labels, classes, spec)
        if labels is not None:
            _checks.labels_in_range(_OP, labels, classes, spec)
    student = student if student.stride(1) == 1 else student.contiguous()
    return name, student, (*teacher, *per_row, spec)


def check_divergence(op: str, spec: Spec) -> None:
    """Raises unless a sparse teacher can serve it."""
    if spec.divergence not in _DIVERGENCES:
        raise ValueError(
            f"{op}: divergence must be forward_kl or reverse_kl, got {spec.divergence}"
        )
    if spec.needs_divergence and not 1 <= spec.tail <= 4:
        raise ValueError(f"{op}: tail must be one of 1 to 4, got {spec.tail}")
