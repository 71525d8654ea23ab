"""The contract of ``kd_loss``: primitives, fakes, backend support, checks.

Layers above (``kdkernels.api``) bring leading dimensions, reductions by name, masks, label shift
and the conventions of papers; here everything is ``[rows, classes]`` and plain numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import _backend, _checks, _native, _triton
from kdkernels._op import transforms_active
from kdkernels.ops._shared.row_loss import Others, declare, differentiable
from kdkernels.ops.kd_loss.reference import kd_loss_reference
from kdkernels.ops.kd_loss.spec import Spec

kd_loss_forward, kd_loss_grad, kd_loss_grad_ = declare("kd_loss", "Tensor? teacher")
_reduced, _per_row = differentiable("kd_loss", kd_loss_forward, kd_loss_grad, kd_loss_grad_)


def kd_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    *,
    inplace: bool = False,
    want_parts: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Hard cross-entropy and a teacher-student divergence over rows, reduced to a scalar.

    Args:
        student: logits, ``[rows, columns]``; float32, bfloat16, float16 or float64; any row
            stride, unit column stride (another layout is copied).
        teacher: logits, ``[rows, columns]``, any of these dtypes; ``None`` where ``spec``
            needs none.
        labels: ``[rows]`` int64. A row whose label is ``spec.ignore_index`` is not valid: it is
            never read, adds nothing and gets a zero gradient. ``None``: every row is valid.
        row_weights: ``[rows]`` float32 factors of the rows' losses.
        denominator: ``[]``; the sum is divided by it (0 counts as 1). ``None``: by the number of
            valid rows where ``spec.mean``, else by 1.
        spec: see :class:`~kdkernels.ops.kd_loss.spec.Spec`.
        inplace: overwrite ``student`` with the gradient instead of allocating it.
        want_parts: ``False`` gives ``None`` for ``parts``, which saves a microsecond of autograd.
        backend: ``native``, ``triton``, ``reference``, or ``None`` to choose.

    Returns:
        ``loss`` ``[]`` and ``parts`` ``[4]``: CE, D and the squared log-partition (each weighted
        by ``row_weights`` and divided like the loss, without its own weight), and the number of
        valid rows. float64 for float64 logits, else float32. Only ``loss`` carries a gradient.

    Numerics: float32 inside (float64 for float64 logits). Without a valid row loss and gradient
    are 0. An out-of-range label raises on CPU; on CUDA, where that would need a synchronisation,
    it makes its row's loss and gradient NaN.
    """
    name, student, others = _prepare(
        student, teacher, labels, row_weights, denominator, spec, backend
    )
    if name == "reference":
        if inplace:
            raise NotImplementedError("kd_loss: inplace must be False for the reference backend")
        loss, parts, _ = kd_loss_reference(student, *others)
        return loss, parts
    return _reduced(name, student, others, inplace, want_parts)


def kd_loss_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    spec: Spec,
    *,
    backend: str | None = None,
) -> Tensor:
    """As :func:`kd_loss`, one value a row: ``[rows]``, 0 for rows that are not valid.

    The gradient is recomputed in the backward pass with the upstream gradient as row weights, so
    it is right for any upstream gradient; the inputs are kept until then.
    """
    name, student, others = _prepare(student, teacher, labels, row_weights, None, spec, backend)
    if name == "reference":
        return kd_loss_reference(student, *others)[2]
    return _per_row(name, student, others)


def unsupported(
    backend: str, student: Tensor, teacher: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can.

    ``device`` asks about another device type than that of the tensors.
    """
    device = device or student.device.type
    if backend == "reference":
        return None
    if transforms_active():
        return "torch.func and forward-mode differentiation need the reference"
    if backend == "native":
        if teacher is not None and student.dtype != teacher.dtype == torch.float64:
            return "the kernels take a float64 teacher only with a float64 student"
        if device == "cuda":
            if student.dtype == torch.float64:
                return "the CUDA kernel takes float32, bfloat16 and float16, not float64"
            if teacher is not None and teacher.dtype != student.dtype:
                return "the CUDA kernel takes student and teacher of one dtype"
        return _native.reason(device)
    if backend == "triton":
        if torch.float64 in (student.dtype, None if teacher is None else teacher.dtype):
            return "the Triton kernel takes float32, bfloat16 and float16, not float64"
        return _triton.reason(device)
    return None


def _prepare(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    backend: str | None,
) -> tuple[str, Tensor, Others]:
    """Checks the tensors; returns the backend, and the tensors as every kernel reads them."""
    device = student.device
    others: Others = (teacher, labels, None, None, spec)
    if not _usual(student, teacher, labels, row_weights, denominator, device):
        _checks.float_matrix("kd_loss", "student", student)
        if teacher is not None:
            _check_teacher(student, teacher, spec)
            teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
        per_row = _checks.row_inputs("kd_loss", student, labels, row_weights, denominator)
        student = student if student.stride(1) == 1 else student.contiguous()
        others = (teacher, *per_row, spec)
    if teacher is None and spec.needs_teacher:
        raise ValueError("kd_loss: teacher must be given for this divergence, got None")
    if labels is None and spec.needs_labels:
        raise ValueError("kd_loss: labels must be given for a loss on labels, got None")
    if spec.classes > student.shape[1]:
        raise ValueError(
            f"kd_loss: student must have at least {spec.classes} classes, got {student.shape[1]}"
        )
    name = _backend.choose("kd_loss", device.type, backend, unsupported, student, teacher)
    if name == "reference" and labels is not None:
        _checks.labels_in_range("kd_loss", labels, student.shape[1], spec)
    return name, student, others


def _usual(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    device: torch.device,
) -> bool:
    """Whether nothing can be wrong and nothing has to be laid out anew.

    A shortcut only: looking closely costs 1.5 us more in every call.
    """
    shape = student.shape
    return (
        len(shape) == 2
        and shape[1] > 0
        and student.dtype in _checks.FLOAT_DTYPES
        and teacher is not None
        and teacher.shape == shape
        and teacher.dtype is student.dtype
        and teacher.device == device
        and not teacher.requires_grad
        and labels is not None
        and labels.shape == shape[:1]
        and labels.dtype is torch.int64
        and labels.device == device
        and row_weights is None
        and denominator is None
        and student.is_contiguous()
        and teacher.is_contiguous()
        and labels.is_contiguous()
    )


def _check_teacher(student: Tensor, teacher: Tensor, spec: Spec) -> None:
    _checks.float_matrix("kd_loss", "teacher", teacher)
    _checks.same_device("kd_loss", "teacher", teacher, student.device)
    _checks.no_grad("kd_loss", "teacher", teacher)
    if teacher.shape == student.shape:
        return
    if spec.classes < 0 or teacher.shape[0] != student.shape[0]:
        smaller = min(student.shape[1], teacher.shape[1])
        padded = student.shape[1] != teacher.shape[1]
        raise ValueError(
            f"kd_loss: teacher must have the shape of student {list(student.shape)}, "
            f"got {list(teacher.shape)}"
            + (f"; if the rest is padding, pass vocab_size={smaller} or less" if padded else "")
        )
    if teacher.shape[1] < spec.classes:
        raise ValueError(
            f"kd_loss: teacher must have at least {spec.classes} classes, got {teacher.shape[1]}"
        )
