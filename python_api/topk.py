"""Losses from a sparse teacher: the ids and log-probabilities of its most likely classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from kdkernels._op import is_compiling
from kdkernels.api._rows import reduce_rows
from kdkernels.api._spec import chunk_rows_of, kd_spec, positive
from kdkernels.ops import linear_topk_kd_loss as linear_topk_op
from kdkernels.ops import topk_kd_loss as op
from kdkernels.ops import topk_logprobs as logprobs_op

__all__ = ["TopK", "linear_topk_kd_loss", "topk_kd_loss", "topk_logprobs"]
_LOGPROBS = "topk_logprobs"


def topk_kd_loss(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    labels: Tensor | None = None,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
    alpha: float | None = None,
    ce_weight: float | None = None,
    kd_weight: float | None = None,
    divergence: str = "forward_kl",
    scale_t2: bool = True,
    label_smoothing: float = 0.0,
    smoothing_convention: str = "torch",
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    shift: int = 0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    row_weights: Tensor | None = None,
    inplace: bool = False,
    return_parts: bool = False,
    backend: str | None = None,
) -> Any:  # as kd_loss
    r"""``kd_loss`` from the teacher's most likely classes alone, e.g. from a stored teacher.

    The formula is that of :func:`kd_loss`. With ``K`` the listed classes of a row, ``p`` the
    teacher's probabilities, ``q`` the student's at the temperature, ``r = 1 - sum_K p`` and
    ``Q = sum_{not K} q``, the divergence is::

        bucket:   sum_K p log(p / q) + r log(r / Q)
        renorm:   sum_K p' log(p' / q'),  p' = p / sum_K p,  q' = q / sum_K q
        none:     sum_K p log(p / q)
        uniform:  sum_K p log(p / q) + sum_{not K} (r / m) log((r / m) / q),  m classes

    and with ``reverse_kl`` the same with the models exchanged.

    Args:
        student_logits: ``[..., vocab]``, float32, bfloat16, float16 or float64. Gets the gradient.
        topk_ids: ``[..., K]`` int64 or int32 in ``[0, vocab)``, or -1 for an entry that does not
            count; any order. Of a repeated id the first entry counts.
        topk_logprobs: ``[..., K]`` log-probabilities *at the temperature* (:func:`topk_logprobs`
            makes them), any floating dtype; read as float32. Must not require grad.
        labels: as in :func:`kd_loss`.
        tail: what stands for the mass that is not listed. ``bucket``: one more class, in both
            models; a KL that is never negative. ``renorm``: nothing, both models are normalised
            over the list. ``none``: nothing, the sum is cut off; it can be negative and pushes
            mass onto the list. ``uniform``: it is spread evenly over the other classes.
        temperature: ``T`` of the student, that of the stored log-probabilities.
        alpha: as in :func:`kd_loss`, like every argument that follows.
        ce_weight: weight of cross-entropy.
        kd_weight: weight of the divergence.
        divergence: ``forward_kl`` or ``reverse_kl``. In reverse KL ``r`` is at least 2^-24.
        scale_t2: multiply the divergence by ``temperature ** 2``.
        label_smoothing: share of the label's probability spread over the classes.
        smoothing_convention: ``torch`` or ``tfkd``.
        z_loss: weight of the squared log-partition of the student.
        logit_scale: factor of the student's logits.
        softcap: cap of the student's logits.
        vocab_size: real classes of padded logits.
        ignore_index: label of rows to leave out.
        mask: ``[...]`` rows to use.
        shift: 1 for causal language models; the teacher's rows are aligned with the logits.
        reduction: ``mean``, ``batchmean``, ``sum``, ``none`` or ``element_mean``.
        num_items_in_batch: divides the sum instead.
        row_weights: ``[...]`` factors of the rows' losses.
        inplace: overwrite ``student_logits`` with their gradient.
        return_parts: return :class:`KDParts`.
        backend: ``native``, ``triton`` or ``reference``.

    Returns:
        The loss, or :class:`KDParts`, as :func:`kd_loss`.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument.
        TypeError: dtypes that do not fit.
        NotImplementedError: the named backend cannot run this call.

    Note:
        No row of the teacher is ever made. A row costs what cross-entropy alone does. Where the
        listed probabilities of a row sum to more than 1, by rounding, they are divided by their
        sum. On CUDA an out-of-range id gives NaN for its row, because a check would synchronise.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Example:
        >>> import kdkernels, torch
        >>> student, teacher = torch.randn(4, 100, requires_grad=True), torch.randn(4, 100)
        >>> top = (teacher / 2.0).log_softmax(-1).topk(8)
        >>> kdkernels.topk_kd_loss(student, top.indices, top.values, temperature=2.0).backward()
        >>> student.grad.shape
        torch.Size([4, 100])
    """
    name = "topk_kd_loss"
    teacher = _teacher(name, "student_logits", student_logits, topk_ids, topk_logprobs)
    _check_student_only(name, logit_scale=logit_scale, softcap=softcap)
    build = kd_spec.__wrapped__ if is_compiling() else kd_spec
    spec, t2 = build(
        temperature,
        alpha,
        ce_weight,
        kd_weight,
        divergence,
        0.5,
        scale_t2,
        label_smoothing,
        smoothing_convention,
        z_loss,
        logit_scale,
        softcap,
        vocab_size,
        ignore_index,
        reduction,
        True,
        labels is not None,
        return_parts,
        student_logits.shape[-1],
        name,
        tail,
    )
    return reduce_rows(
        student_logits,
        None,
        labels,
        spec,
        t2,
        mask=mask,
        shift=shift,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        row_weights=row_weights,
        inplace=inplace,
        return_parts=return_parts,
        backend=backend,
        name=name,
        reduced=_from(op.topk_kd_loss, teacher),
        per_row=_from(op.topk_kd_loss_rows, teacher),
    )


def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    chunk_bytes: int | None = None,
    tail: str = "bucket",
    temperature: float = 1.0,
    alpha: float | None = None,
    ce_weight: float | None = None,
    kd_weight: float | None = None,
    divergence: str = "forward_kl",
    scale_t2: bool = True,
    label_smoothing: float = 0.0,
    smoothing_convention: str = "torch",
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    shift: int = 0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    row_weights: Tensor | None = None,
    return_parts: bool = False,
    backend: str | None = None,
) -> Any:  # as kd_loss
    r"""``topk_kd_loss`` straight from hidden states and the student's head.

    The loss of ``logits = student_hidden @ student_weight.T + student_bias``; see
    :func:`topk_kd_loss` for the formula and :func:`linear_kd_loss` for how logits are made.

    Args:
        student_hidden: ``[..., width]``, as in :func:`linear_kd_loss`. Gets a gradient.
        student_weight: ``[vocab, width]``. Gets a gradient unless it is frozen.
        topk_ids: ``[..., K]``, as in :func:`topk_kd_loss`.
        topk_logprobs: ``[..., K]``, as in :func:`topk_kd_loss`.
        labels: ``[...]`` integers in ``[0, vocab)`` or ``ignore_index``.
        student_bias: ``[vocab]``. Gets a gradient.
        chunk_rows: rows whose logits exist at a time.
        chunk_bytes: memory for the float32 logits of a chunk, instead of ``chunk_rows``.
        tail: ``bucket``, ``renorm``, ``none`` or ``uniform``.
        temperature: as in :func:`topk_kd_loss`, like every argument that follows.
        alpha: weight of the divergence.
        ce_weight: weight of cross-entropy.
        kd_weight: weight of the divergence.
        divergence: ``forward_kl`` or ``reverse_kl``.
        scale_t2: multiply the divergence by ``temperature ** 2``.
        label_smoothing: share of the label's probability spread over the classes.
        smoothing_convention: ``torch`` or ``tfkd``.
        z_loss: weight of the squared log-partition of the student.
        logit_scale: factor of the student's logits.
        softcap: cap of the student's logits.
        vocab_size: real classes of a padded head.
        ignore_index: label of rows to leave out.
        mask: ``[...]`` rows to use.
        shift: 1 for causal language models.
        reduction: ``mean``, ``batchmean``, ``sum``, ``none`` or ``element_mean``.
        num_items_in_batch: divides the sum instead.
        row_weights: ``[...]`` factors of the rows' losses.
        return_parts: return :class:`KDParts`.
        backend: ``native``, ``triton`` or ``reference``.

    Returns:
        The loss, or :class:`KDParts`, as :func:`kd_loss`.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument.
        TypeError: dtypes that do not fit.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Example:
        >>> import kdkernels, torch
        >>> hidden, head = torch.randn(2, 6, 16), torch.nn.Linear(16, 100, bias=False)
        >>> top = torch.randn(2, 6, 100).log_softmax(-1).topk(8)
        >>> tokens = torch.randint(100, (2, 6))
        >>> loss = kdkernels.linear_topk_kd_loss(
        ...     hidden, head.weight, top.indices, top.values, tokens, shift=1
        ... )
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([100, 16])
    """
    name = "linear_topk_kd_loss"
    if student_weight.dim() != 2:
        raise ValueError(
            f"{name}: student_weight must be [vocab, width], got shape {list(student_weight.shape)}"
        )
    columns = student_weight.shape[0]
    teacher = _teacher(name, "student_hidden", student_hidden, topk_ids, topk_logprobs)
    _check_student_only(name, logit_scale=logit_scale, softcap=softcap)
    build = kd_spec.__wrapped__ if is_compiling() else kd_spec
    spec, t2 = build(
        temperature,
        alpha,
        ce_weight,
        kd_weight,
        divergence,
        0.5,
        scale_t2,
        label_smoothing,
        smoothing_convention,
        z_loss,
        logit_scale,
        softcap,
        vocab_size,
        ignore_index,
        reduction,
        True,
        labels is not None,
        return_parts,
        columns,
        name,
        tail,
    )
    rows = math.prod(student_hidden.shape[:-1])
    chunk_rows = chunk_rows_of(name, chunk_rows, chunk_bytes, rows, columns, models=1)
    options: dict[str, Any] = {"head": (student_weight, student_bias), "chunk_rows": chunk_rows}
    return reduce_rows(
        student_hidden,
        None,
        labels,
        spec,
        t2,
        mask=mask,
        shift=shift,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        row_weights=row_weights,
        return_parts=return_parts,
        backend=backend,
        name=name,
        reduced=_from(partial(linear_topk_op.linear_topk_kd_loss, **options), teacher),
        per_row=_from(partial(linear_topk_op.linear_topk_kd_loss_rows, **options), teacher),
    )


def _check_student_only(name: str, **arguments: object) -> None:
    """A pair would mean both models, but the teacher has no logits here."""
    for argument, value in arguments.items():
        if value is not None and not isinstance(value, int | float):
            raise TypeError(
                f"{name}: {argument} must be a number, the student's, got {type(value).__name__}"
            )


def _teacher(
    name: str, argument: str, student: Tensor, ids: Tensor, logprobs: Tensor
) -> op.TopKTeacher:
    """The listed classes with their leading dimensions folded."""
    if student.dim() < 1 or student.shape[-1] < 1:
        raise ValueError(f"{name}: {argument} must be [..., classes], got {list(student.shape)}")
    leading = student.shape[:-1]
    for listed, x in (("topk_ids", ids), ("topk_logprobs", logprobs)):
        if x.dim() != student.dim() or x.shape[:-1] != leading or x.shape[-1] < 1:
            raise ValueError(
                f"{name}: {listed} must be [{', '.join(str(n) for n in leading)}, k], "
                f"got {list(x.shape)}"
            )
    if ids.shape != logprobs.shape:
        raise ValueError(
            f"{name}: topk_logprobs must have the shape of topk_ids {list(ids.shape)}, "
            f"got {list(logprobs.shape)}"
        )
    return op.TopKTeacher(*(x.reshape(-1, x.shape[-1]) for x in (ids, logprobs)))


def _from(function: Callable[..., Any], teacher: op.TopKTeacher) -> Callable[..., Any]:
    """A form of an op in the shape that ``reduce_rows`` calls, whose teacher is a tensor."""

    def call(student: Tensor, _: None, *args: Any, **options: Any) -> Any:
        return function(student, teacher, *args, **options)

    return call


class TopK(NamedTuple):
    """The k likeliest classes of each row, in descending order, and what is left.

    ``logprobs.exp().sum(-1) + tail`` is 1 up to rounding.
    """

    ids: Tensor  # [..., k] int64; -1 where there are fewer than k classes that are not -inf
    logprobs: Tensor  # [..., k]; -inf there
    tail: Tensor  # [...] probability of all other classes together


def topk_logprobs(
    x: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> TopK:
    r"""The k largest log-probabilities of each row, and the mass outside of them.

    Of ``softmax(z / temperature)``, ``z = softcap * tanh(logit_scale * logits / softcap)``::

        logprobs[i] = z[ids[i]] / T - logsumexp(z / T)
        tail = sum over all other classes of softmax(z / T)

    This is what a sparse teacher stores: with k = 64 of 128256 classes, a thousandth of its logits.

    Args:
        x: logits, ``[..., vocab]``; float32, bfloat16, float16 or float64. With ``weight``: hidden
            states, ``[..., width]``.
        k: how many classes, from 1 to the number of classes.
        weight: ``[vocab, width]``, the head's weight, in the dtype of ``x``; under autocast both
            are cast as a linear layer's.
        bias: ``[vocab]``, the head's bias.
        temperature: ``T > 0``.
        logit_scale: positive factor of the logits before the cap.
        softcap: Gemma's logit cap; ``None`` for none.
        vocab_size: number of real classes where the logits have padding columns: those from
            ``vocab_size`` on get no probability and never appear.
        chunk_rows: with ``weight``, rows whose logits exist at a time.
        chunk_bytes: with ``weight``, memory for the float32 logits of a chunk, instead of
            ``chunk_rows``. Default: a quarter of what all logits would take, but 64 to 512 MB.
        backend: ``native``, ``triton`` or ``reference``; ``None`` chooses. A named backend never
            falls back to another one.

    Returns:
        :class:`TopK`: ``ids`` ``[..., k]`` int64, ``logprobs`` ``[..., k]`` and ``tail`` ``[...]``,
        float32 (float64 for float64 input). None of them requires grad, whatever ``x`` and
        ``weight`` do: a teacher's classes are constants.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument.
        TypeError: dtypes that do not fit.
        NotImplementedError: the named backend cannot run this call.

    Note:
        Arithmetic is float32 (float64 for float64), also of the logits that a 16-bit head gives.
        The order is that of the logits as they are given, equal ones by id, so that every backend
        finds the same ids. Logits of ``-inf`` are masked classes: they never appear, and a row with
        fewer than k others ends in entries of id -1 and log-probability -inf. The tail is summed,
        not taken as a difference to 1: a tail of 1e-9 has as many right digits as one of 0.1. A row
        that holds NaN has NaN for its tail, no finite log-probability, and any ids. On a GPU k is
        at most 1024, beyond that the reference runs.

    Example:
        >>> import kdkernels, torch
        >>> top = kdkernels.topk_logprobs(torch.tensor([[0.0, 2.0, 1.0, -1.0]]), 2)
        >>> top.ids.tolist(), round(top.logprobs[0, 0].exp().item(), 4), round(top.tail.item(), 4)
        ([[1, 2]], 0.6439, 0.1192)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{_LOGPROBS}: x must be a Tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] == 0:
        kind = "[..., vocab]" if weight is None else "[..., width]"
        raise ValueError(f"{_LOGPROBS}: x must be {kind}, got shape {list(x.shape)}")
    _integer("k", k)
    spec = _logprobs_spec(temperature, logit_scale, softcap, vocab_size)
    rows = x.reshape(-1, x.shape[-1])
    if weight is None:
        for name, value in (
            ("bias", bias),
            ("chunk_rows", chunk_rows),
            ("chunk_bytes", chunk_bytes),
        ):
            if value is not None:
                raise ValueError(f"{_LOGPROBS}: {name} must not be given without weight")
        ids, logprobs, tail = logprobs_op.topk_logprobs(rows, k, spec, backend=backend)
    else:
        if chunk_rows is not None:
            _integer("chunk_rows", chunk_rows)
        columns = weight.shape[0] if vocab_size is None else vocab_size
        chunk_rows = chunk_rows_of(_LOGPROBS, chunk_rows, chunk_bytes, rows.shape[0], columns, 1)
        ids, logprobs, tail = logprobs_op.linear_topk_logprobs(
            rows, weight, bias, k, spec, chunk_rows=chunk_rows, backend=backend
        )
    leading = x.shape[:-1]
    return TopK(ids.view(*leading, k), logprobs.view(*leading, k), tail.view(leading))


def _integer(argument: str, value: object) -> None:
    """A Python integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{_LOGPROBS}: {argument} must be an integer of at least 1, got {value!r}")


def _logprobs_spec(
    temperature: float, logit_scale: float, softcap: float | None, vocab_size: int | None
) -> logprobs_op.Spec:
    positive(_LOGPROBS, "temperature", temperature)
    positive(_LOGPROBS, "logit_scale", logit_scale)
    if softcap is not None:
        positive(_LOGPROBS, "softcap", softcap)
    if vocab_size is not None:
        _integer("vocab_size", vocab_size)
    return logprobs_op.Spec(
        temperature=float(temperature),
        scale=float(logit_scale),
        softcap=float(softcap or 0.0),
        classes=-1 if vocab_size is None else vocab_size,
    )
