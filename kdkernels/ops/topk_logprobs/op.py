"""The contract of ``topk_logprobs``: primitives, fakes, backend support.

Layers above (``kdkernels.api``) bring leading dimensions and checked numbers; here everything is
``[rows, classes]``. Nothing is differentiated: a teacher's top classes are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels import _backend, _checks, _native, _triton
from kdkernels._op import Primitive, transforms_active
from kdkernels.ops._shared.chunks import Head, accumulate
from kdkernels.ops._shared.linear_loss import autocast, plan_chunk_rows
from kdkernels.ops.topk_logprobs.reference import (
    linear_topk_logprobs_reference,
    topk_logprobs_reference,
)
from kdkernels.ops.topk_logprobs.spec import Spec

# What a block of GPU threads selects and sorts in its shared memory.
MOST_ON_GPU = 1024

_RESULT = "(Tensor ids, Tensor logprobs, Tensor tail)"
Result = tuple[Tensor, Tensor, Tensor]


def _fake(x: Tensor, k: int, *args: Any) -> Result:
    rows = x.shape[0]
    return (
        x.new_empty((rows, k), dtype=torch.int64),
        x.new_empty((rows, k), dtype=accumulate(x.dtype)),
        x.new_empty((rows,), dtype=accumulate(x.dtype)),
    )


def _fake_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, *args: Any) -> Result:
    return _fake(hidden, k)


topk_logprobs_rows = Primitive(
    "topk_logprobs", f"(Tensor x, int k, float[] spec) -> {_RESULT}", fake=_fake
)
# From hidden states: GEMMs and the kernel above, chunk by chunk.
topk_logprobs_linear = Primitive(
    "topk_logprobs_linear",
    "(Tensor hidden, Tensor weight, Tensor? bias, int k, float[] spec, int chunk_rows) "
    f"-> {_RESULT}",
    fake=_fake_linear,
    compiled=False,
)


def topk_logprobs(x: Tensor, k: int, spec: Spec, *, backend: str | None = None) -> Result:
    """The k likeliest classes of every row, their log-probabilities, and the mass of the others.

    Args:
        x: logits, ``[rows, columns]``; float32, bfloat16, float16 or (reference) float64; any row
            stride, unit column stride (another layout is copied). No gradient flows to it.
        k: from 1 to the number of classes.
        spec: see :class:`~kdkernels.ops.topk_logprobs.spec.Spec`.
        backend: ``native``, ``triton``, ``reference``, or ``None`` to choose.

    Returns:
        ``ids`` ``[rows, k]`` int64, ``logprobs`` ``[rows, k]`` and ``tail`` ``[rows]``, both
        float32 (float64 for float64 logits).

    Numerics: classes are ordered by their logits as they are given, equal ones by id, so every
    backend finds the same ids. Classes of ``-inf`` never appear: where fewer than k are left, the
    last entries are id -1 and log-probability -inf. The tail is the sum of what it holds, not a
    difference to 1: its relative error is that of the exponentials. A row that holds NaN has
    NaN for its tail and no finite log-probability; its ids are not defined.
    """
    _checks.float_matrix("topk_logprobs", "x", x)
    _check_k(k, spec.classes_of(x.shape[1]), x.shape[1])
    name = _backend.choose("topk_logprobs", x.device.type, backend, partial(unsupported, k=k), x)
    if name == "reference":
        return topk_logprobs_reference(x, k, spec)
    x = x.detach()
    try:
        ids, logprobs, tail = topk_logprobs_rows(
            name, x if x.stride(1) == 1 else x.contiguous(), k, spec
        )
    except RuntimeError as error:
        raise _checks.as_contract("topk_logprobs", error) from None
    return ids, logprobs, tail


def linear_topk_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    spec: Spec,
    *,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Result:
    """As :func:`topk_logprobs` of the logits ``hidden @ weight.T + bias``.

    Args:
        hidden: hidden states, ``[rows, width]``.
        weight: ``[columns, width]``, in the dtype of the hidden states (under autocast both are
            cast to its dtype).
        bias: ``[columns]``.
        k: from 1 to the number of classes.
        spec: see :class:`~kdkernels.ops.topk_logprobs.spec.Spec`.
        chunk_rows: rows whose float32 logits exist at a time; ``None``: see ``plan_chunk_rows``.
        backend: as in :func:`topk_logprobs`.
    """
    op = "topk_logprobs"
    hidden, weight, bias = autocast(hidden, weight, bias)
    device = hidden.device.type
    _checks.float_matrix(op, "x", hidden)
    _checks.head(op, "", hidden, weight, bias)
    classes = spec.classes_of(weight.shape[0])
    _check_k(k, classes, weight.shape[0])
    if chunk_rows is None:
        chunk_rows = plan_chunk_rows(hidden.shape[0], classes, models=1)
    name = _backend.choose(op, device, backend, partial(unsupported, k=k), hidden)
    if name == "reference":
        return linear_topk_logprobs_reference(hidden, weight, bias, k, spec)
    hidden, weight = hidden.detach(), weight.detach()
    bias = None if bias is None else bias.detach()
    try:
        ids, logprobs, tail = topk_logprobs_linear(
            name, hidden, weight, bias, k, spec, max(1, chunk_rows)
        )
    except RuntimeError as error:
        raise _checks.as_contract(op, error) from None
    return ids, logprobs, tail


def unsupported(
    backend: str, x: Tensor, *, k: int | None = None, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call on this tensor; ``None`` when it can.

    ``device`` asks about another device type than that of the tensor.
    """
    if backend == "reference":
        return None
    device = device or x.device.type
    if transforms_active():
        return "torch.func and forward-mode differentiation need the reference"
    if x.dtype == torch.float64:
        return "the kernels take float32, bfloat16 and float16, not float64"
    on_cpu = backend == "native" and device == "cpu"
    if k is not None and k > MOST_ON_GPU and not on_cpu:
        return f"the GPU kernels find at most {MOST_ON_GPU} classes, not {k}"
    if backend == "native":
        return _native.reason(device)
    return _triton.reason(device) if backend == "triton" else None


def attach(backend: str) -> None:
    """Makes a backend of the kernel one of the form that starts from hidden states."""
    topk_logprobs_linear.launcher(backend)(partial(_linear, backend))


def _linear(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    numbers: Sequence[float],
    chunk_rows: int,
) -> Result:
    spec = Spec.of(numbers)
    head = Head(weight, bias, spec.classes_of(weight.shape[0]))
    spec = spec._replace(classes=-1)
    results = _fake(hidden, k)
    for begin in range(0, hidden.shape[0], chunk_rows):
        chunk = slice(begin, begin + chunk_rows)
        logits = head.logits(head.rows(hidden[chunk]))
        found = topk_logprobs_rows(backend, logits, k, spec)
        del logits  # before the next chunk's take their place
        for result, part in zip(results, found, strict=True):
            result[chunk] = part
    return results


def _check_k(k: int, classes: int, columns: int) -> None:
    op = "topk_logprobs"
    if classes > columns:
        raise ValueError(f"{op}: vocab_size must be at most {columns}, got {classes}")
    if k < 1 or k > classes:
        raise ValueError(f"{op}: k must be in [1, {classes}], the number of classes, got {k}")


for _name in ("native", "triton"):
    attach(_name)
