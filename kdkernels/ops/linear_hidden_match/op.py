"""The contract of ``linear_hidden_match``: the library's GEMMs and the rows of ``hidden_match``.

Projected states exist for a chunk of rows at a time, in float32; subtraction, square and gradient
run on the chunk while it is in the cache, and feed the GEMMs of the backward pass at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import _backend, _checks
from kdkernels.ops import hidden_match as match
from kdkernels.ops._shared import linear_loss
from kdkernels.ops._shared.chunks import Call, Head, listed_teacher
from kdkernels.ops.hidden_match.op import hidden_match_forward, hidden_match_grad
from kdkernels.ops.hidden_match.spec import Spec
from kdkernels.ops.linear_hidden_match.reference import linear_hidden_match_reference

# Its kernels are those of this op; it has none of its own.
COMPOSED_OF = "hidden_match"
_OP = "linear_hidden_match"
_ONE = [1.0]  # layer, of weight 1

# Bytes of a chunk's projected states.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}

linear_hidden_match_forward, linear_hidden_match_grad = linear_loss.declare(
    _OP, "Tensor teacher, Tensor? mask", parts=2
)
_reduced, _per_row = linear_loss.differentiable(
    _OP, linear_hidden_match_forward, linear_hidden_match_grad
)

Projection = tuple[Tensor, Tensor | None]  # weight [teacher's width, width], bias


def linear_hidden_match(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    *,
    head: Projection,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``hidden_match`` of one layer, the student being ``student @ weight.T + bias``.

    Args:
        student: hidden states, ``[rows, width]``; float32, bfloat16, float16 or (reference)
            float64. Under autocast cast to its dtype, with the projection, as
            ``torch.nn.functional.linear`` does.
        teacher: ``[rows, teacher's width]``, any of these dtypes; takes no gradient.
        mask: as in ``hidden_match``.
        row_weights: as in ``hidden_match``.
        denominator: as in ``hidden_match``.
        spec: as in ``hidden_match``.
        head: weight ``[teacher's width, width]`` and bias, in the dtype of the student; they get a
            gradient.
        chunk_rows: rows whose projected states exist at a time; ``None``: planned.
        backend: as in ``hidden_match``.

    Returns:
        ``loss`` ``[]`` and ``parts`` ``[2]`` as ``hidden_match``.
    """
    name, tensors, chunk = _prepare(
        student, teacher, mask, row_weights, denominator, spec, head, chunk_rows, backend
    )
    if name == "reference":
        loss, parts, _ = linear_hidden_match_reference(*(*tensors, spec))
        return loss, parts
    return _reduced(name, tensors, spec, chunk)


def linear_hidden_match_rows(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    row_weights: Tensor | None,
    spec: Spec,
    *,
    head: Projection,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """As :func:`linear_hidden_match`, one value a row; the gradient is computed in the backward
    pass.
    """
    name, tensors, chunk = _prepare(
        student, teacher, mask, row_weights, None, spec, head, chunk_rows, backend
    )
    if name == "reference":
        spec = spec._replace(mean=False)
        return linear_hidden_match_reference(*(*tensors, spec))[2]
    return _per_row(name, tensors, spec, chunk)


def unsupported(
    backend: str, student: Tensor, teacher: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can.

    ``device`` asks about another device type than that of the tensors.
    """
    # Projected states are float32, and so is what they are compared with.
    device = device or student.device.type
    return match.unsupported(backend, student, device=device)


def _call(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    mask: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    numbers: Any,
    chunk_rows: int,
) -> Call:
    head, of_teacher = Head(weight, bias, weight.shape[0]), listed_teacher(teacher)
    per_row, spec = (mask, row_weights), Spec.of(numbers)
    return Call(student, head, of_teacher, mask, per_row, denominator, spec, chunk_rows, parts=2)


def attach(backend: str) -> None:
    """Makes a backend of ``hidden_match`` one of this op."""

    def arguments(projected: Tensor, teacher: Tensor, *others: Any) -> tuple[Any, ...]:
        if backend != "triton" and not (backend == "native" and teacher.device.type == "cpu"):
            teacher = teacher.to(projected.dtype)  # the CUDA kernel takes one dtype
        return [projected], [teacher], *others[:-1], _ONE, others[-1]

    def on_rows(projected: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor]
        result = hidden_match_forward(backend, *arguments(projected, *others))
        return result

    def on_rows_grad(projected: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, parts, grad = hidden_match_grad(backend, *arguments(projected, *others))
        return loss, parts, grad.view(projected.shape)

    primitives = linear_hidden_match_forward, linear_hidden_match_grad
    linear_loss.attach(backend, primitives, on_rows, on_rows_grad, _call)


def _prepare(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    head: Projection,
    chunk_rows: int | None,
    backend: str | None,
) -> tuple[str, Any, int]:
    """Checks; returns the backend, the tensors in the order of the operators, rows a chunk."""
    student, weight, bias = linear_loss.autocast(student, *head)
    _checks.float_matrix(_OP, "student", student, columns="width")
    _checks.head(_OP, "projection_", student, weight, bias)
    _checks.float_matrix(_OP, "teacher", teacher, columns="width")
    _checks.same_device(_OP, "teacher", teacher, student.device)
    _checks.no_grad(_OP, "teacher", teacher)
    wanted = [student.shape[0], weight.shape[0]]
    if list(teacher.shape) != wanted:
        raise ValueError(f"{_OP}: teacher must be {wanted}, got {list(teacher.shape)}")
    if mask is not None:
        _checks.row_vector(_OP, "mask", mask, student.shape[0], (torch.bool,))
        _checks.same_device(_OP, "mask", mask, student.device)
    _, row_weights, denominator = _checks.row_inputs(_OP, student, None, row_weights, denominator)
    name = _backend.choose(_OP, student.device.type, backend, unsupported, student, teacher)
    if chunk_rows is None:
        budget = _CHUNK_BYTES.get(student.device.type, _CHUNK_BYTES["cuda"])
        rows, columns = student.shape[0], weight.shape[0]
        chunk_rows = linear_loss.plan_chunk_rows(rows, columns, models=1, budget=budget)
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    return name, (student, weight, bias, teacher, mask, row_weights, denominator), chunk_rows


for _name in ("native", "triton"):
    attach(_name)
