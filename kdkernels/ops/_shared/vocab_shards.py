"""A loss over shards of the vocabulary: chunk after chunk of rows, and its differentiable forms."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops._shared.chunks import Call, Head, Teacher, accumulate, forward, gradients, kept
from kdkernels.ops._shared.vocab_rows import Chunk, Shard
from kdkernels.ops.kd_loss.spec import Spec
from kdkernels.ops.scale_grad.op import scale_grad


class _ShardOfHead(Head):
    """The rows of a head that are here; the gradient of the hidden states comes from all."""

    def __init__(self, weight: Tensor, bias: Tensor | None, shard: Shard) -> None:
        super().__init__(weight, bias, shard.size)
        self._shard = shard

    def logits(self, x: Tensor) -> Tensor:
        if self._shard.size == 0:
            return x.new_zeros((x.shape[0], 0), dtype=self.dtype)
        return super().logits(x)

    def hidden(self, grad: Tensor) -> Tensor:
        return self._shard.sum_(super().hidden(grad))


def _on_rows(shard: Shard, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return Chunk(shard, *args).results()


def _on_rows_grad(shard: Shard, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    chunk = Chunk(shard, *args)
    chunk.gradient_(chunk.student)
    return (*chunk.results()[:2], chunk.student)


# Of a call: what its operators take, and loss, parts, rows and the wanted gradients.
Tensors = tuple[Any, ...]  # teacher, its weight and bias, labels, row_weights, denominator
Result = tuple[Tensor, Tensor, Tensor, list[Tensor | None]]


def _teacher(hidden: Tensor | None, weight: Tensor, bias: Tensor | None, shard: Shard) -> Teacher:
    if hidden is None:
        return lambda rows, chunk: (None,)
    head = _ShardOfHead(weight, bias, shard)
    return lambda rows, chunk: (head.logits(head.rows(rows.of(hidden, chunk))),)  # type: ignore[arg-type]


def _from_heads(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    others: Tensors,
    spec: Spec,
    shard: Shard,
    wanted: list[bool],
) -> Result:
    teacher, teacher_weight, teacher_bias, labels, row_weights, denominator = others
    call = Call(
        student,
        _ShardOfHead(weight, bias, shard),
        _teacher(teacher if spec.needs_teacher else None, teacher_weight, teacher_bias, shard),
        None if labels is None else labels != spec.ignore_index,
        (labels, row_weights),
        denominator,
        spec,
        shard.chunk_rows,
        parts=4,
    )
    if not any(wanted):
        return (*forward(call, partial(_on_rows, shard)), [])
    loss, parts, *grads = gradients(call, partial(_on_rows_grad, shard), wanted)
    return loss, parts, loss, [g if w else None for g, w in zip(grads, wanted, strict=True)]


def _from_logits(
    student: Tensor, others: Tensors, spec: Spec, shard: Shard, wanted: list[bool]
) -> Result:
    teacher, _, _, labels, row_weights, denominator = others
    rows, dtype = student.shape[0], accumulate(student.dtype)
    if denominator is None and spec.mean:
        denominator = student.new_full((), rows, dtype=dtype)
        if labels is not None:
            denominator = (labels != spec.ignore_index).sum().to(dtype)
    loss, parts = student.new_zeros((), dtype=dtype), student.new_zeros((4,), dtype=dtype)
    per_row = student.new_zeros((rows,), dtype=dtype)
    grad = None
    whole = student.shape[1] == shard.size and 0 < rows <= shard.chunk_rows
    if wanted[0] and not (whole and kept(student.dtype) == student.dtype):
        # Padding keeps its zeros.
        grad = student.new_zeros(student.shape, dtype=kept(student.dtype))

    for begin in range(0, rows, shard.chunk_rows):
        piece = slice(begin, begin + shard.chunk_rows)
        own_labels = None if labels is None else labels[piece]
        weights = None if row_weights is None else row_weights[piece]
        own = student[piece, : shard.size]
        if grad is not None and grad.dtype != student.dtype:
            # float16, of which the gradient is kept wider: it takes the place of wider logits.
            own = grad[piece, : shard.size].copy_(own)
        of_teacher = teacher[piece, : shard.size] if spec.needs_teacher else None
        if of_teacher is not None and own.dtype != student.dtype:
            of_teacher = of_teacher.to(own.dtype)  # a GPU's kernel takes both models in one dtype
        chunk = Chunk(shard, own, of_teacher, own_labels, weights, denominator, spec)
        found = chunk.results()
        loss += found[0]
        parts += found[1]
        per_row[piece] = found[2]
        if grad is not None:
            chunk.gradient_(grad[piece, : shard.size])
        elif wanted[0]:
            return *found, [chunk.gradient(), None, None]
    return loss, parts, per_row, [grad, None, None]


def _run(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    others: Tensors,
    spec: Spec,
    shard: Shard,
    wanted: list[bool],
) -> Result:
    if weight is None:
        return _from_logits(student, others, spec, shard, wanted)
    return _from_heads(student, weight, bias, others, spec, shard, wanted)


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "vocab_parallel: create_graph must be False, got True: its gradient is a constant"
        )


def _scaled(grad: Tensor, by: Tensor, backend: str) -> Tensor:
    if backend == "reference" or grad.numel() == 0:
        return grad * by
    return scale_grad(grad, by, backend=backend)


class _Reduced(torch.autograd.Function):
    """The gradients are computed in the forward pass and wait for their upstream factor."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        others: Tensors,
        spec: Spec,
        shard: Shard,
    ) -> tuple[Tensor, Tensor]:
        wanted = list(ctx.needs_input_grad[:3])
        loss, parts, _, grads = _run(student, weight, bias, others, spec, shard, wanted)
        ctx.save_for_backward(*grads)
        ctx.backend = shard.backend
        ctx.dtypes = [None if x is None else x.dtype for x in (student, weight, bias)]
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 6
        _refuse_create_graph()
        found = (
            None if g is None else _scaled(g, grad_loss, ctx.backend).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *found, None, None, None


class _PerRow(torch.autograd.Function):
    """The gradients in the backward pass, with the upstream gradient as row weights."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        others: Tensors,
        spec: Spec,
        shard: Shard,
    ) -> Tensor:
        rows = _run(student, weight, bias, others, spec, shard, [False] * 3)[2]
        ctx.save_for_backward(student, weight, bias)
        # Not differentiated, and a teacher from torch.inference_mode() could not be saved.
        ctx.others, ctx.spec, ctx.shard = others, spec, shard
        return rows

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_create_graph()
        *teacher, labels, row_weights, denominator = ctx.others
        weights = grad_rows if row_weights is None else grad_rows * row_weights
        others = (*teacher, labels, weights, denominator)
        student, weight, bias = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        grads = _run(student, weight, bias, others, ctx.spec, ctx.shard, wanted)[3]
        found = (
            None if g is None or x is None else g.to(x.dtype)
            for g, x in zip(grads, (student, weight, bias), strict=True)
        )
        return *found, None, None, None


def reduced(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    others: Tensors,
    spec: Spec,
    shard: Shard,
) -> tuple[Tensor, Tensor]:
    """Loss ``[]`` and parts ``[4]``, as of ``kd_loss`` and ``linear_kd_loss``.

    Args:
        student: logits ``[rows, size here]``, or hidden states ``[rows, width]`` with a weight.
        weight: the student's head, ``[size here, width]``; ``None``: ``student`` is logits.
        bias: ``[size here]``.
        others: teacher, its weight and bias, labels (of all classes), row_weights, denominator.
        spec: of the loss; ``classes`` is not looked at.
        shard: the classes that are here.
    """
    spec = spec._replace(classes=-1)
    if not torch.is_grad_enabled():
        return _run(student, weight, bias, others, spec, shard, [False] * 3)[:2]
    result: tuple[Tensor, Tensor] = _Reduced.apply(student, weight, bias, others, spec, shard)
    return result


def per_row(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    others: Tensors,
    spec: Spec,
    shard: Shard,
) -> Tensor:
    """As :func:`reduced`, one value a row: ``[rows]``."""
    spec = spec._replace(classes=-1, mean=False)
    rows: Tensor = _PerRow.apply(student, weight, bias, others, spec, shard)
    return rows
