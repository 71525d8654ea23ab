"""The definition of ``relation_match`` in PyTorch: all scores at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.ops.relation_match.spec import Kind, Spec


def relation_match_reference(
    student_q: Tensor,  # [batch, heads, seq, width]
    student_k: Tensor | None,  # [batch, key heads, seq, width]; None: the queries
    teacher_q: Tensor,
    teacher_k: Tensor | None,
    mask: Tensor | None,  # [batch, seq] bool: tokens that count
    row_weights: Tensor | None,  # [batch, 1 or heads, seq]
    denominator: Tensor | None,  # []
    head_map: Sequence[int],  # the teacher's head of each head; empty: the same
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """Returns ``(loss [], rows [batch, heads, seq])``; see ``op.py`` for the contract."""
    dtype = torch.float64 if student_q.dtype == torch.float64 else torch.float32
    batch, heads, seq, _ = student_q.shape
    if mask is None:
        mask = student_q.new_ones((batch, seq), dtype=torch.bool)
    valid = mask[:, None, :]
    blocked = ~mask[:, None, None, :]
    if spec.causal:
        blocked = blocked | mask.new_ones((seq, seq)).triu(1)
    # A row that does not count has no key either: it sees all of them, as zeros.
    blocked = blocked & valid[..., None]
    teacher_heads = head_map or range(heads)
    s = _scores(student_q, student_k, range(heads), mask, dtype) * spec.student_scale
    t = _scores(teacher_q, teacher_k, teacher_heads, mask, dtype) * spec.teacher_scale
    if spec.kind == Kind.KL.value:
        log_s, log_t = (x.masked_fill(blocked, -torch.inf).log_softmax(-1) for x in (s, t))
        # No mass, and no difference of infinities.
        difference = (log_t.masked_fill(blocked, 0.0) - log_s.masked_fill(blocked, 0.0)) * (
            log_t.exp()
        )
        distance = difference.sum(-1)
    else:
        keys = (~blocked).sum(-1)
        distance = (s - t).masked_fill(blocked, 0.0).square().sum(-1) / keys
    weights = distance.new_ones(()) if row_weights is None else row_weights.to(dtype)
    # The weight of a row that does not count may be anything too.
    rows = torch.where(valid, weights, 0.0) * distance
    if denominator is not None:
        divisor = denominator.to(dtype)
    else:
        count = (heads * mask.sum()).to(dtype)
        divisor = count if spec.mean else torch.ones_like(count)
    return rows.sum() / torch.where(divisor == 0, 1.0, divisor), rows


def _scores(
    q: Tensor, k: Tensor | None, heads: Sequence[int], mask: Tensor, dtype: torch.dtype
) -> Tensor:
    k = q if k is None else k
    group = q.shape[1] // k.shape[1]
    # Not multiplied away: a token that does not count may hold anything.
    q, k = (torch.where(mask[:, None, :, None], x.to(dtype), 0.0) for x in (q, k))
    queries = torch.stack([q[:, head] for head in heads], 1)
    keys = torch.stack([k[:, head // group] for head in heads], 1)
    return queries @ keys.transpose(-1, -2)
