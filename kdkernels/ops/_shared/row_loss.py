"""A loss over rows of logits: its three primitives and their differentiable forms.

``others`` is what a primitive takes after the student's logits: the teacher's tensors, then
``labels, row_weights, denominator, spec``. Nothing in it is differentiated; it is one tuple because
each argument of ``apply()`` costs time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._op import Primitive, direct_apply, refuse_create_graph
from kdkernels.ops.scale_grad.op import scale_grad

Others = tuple[Any, ...]
# (backend, student, others, inplace, want_parts) -> loss [], parts [4] or None
Reduced = Callable[[str, Tensor, Others, bool, bool], tuple[Tensor, Tensor | None]]
# (backend, student, others) -> [rows]
PerRow = Callable[[str, Tensor, Others], Tensor]
_FLOAT16 = torch.float16
_ROW_WEIGHTS = -3  # in others


def declare(op: str, teacher: str) -> tuple[Primitive, Primitive, Primitive]:
    """The primitives of a loss: loss only, with its gradient, the gradient over the logits.

    Args:
        op: name of the first; the others are ``{op}_grad`` and ``{op}_grad_``.
        teacher: schema of the arguments that are the teacher's.
    """
    # The numbers of a Spec are one list: fifteen arguments cost 1.5 us more a call.
    inputs = f"{teacher}, Tensor? labels, Tensor? row_weights, Tensor? denominator, float[] spec"
    plain, written = f"(Tensor student, {inputs})", f"(Tensor(a!) student, {inputs})"
    return (
        Primitive(op, f"{plain} -> (Tensor loss, Tensor parts, Tensor rows)", fake=_fake),
        Primitive(
            f"{op}_grad", f"{plain} -> (Tensor loss, Tensor parts, Tensor grad)", fake=_fake_grad
        ),
        Primitive(f"{op}_grad_", f"{written} -> (Tensor loss, Tensor parts)", fake=_fake_inplace),
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


def differentiable(
    op: str, forward: Primitive, grad: Primitive, grad_: Primitive
) -> tuple[Reduced, PerRow]:
    """The scalar and the per-row form.

    Args:
        op: name for messages.
        forward: ``(student, *others) -> loss, parts, rows``.
        grad: ``(student, *others) -> loss, parts, gradient``.
        grad_: ``(student, *others) -> loss, parts``, the gradient written over the student.
    """

    class RowLoss(torch.autograd.Function):
        # Old-style forward(ctx, ...): setup_context costs 9 us more a call (measured, torch 2.13).

        @staticmethod
        def forward(
            ctx: Any, student: Tensor, others: Others, backend: str, inplace: bool, want_parts: bool
        ) -> Tensor | tuple[Tensor, Tensor]:
            if inplace:
                loss, parts = grad_(backend, student, *others)
                gradient = student.detach()
                if not torch.compiler.is_compiling():
                    # Whoever saved the logits for its own backward must notice.
                    torch.autograd.graph.increment_version(student)
            else:
                loss, parts, gradient = grad(backend, student, *others)
            ctx.save_for_backward(gradient)
            ctx.backend = backend
            return _outputs(ctx, loss, parts, want_parts)

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            if grad_loss is None:
                return (None,) * 5
            refuse_create_graph(op)
            (gradient,) = ctx.saved_tensors
            return scale_grad(gradient, grad_loss, backend=ctx.backend), None, None, None, None

    class LateRowLoss(torch.autograd.Function):
        """The gradient in the backward pass, for float16.

        A gradient rounded to float16 before the loss scale of a GradScaler reaches it loses a
        quarter of its elements (2048 x 4096 logits, measured).
        """

        @staticmethod
        def forward(
            ctx: Any, student: Tensor, others: Others, backend: str, want_parts: bool
        ) -> Tensor | tuple[Tensor, Tensor]:
            loss, parts, _ = forward(backend, student, *others)
            _save(ctx, student, others, backend)
            return _outputs(ctx, loss, parts, want_parts)

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            if grad_loss is None:
                return (None,) * 4
            rows = ctx.saved_tensors[0].shape[0]
            return late_gradient(ctx, grad_loss.expand(rows)), None, None, None

    class PerRowLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, student: Tensor, others: Others, backend: str) -> Tensor:
            _, _, rows = forward(backend, student, *others)
            _save(ctx, student, others, backend)
            return rows

        @staticmethod
        def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
            return late_gradient(ctx, grad_rows), None, None

    def late_gradient(ctx: Any, grad_rows: Tensor) -> Tensor:
        """The gradient for upstream gradients of the rows, which enter as row weights."""
        refuse_create_graph(op)
        (student,) = ctx.saved_tensors
        row_weights = ctx.others[_ROW_WEIGHTS]
        weights = grad_rows if row_weights is None else grad_rows * row_weights
        others = (*ctx.others[:_ROW_WEIGHTS], weights.contiguous(), *ctx.others[_ROW_WEIGHTS + 1 :])
        *_, gradient = grad(ctx.backend, student, *others)
        return gradient

    apply = direct_apply(RowLoss)

    def reduced(
        backend: str, student: Tensor, others: Others, inplace: bool, want_parts: bool
    ) -> tuple[Tensor, Tensor | None]:
        try:
            if not student.requires_grad or not torch.is_grad_enabled():
                loss, parts, _ = forward(backend, student, *others)
                return loss, parts
            if inplace:
                _check_inplace(op, student)
            elif student.dtype is _FLOAT16:
                result = LateRowLoss.apply(student, others, backend, want_parts)
                return result if want_parts else (result, None)
            result = apply(student, others, backend, inplace, want_parts)
        except RuntimeError as error:
            raise _checks.as_contract(op, error) from None
        return result if want_parts else (result, None)

    def per_row(backend: str, student: Tensor, others: Others) -> Tensor:
        # One value a row is never divided.
        others = (*others[:-1], others[-1]._replace(mean=False))
        try:
            if student.requires_grad and torch.is_grad_enabled():
                rows: Tensor = PerRowLoss.apply(student, others, backend)
            else:
                _, _, rows = forward(backend, student, *others)
        except RuntimeError as error:
            raise _checks.as_contract(op, error) from None
        return rows

    return reduced, per_row


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


def _check_inplace(op: str, student: Tensor) -> None:
    """The gradient may overwrite these logits."""
    base = student if student._base is None else student._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            f"{op}: student must not be a leaf tensor, nor a view of one, with inplace=True"
        )
    if student.shape[0] > 1 and student.stride(0) < student.shape[1]:
        raise ValueError(
            f"{op}: student must not overlap itself with inplace=True, got row stride "
            f"{student.stride(0)} for {student.shape[1]} columns"
        )
