"""Losses of logits and heads whose vocabulary is divided over processes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels.api import functional
from kdkernels.api._rows import reduce_rows
from kdkernels.api._shards import Layout, layout_of
from kdkernels.api._spec import chunk_rows_of, integer, kd_spec
from kdkernels.ops import kd_shard
from kdkernels.ops._shared import vocab_shards
from kdkernels.ops._shared.linear_loss import autocast
from kdkernels.ops._shared.vocab_rows import Shard
from kdkernels.ops.kd_loss import Spec
from kdkernels.ops.linear_kd_loss import plan_chunk_rows

__all__ = ["vocab_parallel_kd_loss", "vocab_parallel_linear_kd_loss"]

# Tensors of the size of a chunk's logits that exist at a time: of both models, and about what the
# reference makes of them.
_COPIES, _COPIES_OF_REFERENCE = 2, 8


def vocab_parallel_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    group: Any = None,
    shards: Sequence[int] | None = None,
    chunk_rows: int | None = None,
    chunk_bytes: int | None = None,
    **options: Any,
) -> Any:  # as kd_loss
    r"""``kd_loss`` of logits whose vocabulary is divided over the processes of a group.

    The loss of :func:`~kdkernels.kd_loss` on the whole logits, on every process of the group, and
    each process's part of the gradient. With ``m`` the largest logit of a row here and
    ``d = z - m``, of student and teacher, a process tells the others ``m``, ``sum exp(d / T)``, the
    student's ``sum exp(d)``, the label's logit where it is here, and ``sum exp(d_t / T) (d_t -
    d_s)``: numbers that add up when all are taken relative to the largest ``m``.

    Args:
        student_logits: ``[..., size here]``, float32, bfloat16, float16 or float64; the columns of
            this process, in the order of the processes. Gets its gradient. Or a DTensor that is
            sharded by its last dimension. All processes hold the same rows.
        teacher_logits: divided in the same way; must not require grad. ``None``: cross-entropy.
        labels: ``[...]`` integers of the whole vocabulary, the same on all processes.
        group: the process group; ``None``: that of the DTensors, else the default one.
        shards: how many columns each process of the group has, where they are not equal.
        chunk_rows: rows that are worked on at a time, each time with an exchange. Default: all,
            for the kernels read logits where they are; as :func:`~kdkernels.linear_kd_loss` where
            these are copied first (float16, of which the gradient is kept in float32) and for
            ``backend="reference"``.
        chunk_bytes: memory for a chunk, instead.
        **options: every other keyword of :func:`~kdkernels.kd_loss`, except ``inplace``.
            ``vocab_size`` counts the real classes of all shards together.

    Returns:
        As :func:`~kdkernels.kd_loss`; the same number, to the bit, on every process.

    Raises:
        ValueError: shapes, values, shards that do not fit; on CPUs also rows, labels or shards that
            are not the same everywhere.
        TypeError: dtypes that do not fit; an unknown option.

    Note:
        A chunk of rows costs one ``all_gather`` of up to 9 numbers a row and process (6 for forward
        KL and cross-entropy at one temperature), ``jsd`` and ``tvd``, which need the normalisers
        first, a second one of 2. Nothing is synchronised with the host. Logits are read once for
        these numbers and once more for the gradient, by the kernels of ``kd_loss``.
        All processes must call it, and its backward pass where ``reduction="none"``, in one order.
        ``create_graph=True`` is refused. Under ``torch.compile`` a call is one graph, its exchanges
        included. Not yet run on a GPU.

    Example:
        >>> import kdkernels, torch
        >>> mine = torch.randn(4, 50, requires_grad=True)  # of 100 classes on two processes
        >>> def step(group):
        ...     return kdkernels.parallel.vocab_parallel_kd_loss(
        ...         mine, torch.randn(4, 50), torch.tensor([3, 70, 99, -100]), group=group,
        ...         temperature=2.0,
        ...     )
    """
    name = "vocab_parallel_kd_loss"
    student, teacher = student_logits, teacher_logits
    layout = layout_of(
        name, {"student_logits": (student, -1), "teacher_logits": (teacher, -1)}, group, shards
    )
    student, teacher = layout.tensors
    call = _Call(name, layout, labels, options)
    spec, t2 = call.spec(teacher is not None)
    rows = math.prod(student.shape[:-1])
    shard = call.shard(student, teacher, rows, spec, chunk_rows, chunk_bytes)

    def arguments(x: Tensor, of_teacher: Tensor | None, *others: Any) -> tuple[Any, ...]:
        if x.shape[1]:  # a process may have no class
            _checks.float_matrix(name, "student_logits", x)
        if of_teacher is not None:
            _check_teacher(name, "teacher_logits", x, of_teacher)
        return x, None, None, (of_teacher, None, None, *others)

    return call.reduce(student, teacher, spec, t2, shard, arguments)


def vocab_parallel_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    group: Any = None,
    shards: Sequence[int] | None = None,
    chunk_rows: int | None = None,
    chunk_bytes: int | None = None,
    **options: Any,
) -> Any:  # as kd_loss
    r"""``linear_kd_loss`` of heads whose vocabulary is divided over the processes of a group.

    The loss of :func:`~kdkernels.linear_kd_loss` with the whole heads. Each process computes the
    logits of its own rows of the heads, for a chunk of tokens at a time: neither a head nor the
    logits of a chunk are whole anywhere. What is exchanged is that of
    :func:`vocab_parallel_kd_loss`, and the gradient of the hidden states, which is the sum over the
    processes.

    Args:
        student_hidden: ``[..., student width]``, the same on all processes of the group; float32,
            bfloat16, float16 or float64. Gets the whole gradient, on every process: it must not be
            summed again. A DTensor must be replicated.
        student_weight: ``[size here, student width]``, this process's rows of the head, in the
            dtype of the hidden states; or a DTensor that is sharded by its first dimension. Gets a
            gradient unless it is frozen.
        teacher_hidden: ``[..., teacher width]``, the same on all processes; must not require grad.
        teacher_weight: ``[size here, teacher width]``, divided as the student's.
        labels: ``[...]`` integers of the whole vocabulary.
        student_bias: ``[size here]``. Gets a gradient.
        teacher_bias: ``[size here]``.
        group: as in :func:`vocab_parallel_kd_loss`, like every argument that follows.
        shards: sizes of the processes' parts.
        chunk_rows: rows whose logits exist at a time.
        chunk_bytes: memory for a chunk. Default of both: as :func:`~kdkernels.linear_kd_loss`.
        **options: every other keyword of :func:`~kdkernels.linear_kd_loss`.

    Returns:
        As :func:`~kdkernels.linear_kd_loss`; the same number, to the bit, on every process.

    Raises:
        ValueError: as :func:`vocab_parallel_kd_loss`.
        TypeError: as :func:`vocab_parallel_kd_loss`.

    Note:
        A chunk costs one ``all_gather`` of some numbers a row and one ``all_reduce`` of
        ``[chunk_rows, student width]`` in float32, of which 16-bit gradients are rounded once.
        A head that data-parallel training has sharded (``fully_shard``) is another case: there each
        process has rows of its own; see :func:`gathered`. Not yet run on a GPU.

    Example:
        >>> import kdkernels, torch
        >>> head = torch.nn.Linear(16, 50, bias=False)  # 50 of 100 classes
        >>> def step(hidden, teacher_hidden, teacher_rows, labels, group):
        ...     return kdkernels.parallel.vocab_parallel_linear_kd_loss(
        ...         hidden, head.weight, teacher_hidden, teacher_rows, labels, group=group, shift=1
        ...     )
    """
    name = "vocab_parallel_linear_kd_loss"
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError(f"{name}: teacher_hidden and teacher_weight must be given together")
    layout = layout_of(
        name,
        {
            "student_weight": (student_weight, 0),
            "teacher_weight": (teacher_weight, 0),
            "student_bias": (student_bias, 0),
            "teacher_bias": (teacher_bias, 0),
        },
        group,
        shards,
    )
    student = layout.replicated(name, "student_hidden", student_hidden)
    teacher = layout.replicated(name, "teacher_hidden", teacher_hidden)
    assert student is not None
    call = _Call(name, layout, labels, options)
    spec, t2 = call.spec(teacher is not None)
    rows = math.prod(student.shape[:-1])
    # Logits of heads are as wide as sums, whatever the teacher's dtype.
    shard = call.shard(student, None, rows, spec, chunk_rows, chunk_bytes, from_heads=True)

    def arguments(x: Tensor, of_teacher: Tensor | None, *others: Any) -> tuple[Any, ...]:
        weight, teacher_rows, bias, bias_of_teacher = layout.tensors
        x, of_teacher, weight, teacher_rows, bias, bias_of_teacher = autocast(
            x, of_teacher, weight, teacher_rows, bias, bias_of_teacher
        )
        _checks.float_matrix(name, "student_hidden", x, "width")
        _checks.head(name, "student_", x, weight, bias)
        if of_teacher is not None:
            _check_teacher(name, "teacher_hidden", x, of_teacher, logits=False)
            _checks.head(name, "teacher_", of_teacher, teacher_rows, bias_of_teacher)
            for argument, tensor in (
                ("teacher_weight", teacher_rows), ("teacher_bias", bias_of_teacher),
            ):  # fmt: skip
                if tensor is not None:
                    _checks.no_grad(name, argument, tensor)
        return x, weight, bias, (of_teacher, teacher_rows, bias_of_teacher, *others)

    return call.reduce(student, teacher, spec, t2, shard, arguments)


class _Call:
    """What both losses do beside their tensors."""

    def __init__(
        self, name: str, layout: Layout, labels: Tensor | None, options: dict[str, Any]
    ) -> None:
        known = {
            key: parameter.default
            for key, parameter in inspect.signature(functional.kd_loss).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and key != "inplace"
        }
        for key in options:
            if key not in known:
                raise TypeError(f"{name}: {key} must be one of {', '.join(known)}")
        self.name, self.layout = name, layout
        self.labels = layout.replicated(name, "labels", labels)
        self.options = {**known, **options}

    def spec(self, has_teacher: bool) -> tuple[Spec, float]:
        """The numbers of the call."""
        o, classes = self.options, sum(self.layout.sizes)
        spec, t2 = kd_spec(
            o["temperature"],
            o["alpha"],
            o["ce_weight"],
            o["kd_weight"],
            o["divergence"],
            o["beta"],
            o["scale_t2"],
            o["label_smoothing"],
            o["smoothing_convention"],
            o["z_loss"],
            o["logit_scale"],
            o["softcap"],
            o["vocab_size"],
            o["ignore_index"],
            o["reduction"],
            has_teacher,
            self.labels is not None,
            o["return_parts"],
            classes,
            self.name,
        )
        if spec.classes > classes:
            raise ValueError(
                f"{self.name}: vocab_size must be at most the classes of all shards, {classes}, "
                f"got {spec.classes}"
            )
        return spec, t2

    def shard(
        self,
        student: Tensor,
        teacher: Tensor | None,
        rows: int,
        spec: Spec,
        chunk_rows: int | None,
        chunk_bytes: int | None,
        *,
        from_heads: bool = False,
    ) -> Shard:
        """The classes that are here, and the chunks, which are those of every process."""
        backend = kd_shard.choose(self.name, student, teacher, self.options["backend"])
        sizes, rank = self.layout.sizes, self.layout.rank
        classes = sum(sizes) if spec.classes < 0 else spec.classes
        start = sum(sizes[:rank])
        if chunk_rows is not None:
            integer(self.name, "chunk_rows", chunk_rows, 1)
        # Every process must make the same chunks: those of the largest shard.
        largest, copies = max(*sizes, 1), _COPIES
        if backend == "reference":
            copies = _COPIES_OF_REFERENCE
        elif not from_heads and student.dtype != torch.float16 and chunk_bytes is None:
            chunk_rows = chunk_rows or max(rows, 1)
        chunk_rows = chunk_rows_of(
            self.name, chunk_rows, chunk_bytes, rows, largest, copies
        ) or plan_chunk_rows(rows, largest, copies)
        shard = Shard(
            self.layout.group,
            rank,
            len(sizes),
            start,
            max(0, min(classes - start, sizes[rank])),
            classes,
            chunk_rows,
            backend,
        )
        self.layout.check_agreement(
            self.name, student.device, [rows, chunk_rows, *self._count(spec), *sizes]
        )
        return shard

    def _count(self, spec: Spec) -> list[int]:
        """The labels that count, where looking costs no synchronisation."""
        labels = self.labels
        if labels is None or labels.device.type != "cpu" or torch.compiler.is_compiling():
            return []
        return [int((labels != spec.ignore_index).sum())]

    def reduce(
        self,
        student: Tensor,
        teacher: Tensor | None,
        spec: Spec,
        t2: float,
        shard: Shard,
        arguments: Callable[..., tuple[Any, ...]],
    ) -> Any:
        """Mask, shift and reduction are those of every loss on rows."""

        def prepared(
            x: Tensor, of_teacher: Tensor | None, labels: Any, weights: Any, denominator: Any = None
        ) -> Any:
            per_row = _checks.row_inputs(self.name, x, labels, weights, denominator)
            if labels is not None:
                _checks.labels_in_range(self.name, labels, shard.classes, spec)
            return arguments(x, of_teacher, *per_row)

        def reduced(*args: Any, **_: Any) -> tuple[Tensor, Tensor]:
            x, weight, bias, others = prepared(*args[:-1])  # the last is the spec
            return vocab_shards.reduced(x, weight, bias, others, spec, shard)

        def per_row(*args: Any, **_: Any) -> Tensor:
            x, weight, bias, others = prepared(*args[:-1])
            return vocab_shards.per_row(x, weight, bias, others, spec, shard)

        passed = "mask shift reduction num_items_in_batch row_weights return_parts"
        return reduce_rows(
            student,
            teacher,
            self.labels,
            spec,
            t2,
            name=self.name,
            backend=None,
            reduced=reduced,
            per_row=per_row,
            **{key: self.options[key] for key in passed.split()},
        )


def _check_teacher(
    name: str, argument: str, student: Tensor, teacher: Tensor, *, logits: bool = True
) -> None:
    if teacher.shape[1]:
        _checks.float_matrix(name, argument, teacher, "classes" if logits else "width")
    _checks.same_device(name, argument, teacher, student.device)
    _checks.no_grad(name, argument, teacher)
    if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
        raise TypeError(
            f"{name}: {argument} must be float64 exactly if the student is, got "
            f"{str(teacher.dtype).removeprefix('torch.')}"
        )
