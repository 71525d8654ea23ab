"""The contract of ``kd_loss``: primitives, fakes, backend support, autograd.

Layers above (``kdkernels.api``) bring leading dimensions, reductions by name, masks, label shift
and the conventions of papers; here everything is ``[rows, classes]`` and plain numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import _backend, _checks, _native, _triton
from kdkernels._op import Primitive, direct_apply, refuse_create_graph, transforms_active
from kdkernels.ops.kd_loss.reference import kd_loss_reference
from kdkernels.ops.kd_loss.spec import Spec
from kdkernels.ops.scale_grad.op import scale_grad

_FLOAT16 = torch.float16
# What a kernel takes after the student: teacher, labels, row_weights, denominator, spec.
Others = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Spec]
# The numbers of a Spec are one list: fifteen arguments cost 1.5 us more a call.
_INPUTS = (
    "Tensor{} student, Tensor? teacher, Tensor? labels, Tensor? row_weights, "
    "Tensor? denominator, float[] spec"
)


def _fake(student: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty((4,), dtype=dtype),
        student.new_empty((student.shape[0],), dtype=dtype),
    )


def _fake_grad(student: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (*_fake(student)[:2], student.new_empty(student.shape))


def _fake_inplace(student: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake(student)[:2]


# Loss only, also per row.
kd_loss_forward = Primitive(
    "kd_loss", f"({_INPUTS.format('')}) -> (Tensor loss, Tensor parts, Tensor rows)", fake=_fake
)
# Loss and its gradient for the student's logits, in one pass.
kd_loss_grad = Primitive(
    "kd_loss_grad",
    f"({_INPUTS.format('')}) -> (Tensor loss, Tensor parts, Tensor grad)",
    fake=_fake_grad,
)
# The same, the gradient written over the student's logits.
kd_loss_grad_ = Primitive(
    "kd_loss_grad_",
    f"({_INPUTS.format('(a!)')}) -> (Tensor loss, Tensor parts)",
    fake=_fake_inplace,
)


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
    try:
        if not student.requires_grad or not torch.is_grad_enabled():
            loss, parts, _ = kd_loss_forward(name, student, *others)
            return loss, parts
        if inplace:
            _check_inplace(student)
        elif student.dtype is _FLOAT16:
            result = _KDLossLate.apply(student, others, name, want_parts)
            return result if want_parts else (result, None)
        result = _apply(student, others, name, inplace, want_parts)
    except RuntimeError as error:
        raise _checks.as_contract("kd_loss", error) from None
    return result if want_parts else (result, None)


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
    others = (*others[:4], spec._replace(mean=False))
    try:
        if student.requires_grad and torch.is_grad_enabled():
            rows: Tensor = _KDLossRows.apply(student, others, name)
        else:
            _, _, rows = kd_loss_forward(name, student, *others)
    except RuntimeError as error:
        raise _checks.as_contract("kd_loss", error) from None
    return rows


class _KDLoss(torch.autograd.Function):
    # Old-style forward(ctx, ...): setup_context costs 9 us more a call (measured, torch 2.13).

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        # In one tuple: nothing in it is differentiated, and each argument of apply() costs time.
        others: Others,
        backend: str,
        inplace: bool,
        want_parts: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if inplace:
            loss, parts = kd_loss_grad_(backend, student, *others)
            grad = student.detach()
            if not torch.compiler.is_compiling():
                # Whoever saved the logits for its own backward must notice.
                torch.autograd.graph.increment_version(student)
        else:
            loss, parts, grad = kd_loss_grad(backend, student, *others)
        ctx.save_for_backward(grad)
        ctx.backend = backend
        return _outputs(ctx, loss, parts, want_parts)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 5
        refuse_create_graph("kd_loss")
        (grad,) = ctx.saved_tensors
        return scale_grad(grad, grad_loss, backend=ctx.backend), *(None,) * 4


_apply = direct_apply(_KDLoss)


class _KDLossLate(torch.autograd.Function):
    """The gradient in the backward pass, for float16.

    A gradient rounded to float16 before the loss scale of a GradScaler reaches it loses a quarter
    of its elements (2048 x 4096 logits, measured).
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, others: Others, backend: str, want_parts: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        loss, parts, _ = kd_loss_forward(backend, student, *others)
        _save(ctx, student, others, backend)
        return _outputs(ctx, loss, parts, want_parts)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 4
        return _late_gradient(ctx, grad_loss.expand(ctx.saved_tensors[0].shape[0])), *(None,) * 3


class _KDLossRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, others: Others, backend: str) -> Tensor:
        _, _, rows = kd_loss_forward(backend, student, *others)
        _save(ctx, student, others, backend)
        return rows

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        return _late_gradient(ctx, grad_rows), None, None


def _outputs(
    ctx: Any, loss: Tensor, parts: Tensor, want_parts: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if not want_parts:
        return loss
    ctx.mark_non_differentiable(parts)
    ctx.set_materialize_grads(False)
    return loss, parts


def _save(ctx: Any, student: Tensor, others: Others, backend: str) -> None:
    ctx.save_for_backward(student)
    # Not differentiated, and a teacher from torch.inference_mode() could not be saved.
    ctx.others, ctx.backend = others, backend


def _late_gradient(ctx: Any, grad_rows: Tensor) -> Tensor:
    """The gradient for upstream gradients of the rows, which enter as row weights."""
    refuse_create_graph("kd_loss")
    (student,) = ctx.saved_tensors
    teacher, labels, row_weights, denominator, spec = ctx.others
    weights = grad_rows if row_weights is None else grad_rows * row_weights
    *_, grad = kd_loss_grad(
        ctx.backend, student, teacher, labels, weights.contiguous(), denominator, spec
    )
    return grad


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
    usual = _usual(student, teacher, labels, row_weights, denominator, device)
    if not usual:
        _check(student, teacher, labels, row_weights, denominator, spec)
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
    if usual:
        return name, student, (teacher, labels, None, None, spec)
    return name, *_kernel_inputs(student, teacher, labels, row_weights, denominator, spec)


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


def _check(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
) -> None:
    """Raises for the first tensor that breaks the contract."""
    _checks.float_matrix("kd_loss", "student", student)
    rows, device = student.shape[0], student.device
    if teacher is not None:
        _check_teacher(student, teacher, spec)
    if labels is not None:
        _checks.row_vector("kd_loss", "labels", labels, rows, (torch.int64,))
        _checks.same_device("kd_loss", "labels", labels, device)
    if row_weights is not None:
        _checks.row_vector("kd_loss", "row_weights", row_weights, rows, _checks.FLOAT_DTYPES)
        _checks.same_device("kd_loss", "row_weights", row_weights, device)
        _checks.no_grad("kd_loss", "row_weights", row_weights)
    if denominator is not None:
        _checks.same_device("kd_loss", "denominator", denominator, device)


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


def _check_inplace(student: Tensor) -> None:
    """The gradient may overwrite these logits."""
    base = student if student._base is None else student._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            "kd_loss: student must not be a leaf tensor, nor a view of one, with inplace=True"
        )
    if student.shape[0] > 1 and student.stride(0) < student.shape[1]:
        raise ValueError(
            "kd_loss: student must not overlap itself with inplace=True, got row stride "
            f"{student.stride(0)} for {student.shape[1]} columns"
        )


def _kernel_inputs(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Others]:
    """Layouts and dtypes as every kernel reads them; what already fits is passed on as it is."""
    accumulate = torch.float64 if student.dtype == torch.float64 else torch.float32
    student = student if student.stride(1) == 1 else student.contiguous()
    if teacher is not None and teacher.stride(1) != 1:
        teacher = teacher.contiguous()
    if labels is not None:
        labels = labels.contiguous()
    if row_weights is not None:
        row_weights = row_weights.to(accumulate).contiguous()
    if denominator is not None:
        denominator = denominator.to(accumulate)
    return student, (teacher, labels, row_weights, denominator, spec)
