"""Meta-KD: the student of one domain, taught by a teacher of all, each example by its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.api import _sites
from kdkernels.api._spec import choice, integer, number, positive
from kdkernels.api.functional import kd_loss
from kdkernels.api.hidden import hidden_match_loss, hidden_match_many
from kdkernels.api.layers import LayerMap, Projections
from kdkernels.api.methods import meta_states as states
from kdkernels.api.methods.expertise import expertise_weights
from kdkernels.api.methods.meta_states import FAITHFUL_TO, Batch, Domains, States, Watched
from kdkernels.api.methods.meta_teacher import DomainKnowledge, MetaTeacher
from kdkernels.api.relations import attention_match_loss

__all__ = ["MetaKD", "MetaKDParts"]

NAME = "MetaKD"
TERMS = ("embedding", "hidden", "attention", "prediction")


class MetaKDParts(NamedTuple):
    """The loss of :class:`MetaKD` and its terms; all but ``loss`` are detached.

    Terms are means over the batch with the examples' weights, without their own; a term that is not
    of the stage, or whose weight is 0, is not computed, and None.
    """

    loss: Tensor
    embedding: Tensor | None
    hidden: Tensor | None
    attention: Tensor | None
    transferable: Tensor | None
    prediction: Tensor | None
    weights: Tensor | None  # [batch], of the examples; None where each is 1


class MetaKD(nn.Module):
    r"""The loss of distilling a :class:`kdkernels.MetaTeacher` into the student of a domain.

    Each example ``i`` has a weight ``l_i`` of its own, :func:`kdkernels.expertise_weights`, and
    terms of its own, means over its tokens that are no padding::

        embedding:     MSE(P s_0, t_0)
        hidden:        sum over layers MSE(P s_j, t_m(j))
        attention:     sum over layers MSE(scores of s_j, scores of t_m(j)), before the softmax
        prediction:    T^2 KL(softmax(teacher / T), softmax(student / T))
        transferable:  MSE(P' known_s, known_t),  known = tanh(W (E[domain] + content) + b)

        loss = mean_i l_i (embedding_i + hidden_i + attention_i + prediction_i
                           + gamma2 transferable_i)

    each term with its weight. As in TinyBERT there are two stages: all but the prediction, then the
    prediction. Embedding and hidden states are one launch; attention comes from queries and keys,
    so the models may use fused attention and no map exists. Weights enter the kernels as row
    weights: an example's weight changes that example's gradient only.

    The module's parameters are what is trained beside the student: the projections ``P`` and
    ``P'`` where the widths differ, and the student's ``E``, ``W`` and ``b`` (the teacher's, to
    begin with, where the widths agree). They are saved by its ``state_dict``, and are no part of
    the student.

    Args:
        student: a sequence classifier of transformers, also wrapped by DistributedDataParallel or
            ``torch.compile``.
        teacher: a :class:`kdkernels.MetaTeacher`; with ``gamma2=0`` any sequence classifier of
            transformers. Runs in eval mode and without gradients, whatever its mode, which it
            keeps.
        stages: 2, or 1: all terms at once.
        weighted: ``False``: every ``l_i`` is 1, labels and scores are not needed. With
            ``gamma2=0`` that is TinyBERT.
        gamma2: weight of the transferable term.
        embedding_weight: weight of this term, like the three that follow.
        hidden_weight: of hidden states.
        attention_weight: of attention scores.
        prediction_weight: of the divergence.
        temperature: ``T``.
        layers: rule of :class:`kdkernels.LayerMap`, or its pairs.
        special_ids: ids of tokens that are no content; ``None``: the teacher's.
        faithful_to: ``paper``, or ``code``: what the released code computes, see below.
        seed: of the projections.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: values out of their ranges; models that do not fit each other; batches that do
            not fit.

    Note:
        ``faithful_to="code"`` is for comparison with the released code. It has the mean of
        ``l_i`` as one factor of the whole batch; means over all positions, padding too, and content
        from all but the first; attention after the softmax (maps are made); ``known`` without the
        tanh; and a prediction stage without weights and without ``T^2``. Its accidents are not
        kept: a teacher in training mode, and a target through a projection that was never trained.

        With other numbers of heads, student head ``h`` of ``S`` learns from head ``h T // S``.
        Scores are compared before rotary embedding in models that have one.

    References:
        Pan et al., Meta-KD, ACL 2021, arXiv 2012.01266; Jiao et al., TinyBERT, arXiv 1909.10351.

    Example:
        >>> import kdkernels, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=32)
        >>> model, student = (
        ...     BertForSequenceClassification(BertConfig(num_hidden_layers=n, **sizes))
        ...     for n in (4, 2)
        ... )
        >>> teacher = kdkernels.MetaTeacher(model, domains=3, special_ids=(1, 2))
        >>> meta_kd = kdkernels.MetaKD(student, teacher)
        >>> optimizer = torch.optim.AdamW([*student.parameters(), *meta_kd.parameters()])
        >>> batch = {
        ...     "input_ids": torch.randint(3, 50, (4, 9)),
        ...     "attention_mask": torch.ones(4, 9, dtype=torch.int64),
        ...     "labels": torch.tensor([0, 1, 1, 0]),
        ... }
        >>> loss = meta_kd(batch, domains=1, scores=torch.rand(4), stage=0)
        >>> loss.backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        stages: int = 2,
        weighted: bool = True,
        gamma2: float = 0.5,
        embedding_weight: float = 1.0,
        hidden_weight: float = 1.0,
        attention_weight: float = 1.0,
        prediction_weight: float = 1.0,
        temperature: float = 2.0,
        layers: str | Sequence[tuple[int, int]] = "uniform",
        special_ids: Sequence[int] | None = None,
        faithful_to: str = "paper",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(stages, bool) or stages not in (1, 2):
            raise ValueError(f"{NAME}: stages must be 1 or 2, got {stages!r}")
        choice(NAME, "faithful_to", faithful_to, FAITHFUL_TO)
        positive(NAME, "temperature", temperature)
        given = (embedding_weight, hidden_weight, attention_weight, prediction_weight)
        self._weights = dict(zip(TERMS, given, strict=True)) | {"transferable": gamma2}
        for key, value in self._weights.items():
            argument = "gamma2" if key == "transferable" else f"{key}_weight"
            number(NAME, argument, value, 0.0, math.inf)
        model = teacher.model if isinstance(teacher, MetaTeacher) else teacher
        for each in (student, model):
            _sites.check_model(NAME, each)
        self.stages, self.weighted, self.temperature = stages, bool(weighted), temperature
        self.faithful_to = faithful_to
        # In a tuple, so that neither is a submodule: this module has what is trained beside.
        self._models = student, teacher
        self._pairs = _layer_pairs(student, model, layers)
        self._heads = tuple(
            _config(who, m).num_attention_heads for who, m in _named(student, model)
        )
        self._head_map = None
        if self._heads[0] != self._heads[1]:
            own, other = self._heads
            self._head_map = [head * other // own for head in range(own)]
        widths = tuple(states.width_of(NAME, who, m) for who, m in _named(student, model))
        self._special_ids = None if special_ids is None else tuple(special_ids)
        with states.drawn_from(seed):
            self._build(student, teacher, widths)
        self._watched = [self._watch(student, model, stage) for stage in range(stages)]

    def _build(self, student: nn.Module, teacher: nn.Module, widths: tuple[int, ...]) -> None:
        """What is trained beside the student."""
        count = len(self._pairs)
        self.projections = Projections(
            [widths[0]] * count, [widths[1]] * count, share=True, skip_equal=True
        )
        self.knowledge: DomainKnowledge | None = None
        self.transfer: nn.Linear | None = None
        if self._weights["transferable"]:
            if not isinstance(teacher, MetaTeacher):
                raise TypeError(
                    f"{NAME}: teacher must be a MetaTeacher unless gamma2 is 0, got "
                    f"{type(teacher).__name__}"
                )
            if self._special_ids is None:
                self._special_ids = teacher.special_ids
            self.knowledge = DomainKnowledge(teacher.domains, widths[0])
            if widths[0] == widths[1]:
                self.knowledge.load_state_dict(teacher.knowledge.state_dict())
            else:
                self.transfer = nn.Linear(widths[0], widths[1])
        like = next(student.parameters())
        self.to(like.device, like.dtype)

    def _watch(self, student: nn.Module, teacher: nn.Module, stage: int) -> list[Watched]:
        """What is looked at in both models in a stage."""
        w = self._weights
        hidden, attention = [], []
        if self._of("hidden", stage):
            hidden = [p for p in self._pairs if w["hidden" if p[0] else "embedding"]]
            attention = [p for p in self._pairs if p[0]] if w["attention"] else []
        last = self._of("transferable", stage) and bool(w["transferable"])
        return [
            Watched(NAME, who, m, [p[i] for p in hidden], [p[i] for p in attention], last)
            for i, (who, m) in enumerate(_named(student, teacher))
        ]

    def _of(self, term: str, stage: int) -> bool:
        """Whether a term is of a stage."""
        return self.stages == 1 or (term == "prediction") == (stage == 1)

    def forward(
        self,
        batch: Batch,
        domains: Domains | None = None,
        scores: Tensor | None = None,
        *,
        stage: int = 0,
        return_parts: bool = False,
    ) -> Any:  # a Tensor, or MetaKDParts
        """The loss of a batch.

        Args:
            batch: what the models take (``input_ids``, ``attention_mask``, ...); ``labels``,
                ``[batch]``, where there are weights; perhaps ``special_tokens_mask``.
            domains: the domain, or that of each example, ``[batch]``; -1: one that the teacher was
                not trained on. Needed for the transferable term.
            scores: ``[batch]``, ``t``; ``None``: 0 for each.
            stage: 0, or 1 where there are two.
            return_parts: return :class:`MetaKDParts`.
        """
        integer(NAME, "stage", stage, 0)
        if stage >= self.stages:
            raise ValueError(f"{NAME}: stage must be below {self.stages}, got {stage}")
        inputs, labels = states.split(NAME, batch)
        student, teacher = self._watched[stage]
        with torch.no_grad(), states.evaluating(self._models[1]):
            taught = teacher(inputs)
        learnt = student(inputs)
        weights = self._example_weights(taught, labels, scores, stage)
        terms = _Terms(self._weights)
        if self._of("hidden", stage):
            self._add_states(terms, learnt, taught, batch, weights)
            if self._weights["transferable"]:
                term = self._transferable(learnt, taught, batch, domains, weights)
                terms.add("transferable", term)
        if self._of("prediction", stage) and self._weights["prediction"]:
            terms.add("prediction", self._prediction(learnt, taught, weights))
        if not terms.losses:
            raise ValueError(f"{NAME}: weights must leave a term of stage {stage}, got all of 0")
        loss = torch.stack(terms.losses).sum()
        if not return_parts:
            return loss
        shown: dict[str, Any] = {key: terms.shown.get(key) for key in self._weights}
        return MetaKDParts(loss=loss, weights=weights, **shown)

    def _example_weights(
        self, taught: States, labels: Tensor | None, scores: Tensor | None, stage: int
    ) -> Tensor | None:
        """``l``, or None where each is 1."""
        code = self.faithful_to == "code"
        if not self.weighted or (code and stage == 1):
            return None
        if labels is None:
            raise ValueError(f"{NAME}: batch must have labels with weighted=True, got none")
        weights = expertise_weights(taught.logits, labels, scores)
        return weights.mean().expand(len(weights)) if code else weights

    def _add_states(
        self, terms: _Terms, learnt: States, taught: States, batch: Batch, weights: Tensor | None
    ) -> None:
        """Embedding, hidden states and attention: each example's mean over its tokens, weighted."""
        mask = states.padding_mask(batch)
        if self.faithful_to == "code":
            mask = torch.ones_like(mask)
        each = mask.sum(1).clamp(min=1).to(states.wide(learnt.logits).dtype).reciprocal()
        if weights is not None:
            each = weights * each
        pairs = [pair for pair in self._pairs if pair[0] in learnt.hidden]
        if pairs:
            parts = hidden_match_many(
                states.of_one_dtype([(learnt.hidden[s], taught.hidden[t]) for s, t in pairs]),
                mask=mask,
                row_weights=each,
                projections=[self.projections[0]] * len(pairs),
                reduction="batchmean",
                weights=[self._weights["hidden" if s else "embedding"] for s, _ in pairs],
                return_parts=True,
            )
            terms.losses.append(parts.loss)
            for name, embedding in (("embedding", True), ("hidden", False)):
                own = [i for i, (s, _) in enumerate(pairs) if (s == 0) == embedding]
                if own:
                    terms.shown[name] = torch.stack([parts.layers[i] for i in own]).sum()
        if learnt.attention:
            match = self._match_maps if self.faithful_to == "code" else self._match_scores
            found = [
                match(learnt.attention[s], taught.attention[t], states.padding_mask(batch), each)
                for s, t in self._pairs
                if s in learnt.attention
            ]
            terms.add("attention", torch.stack(found).sum())

    def _match_scores(
        self, learnt: _QueryKey, taught: _QueryKey, mask: Tensor, each: Tensor
    ) -> Tensor:
        """Scores before the softmax, straight from queries and keys."""
        return attention_match_loss(
            learnt,
            taught,
            mask=mask,
            student_heads=self._heads[0],
            teacher_heads=self._heads[1],
            head_map=self._head_map,
            row_weights=each / self._heads[0],
            reduction="batchmean",
        )

    def _match_maps(
        self, learnt: _QueryKey, taught: _QueryKey, mask: Tensor, each: Tensor
    ) -> Tensor:
        """Probabilities, padding among the queries, as released."""
        maps = [
            states.attention_map(*pair, heads, mask)
            for pair, heads in zip((learnt, taught), self._heads, strict=True)
        ]
        return attention_match_loss(
            maps[0],
            maps[1],
            head_map=self._head_map,
            row_weights=each / self._heads[0],
            reduction="batchmean",
        )

    def _transferable(
        self,
        learnt: States,
        taught: States,
        batch: Batch,
        domains: Domains | None,
        weights: Tensor | None,
    ) -> Tensor:
        teacher = self._models[1]
        assert isinstance(teacher, MetaTeacher) and self.knowledge is not None
        assert learnt.last is not None and taught.last is not None
        if domains is None:
            raise ValueError(f"{NAME}: domains must be given unless gamma2 is 0, got None")
        where = states.checked_domains(NAME, domains, len(learnt.logits), teacher.domains, -1)
        where = where.to(learnt.logits.device)
        mask = states.content_mask(NAME, batch, self._special_ids, self.faithful_to)
        squash = self.faithful_to == "paper"
        own = self.knowledge(states.masked_mean(learnt.last, mask), where, squash)
        with torch.no_grad():
            target = teacher.knowledge(states.masked_mean(taught.last, mask), where, squash)
        loss: Tensor = hidden_match_loss(
            own, target, projection=self.transfer, row_weights=weights, reduction="batchmean"
        )
        return loss

    def _prediction(self, learnt: States, taught: States, weights: Tensor | None) -> Tensor:
        code = self.faithful_to == "code"
        loss: Tensor = kd_loss(
            states.wide(learnt.logits),
            states.wide(taught.logits),
            temperature=self.temperature,
            ce_weight=0.0,
            kd_weight=1.0,
            divergence="soft_ce" if code else "forward_kl",
            scale_t2=not code,
            row_weights=weights,
            reduction="batchmean",
        )
        return loss


_QueryKey = tuple[Tensor, Tensor]


class _Terms:
    """Terms as they come: weighted to be added up, and as they are to be shown."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self.losses: list[Tensor] = []
        self.shown: dict[str, Tensor] = {}

    def add(self, name: str, term: Tensor) -> None:
        self.losses.append(self._weights[name] * term)
        self.shown[name] = term.detach()


def _named(student: nn.Module, teacher: nn.Module) -> tuple[tuple[str, nn.Module], ...]:
    return ("student", student), ("teacher", teacher)


def _config(who: str, model: nn.Module) -> Any:
    config = getattr(_sites.unwrapped(model), "config", None)
    for key in ("num_hidden_layers", "num_attention_heads"):
        if not isinstance(getattr(config, key, None), int):
            raise ValueError(
                f"{NAME}: {who} must tell config.{key}, got a {type(model).__name__} without"
            )
    return config


def _layer_pairs(
    student: nn.Module, teacher: nn.Module, layers: str | Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Pairs of layers, from 1, and that of the embeddings, 0."""
    depths = [_config(who, model).num_hidden_layers for who, model in _named(student, teacher)]
    return LayerMap(layers, include_embedding=isinstance(layers, str)).pairs(*depths)
