"""What can be set of a distillation, by itself or among the arguments of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from kdkernels.api._spec import choice, number
from kdkernels.api.functional import kd_loss
from kdkernels.api.hidden import KINDS
from kdkernels.api.layers import LayerMap

__all__ = ["DistillArguments", "DistillOptions"]

ROUTES = ("auto", "hidden", "logits")


@dataclass
class DistillOptions:
    """The loss of a distilled student, per row (token or text) that has a label.

    ``(1 - alpha) CE + alpha T^2 D(teacher, student) + hidden_weight * distance of hidden states``;
    see :func:`kdkernels.kd_loss`. A dataclass that mixes with any arguments of a Trainer:
    ``@dataclass class Arguments(DistillOptions, SFTConfig)``.

    Args:
        temperature: ``T > 0`` of the divergence.
        alpha: weight of the divergence, ``1 - alpha`` that of cross-entropy. Default: 0.5 with a
            teacher and labels, 1 without labels, 0 without a teacher.
        ce_weight: weight of cross-entropy; together with ``kd_weight``, instead of ``alpha``.
        kd_weight: weight of the divergence; together with ``ce_weight``.
        divergence: ``forward_kl``, ``soft_ce``, ``reverse_kl``, ``jsd`` or ``tvd``; with a teacher
            cache ``forward_kl`` or ``reverse_kl``.
        beta: teacher's weight in ``jsd``.
        scale_t2: multiply the divergence by ``temperature ** 2``.
        smoothing: label smoothing of cross-entropy. (``label_smoothing_factor`` is the Trainer's
            own, and is refused.)
        z_loss: weight of the squared log-partition of the student.
        vocab_size: real classes of padded heads, which may then differ in size.
        tail: what a cached teacher's mass outside of its list means, as in
            :func:`kdkernels.topk_kd_loss`.
        chunk_bytes: memory for the logits of a chunk on the hidden-state route.
        route: ``hidden``: the loss from hidden states and heads, logits exist for a chunk of tokens
            at a time. ``logits``: from the logits of both models. ``auto``: ``hidden`` for causal
            and sequence-to-sequence language models, ``logits`` for all others.
        hidden_weight: weight of the hidden-state term; 0 leaves it out.
        hidden_kind: ``mse``, ``smooth_l1``, ``cosine`` or ``pkd``.
        hidden_layers: which student layer learns from which teacher layer: ``uniform``, ``last``,
            ``first``, or pairs such as ``1:4,2:8``, counting from 1.
        hidden_projection: a learned projection for each pair also where the widths agree; where
            they differ there is one in any case.

    Raises:
        ValueError: values out of their ranges.
        TypeError: values of a wrong type.

    Example:
        >>> from kdkernels.api.hf import DistillOptions
        >>> DistillOptions(temperature=2.0, alpha=0.9, hidden_layers="1:4,2:8").layer_map().rule
        ((1, 4), (2, 8))
    """

    temperature: float = 1.0
    alpha: float | None = None
    ce_weight: float | None = None
    kd_weight: float | None = None
    divergence: str = "forward_kl"
    beta: float = 0.5
    scale_t2: bool = True
    smoothing: float = 0.0
    z_loss: float = 0.0
    vocab_size: int | None = None
    tail: str = "bucket"
    chunk_bytes: int | None = None
    route: str = "auto"
    hidden_weight: float = 0.0
    hidden_kind: str = "mse"
    hidden_layers: str = "uniform"
    hidden_projection: bool = False

    def __post_init__(self) -> None:
        # The arguments of a training, where it is mixed with them, have one of their own.
        after: Any = getattr(super(), "__post_init__", None)
        if after is not None:
            after()
        name = "DistillOptions"
        choice(name, "route", self.route, ROUTES)
        choice(name, "hidden_kind", self.hidden_kind, tuple(KINDS))
        number(name, "hidden_weight", self.hidden_weight, 0.0, math.inf)
        self.layer_map()
        # The loss checks what is its own; better now than in the first step.
        logits = torch.zeros(1, 2)
        kd_loss(logits, logits, torch.zeros(1, dtype=torch.int64), **self.loss_keywords())

    def loss_keywords(self) -> dict[str, Any]:
        """Keywords of :func:`kdkernels.kd_loss`, those that depend on the models left out."""
        return {
            "temperature": self.temperature,
            "alpha": self.alpha,
            "ce_weight": self.ce_weight,
            "kd_weight": self.kd_weight,
            "divergence": self.divergence,
            "beta": self.beta,
            "scale_t2": self.scale_t2,
            "label_smoothing": self.smoothing,
            "z_loss": self.z_loss,
        }

    def layer_map(self) -> LayerMap:
        """``hidden_layers`` as the object that pairs layers."""
        if ":" not in self.hidden_layers:
            return LayerMap(self.hidden_layers)
        try:
            pairs = [
                (int(student), int(teacher))
                for student, teacher in (pair.split(":") for pair in self.hidden_layers.split(","))
            ]
        except ValueError:
            raise ValueError(
                "DistillOptions: hidden_layers must be a rule or pairs such as '1:4,2:8', got "
                f"{self.hidden_layers!r}"
            ) from None
        if min(min(pair) for pair in pairs) < 1:
            raise ValueError(
                "DistillOptions: hidden_layers must count layers from 1, got "
                f"{self.hidden_layers!r}"
            )
        return LayerMap(pairs)


@dataclass
class DistillArguments(DistillOptions, TrainingArguments):
    """``transformers.TrainingArguments`` with the fields of :class:`DistillOptions`.

    Example:
        >>> from kdkernels.api.hf import DistillArguments
        >>> arguments = DistillArguments(output_dir="runs", temperature=2.0, report_to=[])
        >>> arguments.temperature, arguments.learning_rate
        (2.0, 5e-05)
    """
