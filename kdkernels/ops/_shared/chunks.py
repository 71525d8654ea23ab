"""What a linear loss runs: chunk after chunk of rows, GEMMs and the kernel of the loss on rows.

Logits exist for one chunk at a time, in float32 (never rounded to the 16-bit dtype of the hidden
states), are overwritten by their gradient, and feed the two GEMMs of the backward pass at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kdkernels._op import is_compiling
from kdkernels.ops.kd_loss.spec import Spec

# Rows of a 16-bit head that are worked on at a time: as float32 they take 12 MB at width 768.
_HEAD_BLOCK = {"cpu": 4096, "cuda": 16384}
_ONEDNN = torch.backends.mkldnn.is_available()


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient waits for its upstream factor.

    float16 would lose what a GradScaler's factor is there to save.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``, by oneDNN where it would be MKL.

    MKL packs the head anew for each chunk: 79 ms at 256 x 32000 x 768 float32, oneDNN 61 (2 cores,
    Zen 4). The operator is the one that torch.compile uses, which chooses for itself.
    """
    onednn = _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[0] > 0
    if onednn and not is_compiling():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return torch.nn.functional.linear(x, weight, bias)


class Head:
    """Logits of rows, and the way back, in float32 (float64) whatever the dtype of the head.

    A 16-bit head is widened block by block on the CPU, whose GEMMs would round their results; on a
    GPU the library keeps them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, classes: int) -> None:
        self.shape = weight.shape  # with its padding
        self.weight = weight[:classes]
        self.bias = None if bias is None else bias[:classes]
        self.dtype = accumulate(weight.dtype)
        self._whole = weight.dtype == self.dtype
        self._mixed = weight.is_cuda and not self._whole  # 16-bit in, float32 out

    def rows(self, x: Tensor) -> Tensor:
        """Hidden states as the GEMMs take them."""
        return x if self._whole or self._mixed else x.to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        if self._whole:
            return _linear(x, self.weight, self.bias)
        if self._mixed:
            out = torch.mm(x, self.weight.T, out_dtype=self.dtype)
        else:
            out = x.new_empty((x.shape[0], self.weight.shape[0]))
            for begin, end in self._blocks():
                torch.mm(x, self.weight[begin:end].to(self.dtype).T, out=out[:, begin:end])
        if self.bias is not None:
            out += self.bias.to(self.dtype)
        return out

    def gradient(self, logits: Tensor) -> Tensor:
        """The gradient of logits as the GEMMs take it."""
        return logits.to(self.weight.dtype) if self._mixed else logits

    def hidden(self, grad: Tensor) -> Tensor:
        """``grad @ weight``, the gradient of the hidden states."""
        if self._whole:
            return grad @ self.weight
        if self._mixed:
            return torch.mm(grad, self.weight, out_dtype=self.dtype)
        out = grad.new_zeros((grad.shape[0], self.weight.shape[1]))
        for begin, end in self._blocks():
            out.addmm_(grad[:, begin:end], self.weight[begin:end].to(self.dtype))
        return out

    def add_weight(self, grad: Tensor, x: Tensor, out: Tensor) -> None:
        """``out += grad.T @ x``; out is float32 (float64)."""
        if not self._mixed:
            out[: grad.shape[1]].addmm_(grad.T, x)
            return
        for begin, end in self._blocks():
            out[begin:end] += torch.mm(grad[:, begin:end].T, x, out_dtype=self.dtype)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        step = _HEAD_BLOCK.get(self.weight.device.type, 4096)
        for begin in range(0, self.weight.shape[0], step):
            yield begin, min(begin + step, self.weight.shape[0])


class _Rows:
    """The rows of a call, chunk by chunk; on the CPU without those that are not valid, except where
    a graph is traced, which must not depend on their number.
    """

    def __init__(self, student: Tensor, valid: Tensor | None, size: int) -> None:
        self.count = student.shape[0]
        self._size = size
        self._index: Tensor | None = None
        self._ignored: Tensor | None = None
        if valid is None:
            return
        if valid.device.type == "cpu" and not is_compiling():
            index = torch.nonzero(valid).squeeze(1)
            if index.numel() < self.count:
                self._index, self.count = index, index.numel()
        else:
            self._ignored = ~valid

    def number(self, valid: Tensor | None) -> Tensor | int:
        """Of the rows that are valid."""
        return self.count if valid is None or self._ignored is None else valid.sum()

    def chunks(self) -> Iterator[slice]:
        """At least one, so that there is a loss without rows."""
        for begin in range(0, max(self.count, 1), self._size):
            yield slice(begin, min(begin + self._size, self.count))

    def of(self, x: Tensor | None, chunk: slice) -> Tensor | None:
        """The chunk's rows of a tensor."""
        if x is None:
            return None
        return x[chunk] if self._index is None else x[self._index[chunk]]

    def clean(self, x: Tensor, chunk: slice) -> Tensor:
        """The chunk's hidden states: an ignored row may hold NaN, and the weight's gradient would
        meet it.
        """
        if self._ignored is None:
            return self.of(x, chunk)  # type: ignore[return-value]
        return x[chunk].masked_fill(self._ignored[chunk, None], 0.0)

    def put(self, out: Tensor, chunk: slice, values: Tensor) -> None:
        """Writes values to the chunk's rows."""
        if self._index is None:
            out[chunk] = values.to(out.dtype)
        else:
            out[self._index[chunk]] = values.to(out.dtype)


# What a loss on rows takes of the teacher, for a chunk of the rows.
Teacher = Callable[[_Rows, slice], tuple[Tensor | None, ...]]


def dense_teacher(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, classes: int
) -> Teacher:
    """The logits of a teacher's head; without hidden states none."""
    if hidden is None:
        return lambda rows, chunk: (None,)
    assert weight is not None
    head = Head(weight, bias, classes)

    def logits(rows: _Rows, chunk: slice) -> tuple[Tensor]:
        x = rows.of(hidden, chunk)
        assert x is not None
        return (head.logits(head.rows(x)),)

    return logits


def listed_teacher(*tensors: Tensor) -> Teacher:
    """Tensors that have the rows of the student."""
    return lambda rows, chunk: tuple(rows.of(x, chunk) for x in tensors)


class Call:
    """A call, resolved: the head, the rows, what the loss on rows takes beside them.

    Args:
        student: hidden states.
        head: of the student.
        teacher: what the loss on rows takes of the teacher.
        valid: ``[rows]`` bool, ``None`` where all are.
        per_row: what the loss on rows takes next: labels or mask, and row weights.
        denominator: of the sum.
        spec: of the loss on rows.
        chunk_rows: rows at a time.
        parts: size of the loss's parts.
    """

    def __init__(
        self,
        student: Tensor,
        head: Head,
        teacher: Teacher,
        valid: Tensor | None,
        per_row: tuple[Tensor | None, Tensor | None],
        denominator: Tensor | None,
        spec: Any,
        chunk_rows: int,
        parts: int,
    ) -> None:
        self.student, self.head, self.teacher = student, head, teacher
        self.rows = _Rows(student, valid, chunk_rows)
        self.per_row, self.spec, self.parts = per_row, spec, parts
        self.denominator = denominator
        if denominator is None and spec.mean:
            self.denominator = student.new_full((), 1.0, dtype=head.dtype) * self.rows.number(valid)

    def open(self, chunk: slice) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """The student's hidden states and logits, and what the kernel takes beside them."""
        x = self.head.rows(self.rows.clean(self.student, chunk))
        logits = self.head.logits(x)
        teacher = self.teacher(self.rows, chunk)
        per_row = (self.rows.of(x, chunk) for x in self.per_row)
        return x, logits, (*teacher, *per_row, self.denominator, self.spec)


def loss_on_logits(
    student: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher: Callable[[Spec, int], Teacher],  # from the spec and the number of classes
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    numbers: Any,
    chunk_rows: int,
) -> Call:
    """A call of a loss that reads logits, as ``kd_loss`` does."""
    spec = Spec.of(numbers)
    classes = spec.classes if spec.classes >= 0 else student_weight.shape[0]
    return Call(
        student,
        Head(student_weight, student_bias, classes),
        teacher(spec, classes),
        None if labels is None else labels != spec.ignore_index,
        (labels, row_weights),
        denominator,
        spec._replace(classes=-1),
        chunk_rows,
        parts=4,
    )


def _zeros(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    dtype, student = call.head.dtype, call.student
    loss, parts = student.new_zeros((), dtype=dtype), student.new_zeros((call.parts,), dtype=dtype)
    return loss, parts, student.new_zeros((student.shape[0],), dtype=dtype)


def forward(call: Call, on_rows: Callable[..., Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, parts and rows, by the loss on rows."""
    loss, parts, rows = _zeros(call)
    for chunk in call.rows.chunks():
        _, logits, others = call.open(chunk)
        chunk_loss, chunk_parts, chunk_rows = on_rows(logits, *others)
        del logits, others  # before the next chunk's take their place
        loss += chunk_loss
        parts += chunk_parts
        call.rows.put(rows, chunk, chunk_rows)
    return loss, parts, rows


def gradients(
    call: Call, on_rows_grad: Callable[..., Any], wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, parts and the wanted gradients, by the loss on rows with its gradient, which may have
    overwritten the logits.
    """
    wants_hidden, wants_weight, wants_bias = wanted
    head, student, shape = call.head, call.student, call.head.shape
    loss, parts, _ = _zeros(call)
    # Rows that are not valid keep their zeros.
    hidden_grad = student.new_zeros(
        student.shape if wants_hidden else (0,), dtype=kept(student.dtype)
    )
    weight_grad = student.new_zeros(shape if wants_weight else (0,), dtype=head.dtype)
    bias_grad = student.new_zeros(shape[:1] if wants_bias else (0,), dtype=head.dtype)
    for chunk in call.rows.chunks():
        x, logits, others = call.open(chunk)
        chunk_loss, chunk_parts, of_logits = on_rows_grad(logits, *others)
        del logits, others
        loss += chunk_loss
        parts += chunk_parts
        grad = head.gradient(of_logits)
        if wants_hidden:
            call.rows.put(hidden_grad, chunk, head.hidden(grad))
        if wants_weight:
            head.add_weight(grad, x, weight_grad)
        if wants_bias:
            bias_grad[: of_logits.shape[1]] += of_logits.sum(0)
        del of_logits, grad  # before the next chunk's take their place
    dtype = kept(head.weight.dtype)
    return loss, parts, hidden_grad, weight_grad.to(dtype), bias_grad.to(dtype)
