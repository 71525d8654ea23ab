"""The losses of the recipes as they are usually written in PyTorch, to compare with.

Attention maps and relations are made in full from the same queries and keys. (Users mostly take
maps from ``output_attentions``, which in addition keeps the models from fused attention.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def soft_labels(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """See :class:`~kdkernels.api.distill.recipes.Losses`."""
    log_student = F.log_softmax(student / temperature, -1)
    target = F.softmax(teacher / temperature, -1)
    return temperature**2 * F.kl_div(log_student, target, reduction="batchmean")


def match_hidden(
    pairs: Sequence[tuple[Tensor, Tensor]],
    kind: str,
    mask: Tensor | None,
    projections: Sequence[nn.Linear | None],
) -> Tensor:
    """Tokens that count are selected, one pair after the other."""
    total = pairs[0][0].new_zeros(())
    for (student, teacher), projection in zip(pairs, projections, strict=True):
        if mask is not None:
            student, teacher = student[mask], teacher[mask]
        if projection is not None:
            student = projection(student)
        student, teacher = student.float(), teacher.float()
        if kind == "cosine":
            same = torch.ones(len(student), device=student.device)
            total = total + F.cosine_embedding_loss(student, teacher, same)
        elif kind == "pkd":
            total = total + F.mse_loss(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1))
        else:
            total = total + F.mse_loss(student, teacher)
    return total


def match_attention(
    pairs: Sequence[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    mask: Tensor,
    heads: tuple[int, int],
    head_map: Sequence[int] | None,
) -> Tensor:
    """Scores ``[batch, heads, sequence, sequence]`` of both models."""
    seen = mask[:, None, :, None] & mask[:, None, None, :]
    keys = mask.sum(-1)[:, None, None]
    total = mask.new_zeros((), dtype=torch.float32)
    for student, teacher in pairs:
        scores = _scores(student[0], student[1], heads[0])
        target = _scores(teacher[0], teacher[1], heads[1])
        if head_map is not None:
            target = target[:, list(head_map)]
        difference = (scores - target).masked_fill(~seen, 0.0)
        rows = difference.square().sum(-1) / keys
        total = total + rows.sum() / (heads[0] * mask.sum())
    return total


def match_relations(pairs: Sequence[tuple[Tensor, Tensor]], mask: Tensor, heads: int) -> Tensor:
    """Relations ``[batch, heads, sequence, sequence]`` of both models."""
    hidden = ~mask[:, None, None, :]
    total = mask.new_zeros((), dtype=torch.float32)
    for student, teacher in pairs:
        relation = _scores(student, student, heads).masked_fill(hidden, -1e9)
        target = _scores(teacher, teacher, heads).masked_fill(hidden, -1e9)
        log_student, target = F.log_softmax(relation, -1), F.softmax(target, -1)
        rows = F.kl_div(log_student, target, reduction="none").sum(-1)
        total = total + (rows * mask[:, None]).sum() / (heads * mask.sum())
    return total


def _scores(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Scaled products in float32: those of two models differ by less than bfloat16 tells."""
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys))
    return (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
