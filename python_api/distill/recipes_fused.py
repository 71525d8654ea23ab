"""The losses of the recipes, by kdkernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import kdkernels


def soft_labels(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """See :class:`~kdkernels.api.distill.recipes.Losses`."""
    loss: Tensor = kdkernels.kd_loss(
        student, teacher, temperature=temperature, ce_weight=0.0, kd_weight=1.0
    )
    return loss


def match_hidden(
    pairs: Sequence[tuple[Tensor, Tensor]],
    kind: str,
    mask: Tensor | None,
    projections: Sequence[nn.Linear | None],
) -> Tensor:
    """All pairs in one launch; a projection's output exists for a chunk of tokens at a time."""
    loss: Tensor = kdkernels.hidden_match_many(pairs, kind=kind, mask=mask, projections=projections)
    return loss


def match_attention(
    pairs: Sequence[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    mask: Tensor,
    heads: tuple[int, int],
    head_map: Sequence[int] | None,
) -> Tensor:
    """Straight from queries and keys: no map is stored."""
    losses = [
        kdkernels.attention_match_loss(
            (student[0], student[1]),
            (teacher[0], teacher[1]),
            mask=mask,
            student_heads=heads[0],
            teacher_heads=heads[1],
            head_map=head_map,
        )
        for student, teacher in pairs
    ]
    return _sum(losses)


def match_relations(pairs: Sequence[tuple[Tensor, Tensor]], mask: Tensor, heads: int) -> Tensor:
    """No relation is stored."""
    return _sum(
        [
            kdkernels.relation_match_loss(student, teacher, num_relation_heads=heads, mask=mask)
            for student, teacher in pairs
        ]
    )


def _sum(losses: Sequence[Tensor]) -> Tensor:
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total
