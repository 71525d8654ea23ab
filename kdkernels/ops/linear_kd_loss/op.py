"""The contract of ``linear_kd_loss``: chunks of rows, the library's GEMMs, the rows of ``kd_loss``.

Logits exist for one chunk of rows at a time, in float32 (never rounded to the 16-bit dtype of the
hidden states), are overwritten by their gradient, and feed the two GEMMs of the backward pass at
once. Everything is computed in the forward pass: 6 NVHs + 2 NVHt operations where recomputing the
logits would take 8 + 4.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import _backend, _checks
from kdkernels._op import Primitive, refuse_create_graph
from kdkernels.ops import kd_loss as kd
from kdkernels.ops.kd_loss.spec import Spec
from kdkernels.ops.linear_kd_loss.chunks import accumulate, forward, gradients, kept
from kdkernels.ops.linear_kd_loss.reference import linear_kd_loss_reference
from kdkernels.ops.scale_grad.op import scale_grad

# Its kernels are those of this op; it has none of its own.
COMPOSED_OF = "kd_loss"

# A chunk's logits take this share of all logits: the heads are read four times, which is little
# beside the GEMMs, and the peak is an eighth of what eager code holds.
_SHARE = 1 / 4
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 512 << 20

_HEADS = (
    "Tensor student, Tensor student_weight, Tensor? student_bias, Tensor? teacher, "
    "Tensor? teacher_weight, Tensor? teacher_bias"
)
_ROWS = "Tensor? labels, Tensor? row_weights, Tensor? denominator, float[] spec, int chunk_rows"


class Heads(NamedTuple):
    """The linear maps from hidden states to logits: ``x @ weight.T + bias``."""

    student_weight: Tensor  # [columns, student width]
    student_bias: Tensor | None = None  # [columns]
    teacher_weight: Tensor | None = None  # [columns, teacher width]
    teacher_bias: Tensor | None = None


def _fake(student: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate(student.dtype)
    sizes: tuple[tuple[Any, ...], ...] = ((), (4,), (student.shape[0],))
    loss, parts, rows = (student.new_empty(size, dtype=dtype) for size in sizes)
    return loss, parts, rows


def _fake_grad(
    student: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wants_hidden, wants_weight, wants_bias = args[-1]
    dtype = kept(student.dtype)
    return (
        *_fake(student)[:2],
        student.new_empty(student.shape if wants_hidden else (0,), dtype=dtype),
        student.new_empty(weight.shape if wants_weight else (0,), dtype=kept(weight.dtype)),
        student.new_empty(weight.shape[:1] if wants_bias else (0,), dtype=kept(weight.dtype)),
    )


# Loss only, also per row.
linear_kd_loss_forward = Primitive(
    "linear_kd_loss",
    f"({_HEADS}, {_ROWS}) -> (Tensor loss, Tensor parts, Tensor rows)",
    fake=_fake,
    compiled=False,
)
# Loss and gradients; wanted: of hidden states, weight, bias. An unwanted one is empty.
linear_kd_loss_grad = Primitive(
    "linear_kd_loss_grad",
    f"({_HEADS}, {_ROWS}, bool[] wanted) "
    "-> (Tensor loss, Tensor parts, Tensor hidden, Tensor weight, Tensor bias)",
    fake=_fake_grad,
    compiled=False,
)


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
        chunk_rows: rows whose logits exist at a time; ``None``: see :func:`plan_chunk_rows`.
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
    name, tensors = _prepare(
        student, teacher, labels, row_weights, denominator, spec, heads, backend
    )
    if name == "reference":
        loss, parts, _ = linear_kd_loss_reference(*(*tensors, spec))
        return loss, parts
    chunk = _chunk_rows(student, heads, spec, chunk_rows)
    try:
        if not _wants_grad(tensors):
            loss, parts, _ = linear_kd_loss_forward(name, *tensors, spec, chunk)
            return loss, parts
        loss, parts = _LinearKDLoss.apply(*tensors[:3], tensors[3:], spec, chunk, name)
    except RuntimeError as error:
        raise _checks.as_contract("kd_loss", error) from None
    return loss, parts


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
    name, tensors = _prepare(student, teacher, labels, row_weights, None, spec, heads, backend)
    if name == "reference":
        return linear_kd_loss_reference(*(*tensors, spec))[2]
    chunk = _chunk_rows(student, heads, spec, chunk_rows)
    spec = spec._replace(mean=False)
    try:
        if _wants_grad(tensors):
            rows: Tensor = _LinearKDLossRows.apply(*tensors[:3], tensors[3:], spec, chunk, name)
        else:
            _, _, rows = linear_kd_loss_forward(name, *tensors, spec, chunk)
    except RuntimeError as error:
        raise _checks.as_contract("kd_loss", error) from None
    return rows


def plan_chunk_rows(rows: int, columns: int, models: int = 2, budget: int | None = None) -> int:
    """Rows whose float32 logits fit a budget, all chunks about equal.

    Args:
        rows: in all.
        columns: of the logits of one model.
        models: 2 with a teacher, else 1.
        budget: bytes for the logits of a chunk. Default: a quarter of all logits, but 64 to 512 MB.
    """
    a_row = 4 * columns * models
    if budget is None:
        budget = int(min(max(_SHARE * rows * a_row, _LEAST_BYTES), _MOST_BYTES))
    most = max(1, budget // max(a_row, 1))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def unsupported(
    backend: str, student: Tensor, teacher: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can."""
    # Its logits are float64 exactly where the hidden states are, and of one dtype.
    return kd.unsupported(backend, student, device=device or student.device.type)


def attach(backend: str) -> None:
    """Makes a backend of ``kd_loss`` one of this op."""
    linear_kd_loss_forward.launcher(backend)(partial(forward, backend))
    linear_kd_loss_grad.launcher(backend)(partial(gradients, backend))


# ---- autograd ------------------------------------------------------------------------------------


class _LinearKDLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        others: tuple[Tensor | None, ...],
        spec: Spec,
        chunk_rows: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        wanted = list(ctx.needs_input_grad[:3])
        loss, parts, *grads = linear_kd_loss_grad(
            backend, student, weight, bias, *others, spec, chunk_rows, wanted
        )
        ctx.save_for_backward(*(g if want else None for g, want in zip(grads, wanted, strict=True)))
        ctx.backend = backend
        ctx.dtypes = (student.dtype, weight.dtype, weight.dtype)
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 7
        refuse_create_graph("linear_kd_loss")
        grads = (
            None if grad is None else scale_grad(grad, grad_loss, backend=ctx.backend).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None


class _LinearKDLossRows(torch.autograd.Function):
    """The gradient in the backward pass, with the upstream gradient as row weights."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        others: tuple[Tensor | None, ...],
        spec: Spec,
        chunk_rows: int,
        backend: str,
    ) -> Tensor:
        _, _, rows = linear_kd_loss_forward(
            backend, student, weight, bias, *others, spec, chunk_rows
        )
        ctx.save_for_backward(student, weight, bias)
        # Not differentiated, and a teacher from torch.inference_mode() could not be saved.
        ctx.others, ctx.spec, ctx.chunk_rows, ctx.backend = others, spec, chunk_rows, backend
        return rows

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("linear_kd_loss")
        *teacher, labels, row_weights, denominator = ctx.others
        weights = grad_rows if row_weights is None else grad_rows * row_weights
        others = (*teacher, labels, weights.contiguous(), denominator)
        wanted = list(ctx.needs_input_grad[:3])
        student, weight, bias = ctx.saved_tensors
        _, _, *grads = linear_kd_loss_grad(
            ctx.backend, student, weight, bias, *others, ctx.spec, ctx.chunk_rows, wanted
        )
        dtypes = (student.dtype, weight.dtype, weight.dtype)
        found = (
            g.to(d) if want else None for g, d, want in zip(grads, dtypes, wanted, strict=True)
        )
        return *found, None, None, None, None


# ---- checks --------------------------------------------------------------------------------------


def _prepare(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    heads: Heads,
    backend: str | None,
) -> tuple[str, Any]:
    """Checks; returns the backend and the tensors in the order of the operators."""
    op = "linear_kd_loss"
    student, teacher, heads = _autocast(student, teacher, heads)
    _checks.float_matrix(op, "student", student)
    rows, device = student.shape[0], student.device
    _checks.head(op, "student_", student, heads.student_weight, heads.student_bias)
    columns = heads.student_weight.shape[0]
    classes = columns if spec.classes < 0 else spec.classes
    if classes > columns:
        raise ValueError(f"{op}: student_weight must have at least {classes} rows, got {columns}")
    if teacher is None and spec.needs_teacher:
        raise ValueError(f"{op}: teacher must be given for this divergence, got None")
    if teacher is not None:
        _check_teacher(op, student, teacher, heads, spec, classes)
    if labels is None and spec.needs_labels:
        raise ValueError(f"{op}: labels must be given for a loss on labels, got None")
    if labels is not None:
        _checks.row_vector(op, "labels", labels, rows, (torch.int64,))
        _checks.same_device(op, "labels", labels, device)
        _checks.labels_in_range(op, labels, columns, spec)
    wide = accumulate(student.dtype)
    if row_weights is not None:
        _checks.row_vector(op, "row_weights", row_weights, rows, _checks.FLOAT_DTYPES)
        _checks.same_device(op, "row_weights", row_weights, device)
        _checks.no_grad(op, "row_weights", row_weights)
        row_weights = row_weights.to(wide).contiguous()
    if denominator is not None:
        _checks.same_device(op, "denominator", denominator, device)
        denominator = denominator.to(wide)
    name = _backend.choose(op, device.type, backend, unsupported, student, teacher)
    student_weight, student_bias, teacher_weight, teacher_bias = heads
    return name, (
        student,
        student_weight,
        student_bias,
        teacher,
        teacher_weight,
        teacher_bias,
        None if labels is None else labels.contiguous(),
        row_weights,
        denominator,
    )


def _autocast(
    student: Tensor, teacher: Tensor | None, heads: Heads
) -> tuple[Tensor, Tensor | None, Heads]:
    """What ``torch.nn.functional.linear`` would do to its inputs."""
    device = student.device.type
    if not torch.is_autocast_enabled(device) or student.dtype == torch.float64:
        return student, teacher, heads
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor | None) -> Any:
        return None if x is None else x.to(dtype)

    return cast(student), cast(teacher), Heads(*(cast(x) for x in heads))


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


def _chunk_rows(student: Tensor, heads: Heads, spec: Spec, wanted: int | None) -> int:
    if wanted is not None:
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
            raise ValueError(
                f"linear_kd_loss: chunk_rows must be an integer of at least 1, got {wanted!r}"
            )
        return wanted
    columns = heads.student_weight.shape[0] if spec.classes < 0 else spec.classes
    return plan_chunk_rows(student.shape[0], columns, 2 if spec.needs_teacher else 1)


def _wants_grad(tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:3])


for _name in ("native", "triton"):
    attach(_name)
