"""The contract of ``hidden_match``: primitives, fakes, autograd, backend support, checks.

A list of layers is one call: students and teachers are ``[rows, width of the layer]``, rows are the
same tokens in all of them. Layers above (``kdkernels.api``) bring leading dimensions, reductions by
name and projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels import _backend, _checks, _native, _triton
from kdkernels._op import Primitive, direct_apply, refuse_create_graph, transforms_active
from kdkernels.ops.hidden_match.reference import hidden_match_reference
from kdkernels.ops.hidden_match.spec import Spec
from kdkernels.ops.scale_grad.op import scale_grad

OP = "hidden_match"
# mask, row_weights, denominator, weights of the layers, spec
Others = tuple[Any, ...]
_ROW_WEIGHTS, _DENOMINATOR = 1, 2
_FLOAT16 = torch.float16

_INPUTS = (
    "(Tensor[] students, Tensor[] teachers, Tensor? mask, Tensor? row_weights, "
    "Tensor? denominator, float[] weights, float[] spec)"
)


def gradient_offsets(students: Sequence[Tensor]) -> list[int]:
    """Where each layer's gradient begins in the one tensor that holds all, and where it ends."""
    offsets = [0]
    for student in students:
        offsets.append(offsets[-1] + student.shape[0] * student.shape[1])
    return offsets


def _fake(students: list[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    first = students[0]
    return (
        first.new_empty((), dtype=torch.float32),
        first.new_empty((len(students) + 1,), dtype=torch.float32),
        first.new_empty((first.shape[0],), dtype=torch.float32),
    )


def _fake_grad(students: list[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (*_fake(students)[:2], students[0].new_empty((gradient_offsets(students)[-1],)))


hidden_match_forward = Primitive(
    OP, f"{_INPUTS} -> (Tensor loss, Tensor parts, Tensor rows)", fake=_fake
)
# grad: the gradients of all layers one behind another, see gradient_offsets.
hidden_match_grad = Primitive(
    f"{OP}_grad", f"{_INPUTS} -> (Tensor loss, Tensor parts, Tensor grad)", fake=_fake_grad
)


def hidden_match(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    mask: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    weights: Sequence[float],
    spec: Spec,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The distance of two lists of hidden states, layer by layer, reduced to a scalar.

    ``loss = sum_l weights[l] sum_r row_weights[r] D(students[l][r], teachers[l][r]) / denominator``

    Args:
        students: one ``[rows, width]`` a layer, widths may differ; float32, bfloat16, float16 or
            (reference) float64, one dtype for all; any row stride, unit column stride (another
            layout is copied).
        teachers: the same shapes, one dtype for all; take no gradient.
        mask: ``[rows]`` bool; a row that is false is never read, adds nothing and gets a zero
            gradient. ``None``: every row counts.
        row_weights: ``[rows]`` float32 factors of the rows' losses.
        denominator: ``[]``; the sum is divided by it (0 counts as 1). ``None``: by the number of
            rows that count where ``spec.mean``, else by 1.
        weights: one number a layer.
        spec: see :class:`~kdkernels.ops.hidden_match.spec.Spec`.
        backend: ``native``, ``triton``, ``reference``, or ``None`` to choose.

    Returns:
        ``loss`` ``[]`` and ``parts`` ``[layers + 1]``: the loss of each layer (divided alike,
        without its weight), and the number of rows that count. float64 for float64 states, else
        float32. Only ``loss`` carries a gradient.

    Numerics: float32 inside (float64 for float64 states). Where one of two rows is all zeros (in
    that precision its squares sum up to 0), ``cosine`` and ``pkd`` and their gradients are 0.
    Without a row that counts loss and gradients are 0.
    """
    name, students, teachers, others = _prepare(
        students, teachers, mask, row_weights, denominator, weights, spec, backend
    )
    if name == "reference":
        loss, parts, _ = hidden_match_reference(students, teachers, *others)
        return loss, parts
    try:
        if not _wants_grad(students):
            loss, parts, _ = hidden_match_forward(name, students, teachers, *others)
            return loss, parts
        if students[0].dtype is _FLOAT16:
            result: tuple[Tensor, Tensor] = LateMatch.apply(teachers, others, name, *students)
            return result
        return _match(teachers, others, name, *students)
    except RuntimeError as error:
        raise _checks.as_contract(OP, error) from None


def hidden_match_rows(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    mask: Tensor | None,
    row_weights: Tensor | None,
    weights: Sequence[float],
    spec: Spec,
    *,
    backend: str | None = None,
) -> Tensor:
    """As :func:`hidden_match`, one value a row: ``[rows]``, 0 for rows that do not count.

    The gradient is computed in the backward pass with the upstream gradient as row weights, so it
    is right for any upstream gradient; the inputs are kept until then.
    """
    spec = spec._replace(mean=False)  # one value a row is never divided
    name, students, teachers, others = _prepare(
        students, teachers, mask, row_weights, None, weights, spec, backend
    )
    if name == "reference":
        return hidden_match_reference(students, teachers, *others)[2]
    try:
        if _wants_grad(students):
            rows: Tensor = PerRowMatch.apply(teachers, others, name, *students)
        else:
            _, _, rows = hidden_match_forward(name, students, teachers, *others)
        return rows
    except RuntimeError as error:
        raise _checks.as_contract(OP, error) from None


def unsupported(
    backend: str, student: Tensor, teacher: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can.

    ``device`` asks about another device type than that of the tensors.
    """
    if backend == "reference":
        return None
    device = device or student.device.type
    if transforms_active():
        return "torch.func and forward-mode differentiation need the reference"
    if torch.float64 in (student.dtype, None if teacher is None else teacher.dtype):
        return "the kernels take float32, bfloat16 and float16, not float64"
    if backend == "native":
        if device == "cuda" and teacher is not None and teacher.dtype != student.dtype:
            return "the CUDA kernel takes students and teachers of one dtype"
        return _native.reason(device)
    return _triton.reason(device) if backend == "triton" else None


# ---- autograd ------------------------------------------------------------------------------------
# Old-style forward(ctx, ...), as in _shared/row_loss.py. What is not differentiated is no argument
# of its own (each costs time) and is not saved: a teacher of torch.inference_mode() could not be.


class Match(torch.autograd.Function):
    """The gradient in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, teachers: list[Tensor], others: Others, backend: str, *students: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, parts, gradient = hidden_match_grad(backend, list(students), teachers, *others)
        ctx.save_for_backward(gradient)
        ctx.backend = backend
        ctx.shapes = [x.shape for x in students]
        ctx.offsets = gradient_offsets(students)
        return _outputs(ctx, loss, parts)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * (3 + len(ctx.shapes))
        refuse_create_graph(OP)
        (gradient,) = ctx.saved_tensors
        gradient = scale_grad(gradient, grad_loss, backend=ctx.backend)
        return None, None, None, *_split(gradient, ctx.shapes, ctx.offsets)


class LateMatch(torch.autograd.Function):
    """The gradient in the backward pass, for float16: see ``LateRowLoss`` of row_loss.py."""

    @staticmethod
    def forward(
        ctx: Any, teachers: list[Tensor], others: Others, backend: str, *students: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, parts, _ = hidden_match_forward(backend, list(students), teachers, *others)
        _save(ctx, teachers, others, backend, students)
        return _outputs(ctx, loss, parts)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * (3 + len(ctx.saved_tensors))
        rows = ctx.saved_tensors[0].shape[0]
        return None, None, None, *_late_gradients(ctx, grad_loss.expand(rows))


class PerRowMatch(torch.autograd.Function):
    """One value a row."""

    @staticmethod
    def forward(
        ctx: Any, teachers: list[Tensor], others: Others, backend: str, *students: Tensor
    ) -> Tensor:
        _, _, rows = hidden_match_forward(backend, list(students), teachers, *others)
        _save(ctx, teachers, others, backend, students)
        return rows

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_late_gradients(ctx, grad_rows)


_match = direct_apply(Match)


def _save(
    ctx: Any, teachers: list[Tensor], others: Others, backend: str, students: Sequence[Tensor]
) -> None:
    ctx.save_for_backward(*students)
    ctx.teachers, ctx.others, ctx.backend = teachers, others, backend


def _outputs(ctx: Any, loss: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    ctx.mark_non_differentiable(parts)
    ctx.set_materialize_grads(False)
    return loss, parts


def _late_gradients(ctx: Any, grad_rows: Tensor) -> list[Tensor]:
    """For upstream gradients of the rows, which enter as row weights."""
    refuse_create_graph(OP)
    students = list(ctx.saved_tensors)
    others = list(ctx.others)
    row_weights = others[_ROW_WEIGHTS]
    weights = grad_rows if row_weights is None else grad_rows * row_weights
    others[_ROW_WEIGHTS] = weights.contiguous()
    _, _, gradient = hidden_match_grad(ctx.backend, students, ctx.teachers, *others)
    return _split(gradient, [x.shape for x in students], gradient_offsets(students))


def _split(gradient: Tensor, shapes: Sequence[torch.Size], offsets: list[int]) -> list[Tensor]:
    ends = zip(offsets[:-1], offsets[1:], shapes, strict=True)
    return [gradient[begin:end].view(shape) for begin, end, shape in ends]


def _wants_grad(students: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in students)


# ---- checks --------------------------------------------------------------------------------------


def _prepare(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    mask: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    weights: Sequence[float],
    spec: Spec,
    backend: str | None,
) -> tuple[str, list[Tensor], list[Tensor], Others]:
    """Checks the tensors; returns the backend, and the tensors as every kernel reads them."""
    if not students or len(students) != len(teachers) or len(students) != len(weights):
        raise ValueError(
            f"{OP}: students, teachers and weights must have one entry a layer, got "
            f"{len(students)}, {len(teachers)} and {len(weights)}"
        )
    first, rows = students[0], students[0].shape[0] if students[0].dim() else 0
    for layer, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        _check_pair(layer, student, teacher, first, teachers[0])
    if mask is not None:
        _checks.row_vector(OP, "mask", mask, rows, (torch.bool,))
        _checks.same_device(OP, "mask", mask, first.device)
        mask = mask.contiguous()
    _, row_weights, denominator = _checks.row_inputs(OP, first, None, row_weights, denominator)
    name = _backend.choose(OP, first.device.type, backend, unsupported, first, teachers[0])
    others = (mask, row_weights, denominator, list(weights), spec)
    return name, [_rows_of(x) for x in students], [_rows_of(x) for x in teachers], others


def _rows_of(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _check_pair(
    layer: int, student: Tensor, teacher: Tensor, first: Tensor, first_teacher: Tensor
) -> None:
    names = f"students[{layer}]", f"teachers[{layer}]"
    _checks.float_matrix(OP, names[0], student, columns="width")
    _checks.float_matrix(OP, names[1], teacher, columns="width")
    _checks.no_grad(OP, names[1], teacher)
    if student.shape[0] != first.shape[0]:
        raise ValueError(
            f"{OP}: {names[0]} must have the {first.shape[0]} rows of the first layer, got "
            f"{student.shape[0]}"
        )
    if teacher.shape != student.shape:
        raise ValueError(
            f"{OP}: {names[1]} must have the shape of its student {list(student.shape)}, got "
            f"{list(teacher.shape)}"
        )
    for name, x, like in ((names[0], student, first), (names[1], teacher, first_teacher)):
        _checks.same_device(OP, name, x, first.device)
        if x.dtype != like.dtype:
            raise TypeError(
                f"{OP}: {name} must have the dtype of the first layer's {like.dtype}, got {x.dtype}"
            )
