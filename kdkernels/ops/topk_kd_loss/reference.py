"""The definition of ``topk_kd_loss`` in PyTorch: what every kernel is judged against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdkernels.ops.kd_loss.reference import reduced_rows
from kdkernels.ops.kd_loss.spec import Divergence, Spec, Tail

# The least tail mass in reverse KL: what is left of 1 - sum p is known no better in float32, and
# without any the divergence would be infinite.
LEAST_TAIL = 2.0**-24


def topk_kd_loss_reference(
    student: Tensor,  # [rows, columns >= spec.classes]
    topk_ids: Tensor,  # [rows, k] int64
    topk_logprobs: Tensor,  # [rows, k]
    labels: Tensor | None,  # [rows] int64
    row_weights: Tensor | None,  # [rows]
    denominator: Tensor | None,  # []
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(loss [], parts [4], rows [rows])``; see ``op.py`` for the contract."""

    def divergence(z: Tensor, valid: Tensor) -> Tensor:
        return _divergence(z, topk_ids, topk_logprobs.to(z.dtype), valid, spec)

    return reduced_rows(student, labels, row_weights, denominator, spec, divergence)


def _divergence(z: Tensor, ids: Tensor, log_p: Tensor, valid: Tensor, spec: Spec) -> Tensor:
    classes = z.shape[1]
    inside = (ids >= 0) & (ids < classes)
    entry = inside & _first(ids) & valid[:, None]
    wrong = (~inside & (ids != -1)).any(1) & valid
    log_y = (z / spec.temperature).log_softmax(1)
    log_q = log_y.gather(1, torch.where(entry, ids, 0))

    # The teacher: its listed mass, never above 1, and what is left of it.
    log_p = torch.where(entry, log_p, -torch.inf)
    mass = log_p.exp().sum(1)
    log_p = log_p - mass.clamp(min=1.0).log()[:, None]
    rest = torch.where(entry.sum(1) < classes, (1.0 - mass).clamp(min=0.0), 0.0)

    # The student outside of the list.
    listed = torch.zeros_like(z, dtype=torch.bool)
    listed = torch.nn.functional.pad(listed, (0, 1)).scatter(1, ids.where(entry, classes), True)
    outside = ~listed[:, :classes] & (z > -torch.inf)

    reverse = spec.divergence == Divergence.REVERSE_KL.value
    if spec.tail == Tail.RENORM.value:
        log_p = log_p.log_softmax(1)
        log_q = torch.where(entry, log_q, -torch.inf)
        log_q = log_q - _logsumexp(log_q)[:, None]
    from_log, to_log = (log_q, log_p) if reverse else (log_p, log_q)
    value = _terms(from_log, to_log, entry)
    if spec.tail == Tail.BUCKET.value:
        log_tail = _logsumexp(log_y.masked_fill(~outside, -torch.inf))[:, None]
        known = rest.clamp(min=LEAST_TAIL if reverse else 0.0)[:, None].log()
        pair = (log_tail, known) if reverse else (known, log_tail)
        value = value + _terms(*pair, torch.ones_like(entry[:, :1]))
    if spec.tail == Tail.UNIFORM.value:
        known = rest.clamp(min=LEAST_TAIL if reverse else 0.0)
        each = (known.log() - outside.sum(1).clamp(min=1).log())[:, None].expand_as(z)
        pair = (log_y, each) if reverse else (each, log_y)
        value = value + _terms(*pair, outside)
        if not reverse:  # mass that no live class can take
            value = value.masked_fill((rest > 0) & ~outside.any(1), math.inf)
    return torch.where(wrong, math.nan, 1.0) * value


def _first(ids: Tensor) -> Tensor:
    """Whether an id is not a repetition of one before it in its row."""
    order = ids.argsort(dim=1, stable=True)
    ordered = ids.gather(1, order)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ~torch.zeros_like(repeated).scatter(1, order, repeated)


def _terms(from_log: Tensor, to_log: Tensor, where: Tensor) -> Tensor:
    """Sum of ``p (log p - log q)`` over the classes with mass."""
    where = where & (from_log > -torch.inf)
    # The inner where keeps 0 * inf out of the backward pass too.
    p = torch.where(where, from_log, 0.0).exp()
    difference = torch.where(where, from_log, 0.0) - torch.where(where, to_log, 0.0)
    return torch.where(where, p * difference, 0.0).sum(1)


def _logsumexp(x: Tensor) -> Tensor:
    """``x.logsumexp(1)``, whose gradient is NaN for a row of -inf."""
    some = (x > -torch.inf).any(1)
    return torch.where(some, torch.where(some[:, None], x, 0.0).logsumexp(1), -torch.inf)
