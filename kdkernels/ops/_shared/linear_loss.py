"""A loss from hidden states and heads: its primitives, their differentiable forms, its checks.

Everything is computed in the forward pass: 6 NVHs + 2 NVHt operations where recomputing the logits
would take 8 + 4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._op import Primitive, refuse_create_graph
from kdkernels.ops._shared.chunks import Call, accumulate, forward, gradients, kept
from kdkernels.ops.kd_loss.spec import Spec
from kdkernels.ops.scale_grad.op import scale_grad

# A chunk's logits take this share of all logits: the heads are read four times, which is little
# beside the GEMMs, and the peak is an eighth of what eager code holds.
_SHARE = 1 / 4
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 512 << 20

# Student's hidden states, weight and bias; the teacher's tensors; labels, row_weights, denominator.
Tensors = tuple[Any, ...]
_ROW_WEIGHTS = -2  # in Tensors


def declare(op: str, inputs: str, parts: int = 4) -> tuple[Primitive, Primitive]:
    """The primitives of a loss: loss only, and with the wanted gradients.

    Args:
        op: name of the first; the other is ``{op}_grad``.
        inputs: schema of what comes after the student's tensors: the teacher's, and labels or mask.
        parts: size of the loss's parts.
    """
    inputs = (
        f"Tensor student, Tensor student_weight, Tensor? student_bias, {inputs}, "
        "Tensor? row_weights, Tensor? denominator, float[] spec, int chunk_rows"
    )
    results = "Tensor loss, Tensor parts"
    fake = partial(_fake, parts)
    return (
        # Loss only, also per row.
        Primitive(op, f"({inputs}) -> ({results}, Tensor rows)", fake=fake, compiled=False),
        # wanted: of hidden states, weight, bias. An unwanted gradient is empty.
        Primitive(
            f"{op}_grad",
            f"({inputs}, bool[] wanted) -> ({results}, Tensor hidden, Tensor weight, Tensor bias)",
            fake=partial(_fake_grad, parts),
            compiled=False,
        ),
    )


def attach(
    backend: str,
    primitives: tuple[Primitive, Primitive],
    on_rows: Callable[..., Any],
    on_rows_grad: Callable[..., Any],
    call: Callable[..., Call],
) -> None:
    """Makes a backend of the loss on rows one of the linear loss.

    Args:
        backend: its name.
        primitives: of the linear loss.
        on_rows: ``(logits, *others) -> loss, parts, rows``.
        on_rows_grad: ``(logits, *others) -> loss, parts, gradient``; may overwrite the logits.
        call: resolves the arguments of the first primitive.
    """

    def forward_only(*args: Any) -> Any:
        return forward(call(*args), on_rows)

    def with_gradients(*args: Any) -> Any:
        return gradients(call(*args[:-1]), on_rows_grad, args[-1])

    primitives[0].launcher(backend)(forward_only)
    primitives[1].launcher(backend)(with_gradients)


def attach_logits(
    backend: str,
    primitives: tuple[Primitive, Primitive],
    rows: tuple[Primitive, Primitive],
    call: Callable[..., Call],
) -> None:
    """:func:`attach` by the primitives of a loss on logits, ``(forward, grad_)``."""

    def overwrites(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        return (*rows[1](backend, logits, *others), logits)

    attach(backend, primitives, partial(rows[0], backend), overwrites, call)


def _fake(parts: int, student: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate(student.dtype)
    sizes: tuple[tuple[Any, ...], ...] = ((), (parts,), (student.shape[0],))
    loss, of_parts, rows = (student.new_empty(size, dtype=dtype) for size in sizes)
    return loss, of_parts, rows


def _fake_grad(
    parts: int, student: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wants_hidden, wants_weight, wants_bias = args[-1]
    dtype = kept(student.dtype)
    return (
        *_fake(parts, student)[:2],
        student.new_empty(student.shape if wants_hidden else (0,), dtype=dtype),
        student.new_empty(weight.shape if wants_weight else (0,), dtype=kept(weight.dtype)),
        student.new_empty(weight.shape[:1] if wants_bias else (0,), dtype=kept(weight.dtype)),
    )


# ---- autograd ------------------------------------------------------------------------------------

# (backend, tensors, spec of the loss on rows, chunk_rows) -> loss [], parts
Reduced = Callable[[str, Tensors, Any, int], tuple[Tensor, Tensor]]
PerRow = Callable[[str, Tensors, Any, int], Tensor]  # -> [rows]


def differentiable(op: str, forward: Primitive, grad: Primitive) -> tuple[Reduced, PerRow]:
    """The scalar and the per-row form of a linear loss, from its primitives."""

    class LinearLoss(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            student: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            others: Tensors,
            spec: Any,
            chunk_rows: int,
            backend: str,
        ) -> tuple[Tensor, Tensor]:
            wanted = list(ctx.needs_input_grad[:3])
            loss, parts, *grads = grad(
                backend, student, weight, bias, *others, spec, chunk_rows, wanted
            )
            ctx.save_for_backward(
                *(g if want else None for g, want in zip(grads, wanted, strict=True))
            )
            ctx.backend = backend
            ctx.dtypes = (student.dtype, weight.dtype, weight.dtype)
            ctx.mark_non_differentiable(parts)
            ctx.set_materialize_grads(False)
            return loss, parts

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            if grad_loss is None:
                return (None,) * 7
            refuse_create_graph(op)
            grads = (
                None if g is None else scale_grad(g, grad_loss, backend=ctx.backend).to(dtype)
                for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            )
            return *grads, None, None, None, None

    class PerRowLinearLoss(torch.autograd.Function):
        """The gradient in the backward pass, with the upstream gradient as row weights."""

        @staticmethod
        def forward(
            ctx: Any,
            student: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            others: Tensors,
            spec: Any,
            chunk_rows: int,
            backend: str,
        ) -> Tensor:
            _, _, rows = forward(backend, student, weight, bias, *others, spec, chunk_rows)
            ctx.save_for_backward(student, weight, bias)
            # Not differentiated, and a teacher from torch.inference_mode() could not be saved.
            ctx.others, ctx.spec, ctx.chunk_rows, ctx.backend = others, spec, chunk_rows, backend
            return rows

        @staticmethod
        def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
            refuse_create_graph(op)
            others = list(ctx.others)
            row_weights = others[_ROW_WEIGHTS]
            weights = grad_rows if row_weights is None else grad_rows * row_weights
            others[_ROW_WEIGHTS] = weights.contiguous()
            wanted = list(ctx.needs_input_grad[:3])
            student, weight, bias = ctx.saved_tensors
            _, _, *grads = grad(
                ctx.backend, student, weight, bias, *others, ctx.spec, ctx.chunk_rows, wanted
            )
            dtypes = (student.dtype, weight.dtype, weight.dtype)
            found = (
                g.to(d) if want else None for g, d, want in zip(grads, dtypes, wanted, strict=True)
            )
            return *found, None, None, None, None

    def reduced(
        backend: str, tensors: Tensors, spec: Any, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        try:
            if _wants_grad(tensors):
                loss, parts = LinearLoss.apply(*tensors[:3], tensors[3:], spec, chunk_rows, backend)
            else:
                loss, parts, _ = forward(backend, *tensors, spec, chunk_rows)
        except RuntimeError as error:
            raise _checks.as_contract(op.removeprefix("linear_"), error) from None
        return loss, parts

    def per_row(backend: str, tensors: Tensors, spec: Any, chunk_rows: int) -> Tensor:
        spec = spec._replace(mean=False)
        try:
            if _wants_grad(tensors):
                rows: Tensor = PerRowLinearLoss.apply(
                    *tensors[:3], tensors[3:], spec, chunk_rows, backend
                )
            else:
                _, _, rows = forward(backend, *tensors, spec, chunk_rows)
        except RuntimeError as error:
            raise _checks.as_contract(op.removeprefix("linear_"), error) from None
        return rows

    return reduced, per_row


def _wants_grad(tensors: Tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:3])


# ---- checks --------------------------------------------------------------------------------------


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What ``torch.nn.functional.linear`` would do to its inputs, of which the first is given."""
    first = tensors[0]
    assert first is not None
    device = first.device.type
    if not torch.is_autocast_enabled(device) or first.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def check_student(op: str, student: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec) -> int:
    """Raises unless the student's tensors fit; returns the number of classes."""
    _checks.float_matrix(op, "student", student)
    _checks.head(op, "student_", student, weight, bias)
    columns = weight.shape[0]
    classes = columns if spec.classes < 0 else spec.classes
    if classes > columns:
        raise ValueError(f"{op}: student_weight must have at least {classes} rows, got {columns}")
    return classes


def chunk_rows_of(op: str, rows: int, classes: int, spec: Spec, wanted: int | None) -> int:
    """The caller's rows a chunk, or the planned ones."""
    if wanted is None:
        return plan_chunk_rows(rows, classes, 2 if spec.needs_teacher else 1)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"{op}: chunk_rows must be an integer of at least 1, got {wanted!r}")
    return wanted


def plan_chunk_rows(rows: int, columns: int, models: int = 2, budget: int | None = None) -> int:
    """Rows whose float32 logits fit a budget, all chunks about equal.

    Args:
        rows: in all.
        columns: of the logits of one model.
        models: 2 with a teacher that has a head, else 1.
        budget: bytes for the logits of a chunk. Default: a quarter of all logits, but 64 to 512 MB.
    """
    a_row = 4 * columns * models
    if budget is None:
        budget = int(min(max(_SHARE * rows * a_row, _LEAST_BYTES), _MOST_BYTES))
    most = max(1, budget // max(a_row, 1))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))
