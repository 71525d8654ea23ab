"""How much a student is to learn of each example from its teacher (Meta-KD)."""

from __future__ import annotations

import math

from torch import Tensor

from kdkernels.api.methods import meta_states as states

__all__ = ["expertise_weights"]


def expertise_weights(
    teacher_logits: Tensor, labels: Tensor, scores: Tensor | None = None
) -> Tensor:
    r"""How much each example of a domain is to be learned from its teacher (Meta-KD).

    ``weight = (1 + t) / (exp((1 - p)^2) + 1)`` with ``p`` the teacher's probability of the label
    and ``t`` the example's prototype score: large where the teacher is right and the example
    typical. Without ``t`` it lies between 0.269 and 0.5.

    Args:
        teacher_logits: ``[batch, classes]``, any floating dtype.
        labels: ``[batch]`` integers in ``[0, classes)``.
        scores: ``[batch]``, ``t``, at least -1 (:func:`kdkernels.prototype_scores`); ``None``: 0
            for each.

    Returns:
        ``[batch]``, without a graph; float64 for float64 logits, else float32.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: shapes or values that do not fit. On a GPU values are not looked at: a label
            out of range gives NaN.

    Source: Pan et al., "Meta-KD: A Meta Knowledge Distillation Framework for Language Model
    Compression across Domains", 2021.

    Example:
        >>> import kdkernels, torch
        >>> logits = torch.tensor([[9.0, -9.0], [9.0, -9.0]])
        >>> kdkernels.expertise_weights(logits, torch.tensor([0, 1]))
        tensor([0.5000, 0.2689])
    """
    name = "expertise_weights"
    for which, x in (("teacher_logits", teacher_logits), ("labels", labels)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: {which} must be a Tensor, got {type(x).__name__}")
    if teacher_logits.dim() != 2 or teacher_logits.shape[1] < 2:
        raise ValueError(
            f"{name}: teacher_logits must be [batch, classes] of 2 classes or more, got "
            f"{list(teacher_logits.shape)}"
        )
    if labels.is_floating_point() or labels.shape != teacher_logits.shape[:1]:
        raise ValueError(
            f"{name}: labels must be {len(teacher_logits)} integers, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    classes = teacher_logits.shape[1]
    known = (labels >= 0) & (labels < classes)
    if labels.device.type == "cpu" and not bool(known.all()):
        bad = labels[~known][0].item()
        raise ValueError(f"{name}: labels must lie in [0, {classes}), got {bad}")
    scores = states.checked_scores(name, scores, labels)
    if scores is not None and scores.device.type == "cpu" and bool((scores < -1).any()):
        raise ValueError(f"{name}: scores must be -1 or more, got {scores.min().item():g}")
    probabilities = states.wide(teacher_logits.detach()).softmax(-1)
    right = probabilities.gather(1, labels.long().clamp(0, classes - 1)[:, None])[:, 0]
    typical = 1.0 if scores is None else 1.0 + scores.to(right.dtype)
    weights: Tensor = typical / (((1.0 - right) ** 2).exp() + 1.0)
    return weights.masked_fill(~known, math.nan)
