"""``topk_logprobs``: the sparse form of a teacher's distribution."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kdkernels.api._spec import positive
from kdkernels.ops import topk_logprobs as op
from kdkernels.ops.linear_kd_loss import plan_chunk_rows
from kdkernels.ops.topk_logprobs import Spec

_NAME = "topk_logprobs"


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
        raise TypeError(f"{_NAME}: x must be a Tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] == 0:
        kind = "[..., vocab]" if weight is None else "[..., width]"
        raise ValueError(f"{_NAME}: x must be {kind}, got shape {list(x.shape)}")
    _integer("k", k)
    spec = _spec(temperature, logit_scale, softcap, vocab_size)
    rows = x.reshape(-1, x.shape[-1])
    if weight is None:
        for name, value in (
            ("bias", bias),
            ("chunk_rows", chunk_rows),
            ("chunk_bytes", chunk_bytes),
        ):
            if value is not None:
                raise ValueError(f"{_NAME}: {name} must not be given without weight")
        ids, logprobs, tail = op.topk_logprobs(rows, k, spec, backend=backend)
    else:
        chunk_rows = _chunk_rows(rows, weight, vocab_size, chunk_rows, chunk_bytes)
        ids, logprobs, tail = op.linear_topk_logprobs(
            rows, weight, bias, k, spec, chunk_rows=chunk_rows, backend=backend
        )
    leading = x.shape[:-1]
    return TopK(ids.view(*leading, k), logprobs.view(*leading, k), tail.view(leading))


def _integer(argument: str, value: object) -> None:
    """A Python integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{_NAME}: {argument} must be an integer of at least 1, got {value!r}")


def _spec(
    temperature: float, logit_scale: float, softcap: float | None, vocab_size: int | None
) -> Spec:
    positive(_NAME, "temperature", temperature)
    positive(_NAME, "logit_scale", logit_scale)
    if softcap is not None:
        positive(_NAME, "softcap", softcap)
    if vocab_size is not None:
        _integer("vocab_size", vocab_size)
    return Spec(
        temperature=float(temperature),
        scale=float(logit_scale),
        softcap=float(softcap or 0.0),
        classes=-1 if vocab_size is None else vocab_size,
    )


def _chunk_rows(
    rows: Tensor,
    weight: Tensor,
    vocab_size: int | None,
    chunk_rows: int | None,
    chunk_bytes: int | None,
) -> int | None:
    if chunk_rows is not None:
        _integer("chunk_rows", chunk_rows)
    if chunk_bytes is None:
        return chunk_rows
    if chunk_rows is not None:
        raise ValueError(f"{_NAME}: chunk_rows must not be given together with chunk_bytes")
    positive(_NAME, "chunk_bytes", chunk_bytes)
    columns = weight.shape[0] if vocab_size is None else vocab_size
    return plan_chunk_rows(rows.shape[0], columns, models=1, budget=int(chunk_bytes))
