"""Recipes: published ways to distil an encoder from its states, in their task-specific form.

Where a paper also distils on a general corpus before the task, that is left out here: the student
starts from the teacher's own layers (or is the user's), and learns on the transfer texts alone.
Labels are used by none, so that every recipe and plain soft labels see the same.

A recipe says what it needs of the two models and adds up losses; the losses themselves are
:mod:`~kdkernels.api.distill.recipes_fused` or, to compare, ``recipes_eager``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

import kdkernels
from kdkernels.api.distill.errors import DistillError

SOFT = "soft"
Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Shape:
    """What a recipe must know of a model."""

    layers: int
    width: int
    heads: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Of a transformers configuration; raises ``DistillError`` if it does not tell."""
        try:
            return cls(config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
        except AttributeError as error:
            raise DistillError(
                "recipes must know layers, width and heads of a model, got a configuration "
                f"{type(config).__name__} that does not tell: {error}"
            ) from error


@dataclass(frozen=True)
class Options:
    """What of a run's configuration recipes use."""

    temperature: float = 2.0
    train_embeddings: bool = False


@dataclass(frozen=True)
class States:
    """What one forward pass left.

    Attributes:
        logits: fp32 ``[batch, classes]``.
        hidden: ``[batch, sequence, width]`` by layer, 0 the output of the embedding.
        attention: Outputs of the query and key (and value) projections of a layer, each ``[batch,
            sequence, width]``, by layer from 1.
    """

    logits: Tensor
    hidden: Mapping[int, Tensor]
    attention: Mapping[int, tuple[Tensor, ...]]


class Losses(Protocol):
    """The losses that recipes are made of; means are over tokens that count."""

    def soft_labels(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """``T^2 KL(teacher || student)`` of logits ``[batch, classes]``, mean over the batch."""

    def match_hidden(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        kind: str,
        mask: Tensor | None,
        projections: Sequence[nn.Linear | None],
    ) -> Tensor:
        """Sum over pairs of the ``mse``, ``cosine`` or ``pkd`` distance of hidden states."""

    def match_attention(
        self,
        pairs: Sequence[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
        mask: Tensor,
        heads: tuple[int, int],
        head_map: Sequence[int] | None,
    ) -> Tensor:
        """Sum over pairs of the mean squared difference of attention scores, from (q, k)."""

    def match_relations(
        self, pairs: Sequence[tuple[Tensor, Tensor]], mask: Tensor, heads: int
    ) -> Tensor:
        """Sum over pairs of the KL divergence of self-relations."""


class SoftLabels:
    """Soft labels alone (Hinton et al. 2015, arXiv 1503.02531): what recipes are compared with.

    Attributes:
        name: As the user types it.
        title: For people.
        stages: How many parts the training has; each has its own optimizer and schedule, and all
            together the steps of the other recipes. The last one trains on soft labels.
        hidden: Pairs (student layer, teacher layer) of hidden states that it uses.
        attention: The same of queries, keys and values.
        kinds: Which of ``q``, ``k``, ``v``.
        projections: Trained beside the student, never saved with it.
    """

    name = SOFT
    title = "soft labels"
    stages = 1

    def __init__(self, student: Shape, teacher: Shape, options: Options) -> None:
        """Args: the two models, the run's options; raises ``DistillError`` if they do not fit."""
        self.options = options
        self.hidden: Pairs = []
        self.attention: Pairs = []
        self.kinds: tuple[str, ...] = ()
        self.projections: Any = nn.ModuleList()
        self._prepare(student, teacher)

    def _prepare(self, student: Shape, teacher: Shape) -> None:
        pass

    def loss(
        self, stage: int, student: States, teacher: States, mask: Tensor, losses: Losses
    ) -> Tensor:
        """The loss of a batch; ``mask`` is bool ``[batch, sequence]``, tokens that count."""
        return losses.soft_labels(student.logits, teacher.logits, self.options.temperature)

    def _hidden(self, student: States, teacher: States) -> list[tuple[Tensor, Tensor]]:
        return [(student.hidden[s], teacher.hidden[t]) for s, t in self.hidden]

    def _project(self, student: Shape, teacher: Shape) -> kdkernels.Projections:
        """One map for all pairs where the widths differ, none where they agree.

        The students of a run that have the teacher's width were cut from it, and use it as the
        teacher does.
        """
        count = len(self.hidden)
        return kdkernels.Projections(
            [student.width] * count, [teacher.width] * count, share=True, skip_equal=True
        )


class DistilBert(SoftLabels):
    """DistilBERT (Sanh et al. 2019, arXiv 1910.01108), on the task.

    ``5 T^2 KL(soft labels) + (1 - cos)`` of the last hidden states, over tokens that are no
    padding. The paper adds 2 x masked language modelling, which a classifier has no head for. A
    student of another width gets a projection, which the paper has none of.
    """

    name = "distilbert"
    title = "DistilBERT"
    SOFT_WEIGHT = 5.0

    def _prepare(self, student: Shape, teacher: Shape) -> None:
        self.hidden = [(student.layers, teacher.layers)]
        self.projections = self._project(student, teacher)

    def loss(
        self, stage: int, student: States, teacher: States, mask: Tensor, losses: Losses
    ) -> Tensor:
        """See the class."""
        soft = super().loss(stage, student, teacher, mask, losses)
        pairs = self._hidden(student, teacher)
        cosine = losses.match_hidden(pairs, "cosine", mask, list(self.projections))
        return self.SOFT_WEIGHT * soft + cosine


class Pkd(SoftLabels):
    """Patient knowledge distillation (Sun et al. 2019, arXiv 1908.09355), "PKD-skip".

    ``T^2 KL(soft labels) + beta`` x the mean squared difference of the normalised states of the
    first token ([CLS]), mean over the student's layers but the last, each with the teacher's layer
    at the same share of the depth. The paper mixes in labels; here there are none. A student of
    another width gets a projection, which the paper has none of.
    """

    name = "pkd"
    title = "PKD"
    # Demo, dev accuracy, seed 0, at 10, 100 and 1000: 76.70, 76.70, 76.81 % (soft labels alone:
    # 76.70; one text is 0.11). The paper sweeps 10 to 1000.
    BETA = 1000.0

    def _prepare(self, student: Shape, teacher: Shape) -> None:
        # The last layer's [CLS] is what the soft labels are computed from.
        self.hidden = _uniform(self.name, student, teacher)[:-1]
        if not self.hidden:
            raise DistillError(
                f"student must have at least 2 layers for {self.name}, which leaves the last one "
                f"out, got {student.layers}"
            )
        self.projections = self._project(student, teacher)

    def loss(
        self, stage: int, student: States, teacher: States, mask: Tensor, losses: Losses
    ) -> Tensor:
        """See the class."""
        soft = super().loss(stage, student, teacher, mask, losses)
        pairs = [(s[:, 0], t[:, 0]) for s, t in self._hidden(student, teacher)]
        matched = losses.match_hidden(pairs, "pkd", None, list(self.projections))
        return soft + self.BETA / len(pairs) * matched


class TinyBert(SoftLabels):
    """TinyBERT (Jiao et al. 2020, arXiv 1909.10351), its task-specific distillation.

    Stage 1: mean squared error of hidden states (through one shared projection where the widths
    differ) and of attention scores before the softmax, of every student layer and the teacher's
    layer at the same share of the depth; also of the embeddings if they are trained. Stage 2: soft
    labels. The paper distils on a general corpus before, and on augmented texts.

    With other numbers of heads, student head ``h`` of ``S`` learns from head ``h T // S`` of ``T``.
    """

    name = "tinybert"
    title = "TinyBERT"
    stages = 2

    def _prepare(self, student: Shape, teacher: Shape) -> None:
        layers = _uniform(self.name, student, teacher)
        # Frozen embeddings have nothing to learn.
        self.hidden = [(0, 0), *layers] if self.options.train_embeddings else layers
        self.attention, self.kinds = layers, ("q", "k")
        self.projections = self._project(student, teacher)
        self._heads = student.heads, teacher.heads
        self._head_map = None
        if student.heads != teacher.heads:
            heads = range(student.heads)
            self._head_map = [head * teacher.heads // student.heads for head in heads]

    def loss(
        self, stage: int, student: States, teacher: States, mask: Tensor, losses: Losses
    ) -> Tensor:
        """See the class."""
        if stage == 1:
            return super().loss(stage, student, teacher, mask, losses)
        pairs = self._hidden(student, teacher)
        hidden = losses.match_hidden(pairs, "mse", mask, list(self.projections))
        maps = [(student.attention[s], teacher.attention[t]) for s, t in self.attention]
        return hidden + losses.match_attention(maps, mask, self._heads, self._head_map)


class MiniLm(SoftLabels):
    """MiniLMv2 (Wang et al. 2021, arXiv 2012.15828; MiniLM: arXiv 2002.10957), on the task.

    Stage 1: KL divergence of the relations between tokens, softmax of the scaled products of
    queries with queries, keys with keys and values with values, of the last layers. Stage 2: soft
    labels. The paper trains stage 1 on a general corpus and then fine-tunes on labels.

    As many relation heads as the teacher has attention heads, or fewer so that they divide both
    widths; the models' widths and heads may differ.
    """

    name = "minilm"
    title = "MiniLM"
    stages = 2

    def _prepare(self, student: Shape, teacher: Shape) -> None:
        self.attention, self.kinds = [(student.layers, teacher.layers)], ("q", "k", "v")
        shared = math.gcd(student.width, teacher.width)
        self._heads = max(h for h in range(1, teacher.heads + 1) if shared % h == 0)

    def loss(
        self, stage: int, student: States, teacher: States, mask: Tensor, losses: Losses
    ) -> Tensor:
        """See the class."""
        if stage == 1:
            return super().loss(stage, student, teacher, mask, losses)
        ((s, t),) = self.attention
        pairs = list(zip(student.attention[s], teacher.attention[t], strict=True))
        return losses.match_relations(pairs, mask, self._heads)


# Arms of a run by name, the baseline first.
ARMS: dict[str, type[SoftLabels]] = {
    arm.name: arm for arm in (SoftLabels, TinyBert, Pkd, MiniLm, DistilBert)
}


def _uniform(name: str, student: Shape, teacher: Shape) -> list[tuple[int, int]]:
    """Pairs of layers at the same share of the depth."""
    if student.layers > teacher.layers:
        raise DistillError(
            f"student must have at most the teacher's {teacher.layers} layers for {name}, got "
            f"{student.layers}"
        )
    return kdkernels.LayerMap("uniform").pairs(student.layers, teacher.layers)
