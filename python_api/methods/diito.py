"""Causal distillation: a student that also answers as its teacher does under interchanges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.api import _sites
from kdkernels.api._spec import choice, number
from kdkernels.api.counterfactual import Counterfactual
from kdkernels.api.functional import kd_loss, linear_kd_loss
from kdkernels.api.hidden import hidden_match_loss
from kdkernels.api.intervention import Where
from kdkernels.api.methods.alignment import AlignedLayers, Alignment
from kdkernels.api.methods.spans import masked_positions, sample_positions, sample_spans

__all__ = ["DIITO", "DIITOParts"]

NAME = "DIITO"
POSITIONS = ("consecutive", "random", "masked")
INDEX_MODES = {"aligned": "output", "release": "input"}
KL_MEANS = {"row": "mean", "class": "element_mean"}

Batch = Mapping[str, Any]


class DIITOParts(NamedTuple):
    """The loss of :class:`DIITO` and its unweighted terms; all but ``loss`` are detached.

    A term whose weight is 0 is not computed, and None.
    """

    loss: Tensor
    kd: Tensor | None
    ce: Tensor | None
    cosine: Tensor | None
    cf_kd: Tensor | None
    cf_cosine: Tensor | None


class DIITO:
    r"""The loss of distillation by interchange interventions (DIITO), one call a step.

    Both models run a base batch. Then each runs it again with hidden states of a source batch in
    place of its own, at layers that are aligned and at the same positions, and the student learns
    to answer as the teacher does then, too::

        loss = kd_weight T^2 KL(teacher, student) + ce_weight CE(student, labels)
               + cosine_weight (1 - cos(last hidden states))
               + cf_weight T^2 KL(counterfactual teacher, counterfactual student)
               + cf_cosine_weight (1 - cos(last counterfactual hidden states))

    Layers before the interchange are computed once (:class:`kdkernels.Counterfactual`). A masked
    language model's logits exist for a chunk of tokens at a time
    (:func:`kdkernels.linear_kd_loss`). Without counterfactual weights no counterfactual runs: the
    same object is the baseline.

    Args:
        student: a model of transformers, also wrapped by DistributedDataParallel
            (``broadcast_buffers=False``) or ``torch.compile``.
        teacher: likewise, not trained; put into evaluation mode.
        alignment: an :class:`kdkernels.Alignment` or the name of a published one. One of its
            mappings is drawn for each step.
        form: ``task``: logits of a task's head, per text or per token. ``masked_lm``: a head over
            the vocabulary, and labels at the masked tokens.
        temperature: ``T`` of both divergences.
        kd_weight: default 0.25 for ``masked_lm``, 0.5 for ``task``.
        ce_weight: 0.25, or 0.5; not used for batches without ``labels``.
        cosine_weight: 0.25, or 0; needs models of one width.
        cf_weight: 0.25, or 1.
        cf_cosine_weight: 0.
        share: of the shorter text of a pair that is exchanged.
        max_length: no row exchanges more positions.
        positions: ``consecutive`` spans, ``random`` positions, or ``masked``: those that the base
            has labels for.
        index_mode: ``aligned``: the output of a layer goes to the output of that layer.
            ``release``: the input of a layer does, as in the released code, where a source equal
            to its base changes the base.
        kl_mean: ``row``: per text (token); ``class``: divided by the number of classes as well, as
            in the released code for tasks.
        reuse: ``False`` computes every layer in every run.
        seed: of the draws: mapping, positions and the pairing within a batch.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: values out of their ranges; models that do not fit the alignment or each other.

    Note:
        KL and cosine are means over the tokens of the base that are not padding (``task``: over
        the texts, or over all tokens that are not padding); cross-entropy is the mean over the
        labels. Gradients also reach the student through the source run. On the CPU the vocabulary
        heads run in float32 also under autocast.

        The draws need the lengths of the texts on the host: give ``lengths`` or a ``where`` of
        your own where the batch is on a device, or they are copied from it.

    References:
        Wu et al., Causal Distillation for Language Models, NAACL 2022, arXiv 2112.02505.

    Example:
        >>> import kdkernels, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = dict(vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=32)
        >>> teacher, student = (
        ...     BertForSequenceClassification(BertConfig(num_hidden_layers=n, **small))
        ...     for n in (4, 2)
        ... )
        >>> diito = kdkernels.DIITO(student, teacher, "multilayer", form="task")
        >>> batch = {
        ...     "input_ids": torch.randint(50, (4, 9)),
        ...     "attention_mask": torch.ones(4, 9, dtype=torch.int64),
        ...     "labels": torch.tensor([0, 1, 1, 0]),
        ... }
        >>> loss = diito(batch)  # a random permutation of the batch is its source
        >>> loss.backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        alignment: Alignment | str = "single_middle",
        *,
        form: str = "masked_lm",
        temperature: float = 2.0,
        kd_weight: float | None = None,
        ce_weight: float | None = None,
        cosine_weight: float | None = None,
        cf_weight: float | None = None,
        cf_cosine_weight: float = 0.0,
        share: float = 0.3,
        max_length: int | None = None,
        positions: str = "consecutive",
        index_mode: str = "aligned",
        kl_mean: str = "row",
        reuse: bool = True,
        seed: int = 0,
    ) -> None:
        choice(NAME, "form", form, tuple(DEFAULTS))
        choice(NAME, "positions", positions, POSITIONS)
        choice(NAME, "index_mode", index_mode, tuple(INDEX_MODES))
        choice(NAME, "kl_mean", kl_mean, tuple(KL_MEANS))
        given = {
            "kd_weight": kd_weight,
            "ce_weight": ce_weight,
            "cosine_weight": cosine_weight,
            "cf_weight": cf_weight,
            "cf_cosine_weight": cf_cosine_weight,
        }
        self._weights = {
            key: DEFAULTS[form][key] if value is None else value for key, value in given.items()
        }
        for key, value in self._weights.items():
            number(NAME, key, value, 0.0, float("inf"))
        self._kl = {"temperature": temperature, "reduction": KL_MEANS[kl_mean]}
        self._sampling = {"share": share, "max_length": max_length}
        self._positions, self._at, self._reuse = positions, INDEX_MODES[index_mode], reuse
        runner = _MaskedLm if form == "masked_lm" else _Task
        self._student = runner("student", student)
        self._teacher = runner("teacher", teacher.eval())
        self.alignment = _fitting(alignment, self._teacher.layers, self._student.layers)
        if self._weights["cosine_weight"] or self._weights["cf_cosine_weight"]:
            _check_widths(student, teacher)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        base: Batch,
        source: Batch | None = None,
        *,
        where: Where | None = None,
        return_parts: bool = False,
    ) -> Any:  # a Tensor, or DIITOParts
        """The loss of a batch.

        Args:
            base: what the models take (``input_ids``, ``attention_mask``, ...), all of it
                ``[batch, seq]``, and ``labels``: ``[batch]``, or ``[batch, seq]`` with -100 where
                there is none. ``lengths``: tokens of each text, a tensor on the CPU, optional.
            source: the same for the source run, without labels; any number of positions. ``None``:
                the base in a random order of its rows, which costs no run.
            where: the exchange, instead of a drawn one.
            return_parts: return :class:`DIITOParts`.
        """
        counterfactual = self._weights["cf_weight"] + self._weights["cf_cosine_weight"] > 0
        mapping = self._draw_mapping()
        inputs, labels, lengths = _split(base)
        sent = None
        if counterfactual:
            other = None if source is None else _split(source)
            if where is None:
                where = self._draw(labels, lengths, None if other is None else other[2])
            where = where.to(_device(inputs))
            sent = None if other is None else other[0]
        with torch.no_grad():
            taught = self._run(self._teacher, mapping, inputs, sent, where, counterfactual)
        learnt = self._run(self._student, mapping, inputs, sent, where, counterfactual)
        parts = self._terms(learnt, taught, labels, inputs.get("attention_mask"))
        return parts if return_parts else parts.loss

    def state_dict(self) -> dict[str, Any]:
        """What the draws of a resumed training go on from."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a :meth:`state_dict`."""
        if "generator" not in state:
            raise ValueError(f"{NAME}: state must have 'generator', got {', '.join(state) or '{}'}")
        self._generator.set_state(state["generator"])

    def _draw_mapping(self) -> AlignedLayers:
        mappings = self.alignment.mappings
        return mappings[int(torch.randint(len(mappings), (), generator=self._generator))]

    def _draw(self, labels: Tensor | None, lengths: Tensor, source_lengths: Tensor | None) -> Where:
        row = None
        if source_lengths is None:
            row = torch.randperm(len(lengths), generator=self._generator)
            source_lengths = lengths
        if self._positions == "masked":
            if labels is None or labels.dim() != 2:
                raise ValueError(f"{NAME}: labels must be [batch, seq] with positions='masked'")
            return masked_positions(labels.cpu() != IGNORED, source_lengths, source_row=row)
        sample: Callable[..., Where] = (
            sample_spans if self._positions == "consecutive" else sample_positions
        )
        return sample(
            lengths,
            source_lengths,
            source_row=row,
            generator=self._generator,
            **self._sampling,
        )

    def _run(
        self,
        runner: _Runner,
        mapping: AlignedLayers,
        inputs: Batch,
        source: Batch | None,
        where: Where | None,
        counterfactual: bool,
    ) -> list[_States]:
        """States of the base run, and of the counterfactual one."""
        if not counterfactual:
            return [runner.states(lambda: runner.model(**inputs))]
        assert where is not None
        layers, dims = getattr(mapping, runner.who), getattr(mapping, f"{runner.who}_dims")
        runs = Counterfactual(
            runner.model,
            [runner.layers[layer] for layer in layers],
            source_at=self._at,
            dims=dims,
            reuse=self._reuse,
        )
        base = runner.states(lambda: runs.base(**inputs))
        if source is not None:
            runs.source(**source)
        given = "base" if source is None else "source"
        return [base, runner.states(lambda: runs.counterfactual(where, source=given))]

    def _terms(
        self,
        learnt: list[_States],
        taught: list[_States],
        labels: Tensor | None,
        mask: Tensor | None,
    ) -> DIITOParts:
        w = self._weights
        with _loss_context(learnt[0].head_input):
            divergence = {"mask": mask, **self._kl}
            found = {
                "kd": (w["kd_weight"], lambda: self._kd(learnt[0], taught[0], divergence)),
                "ce": (
                    0.0 if labels is None else w["ce_weight"],
                    lambda: self._student.ce(learnt[0], labels),
                ),
                "cosine": (w["cosine_weight"], lambda: _cosine(learnt[0], taught[0], mask)),
                "cf_kd": (w["cf_weight"], lambda: self._kd(learnt[1], taught[1], divergence)),
                "cf_cosine": (w["cf_cosine_weight"], lambda: _cosine(learnt[1], taught[1], mask)),
            }
            terms = {key: term() if weight else None for key, (weight, term) in found.items()}
        kept = [found[key][0] * term for key, term in terms.items() if term is not None]
        if not kept:
            raise ValueError(f"{NAME}: weights must leave a term, got all of them 0")
        loss = torch.stack(kept).sum()
        return DIITOParts(loss, **{k: None if t is None else t.detach() for k, t in terms.items()})

    def _kd(self, learnt: _States, taught: _States, options: dict[str, Any]) -> Tensor:
        return self._student.kd(learnt, self._teacher, taught, options)


IGNORED = -100
DEFAULTS = {
    "masked_lm": {"kd_weight": 0.25, "ce_weight": 0.25, "cosine_weight": 0.25, "cf_weight": 0.25},
    "task": {"kd_weight": 0.5, "ce_weight": 0.5, "cosine_weight": 0.0, "cf_weight": 1.0},
}


class _States(NamedTuple):
    """What a run gives: ``head_input`` is logits where the head is a task's."""

    head_input: Tensor
    last_hidden: Tensor


class _Runner:
    """A model, its layers, and its losses."""

    def __init__(self, who: str, model: nn.Module) -> None:
        _sites.check_model(NAME, model)
        self.who, self.model = who, model
        self.layers = _sites.layers_of(NAME, who, model)
        inner: Any = _sites.unwrapped(model)
        self._backbone: nn.Module = inner.base_model

    def states(self, run: Callable[[], Any]) -> _States:
        """The states of a run of the model."""
        seen: list[Tensor] = []

        def watch(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = original(*args, **kwargs)
                seen.append(_sites.first_tensor(NAME, self.who, output))
                return output

            return forward

        with ExitStack() as stack:
            stack.enter_context(_sites.replaced(NAME, self._backbone, watch))
            self._enter(stack)
            output = run()
        logits = output["logits"] if isinstance(output, Mapping) else output.logits
        return _States(logits, seen[0])

    def _enter(self, stack: ExitStack) -> None:
        """What a run of this kind needs beside."""


class _Task(_Runner):
    """A model with a task's head: its logits are small."""

    def kd(self, learnt: _States, teacher: _Runner, taught: _States, options: Any) -> Tensor:
        logits = learnt.head_input.float()
        mask = options["mask"] if logits.dim() == 3 else None
        loss: Tensor = kd_loss(
            logits,
            taught.head_input.float(),
            **{**options, "mask": mask},
            ce_weight=0.0,
            kd_weight=1.0,
        )
        return loss

    def ce(self, learnt: _States, labels: Tensor | None) -> Tensor:
        loss: Tensor = kd_loss(learnt.head_input.float(), None, labels, ignore_index=IGNORED)
        return loss


class _MaskedLm(_Runner):
    """A model with a head over the vocabulary, whose logits never exist as a whole."""

    def __init__(self, who: str, model: nn.Module) -> None:
        super().__init__(who, model)
        inner: Any = _sites.unwrapped(model)
        self._head = inner.get_output_embeddings()
        if not isinstance(self._head, nn.Linear):
            raise ValueError(
                f"{NAME}: {who} must have a linear head over the vocabulary "
                f"(get_output_embeddings) with form='masked_lm', got {type(self._head).__name__} "
                f"in a {type(inner).__name__}"
            )

    def _enter(self, stack: ExitStack) -> None:
        # The head hands on what it gets: the logits of the output are the states before it.
        stack.enter_context(_sites.replaced(NAME, self._head, lambda original: lambda x: x))

    def kd(self, learnt: _States, teacher: _Runner, taught: _States, options: Any) -> Tensor:
        assert isinstance(teacher, _MaskedLm)
        known = teacher._head
        loss: Tensor = linear_kd_loss(
            _wide(learnt.head_input),
            self._head.weight,
            _wide(taught.head_input),
            known.weight.detach(),
            student_bias=self._head.bias,
            teacher_bias=None if known.bias is None else known.bias.detach(),
            ce_weight=0.0,
            kd_weight=1.0,
            **options,
        )
        return loss

    def ce(self, learnt: _States, labels: Tensor | None) -> Tensor:
        loss: Tensor = linear_kd_loss(
            _wide(learnt.head_input),
            self._head.weight,
            None,
            None,
            labels,
            student_bias=self._head.bias,
            ignore_index=IGNORED,
        )
        return loss


def _loss_context(states: Tensor) -> AbstractContextManager[Any]:
    """On a CPU the losses run in float32, where bfloat16 products of a head are the slower ones."""
    cpu = states.device.type == "cpu"
    return torch.autocast("cpu", enabled=False) if cpu else nullcontext()


def _wide(states: Tensor) -> Tensor:
    return states.float() if states.device.type == "cpu" and states.itemsize < 4 else states


def _cosine(learnt: _States, taught: _States, mask: Tensor | None) -> Tensor:
    loss: Tensor = hidden_match_loss(
        learnt.last_hidden, taught.last_hidden, kind="cosine", mask=mask
    )
    return loss


def _split(batch: Batch) -> tuple[dict[str, Any], Tensor | None, Tensor]:
    """What a model takes, the labels, and the lengths of the texts on the CPU."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "lengths")}
    if "input_ids" not in inputs:
        raise ValueError(f"{NAME}: batch must have input_ids, got {', '.join(batch) or 'nothing'}")
    lengths, ids = batch.get("lengths"), inputs["input_ids"]
    if lengths is None and inputs.get("attention_mask") is not None:
        lengths = inputs["attention_mask"].sum(1).cpu()
    elif lengths is None:
        lengths = torch.full((ids.shape[0],), ids.shape[1])
    return inputs, batch.get("labels"), lengths


def _device(inputs: Batch) -> torch.device:
    ids: Tensor = inputs["input_ids"]
    return ids.device


def _fitting(
    alignment: Alignment | str, teacher_layers: list[str], student_layers: list[str]
) -> Alignment:
    depths = len(teacher_layers), len(student_layers)
    if isinstance(alignment, str):
        return Alignment.named(alignment, *depths)
    if (alignment.teacher_layers, alignment.student_layers) != depths:
        raise ValueError(
            f"{NAME}: alignment must be for {depths[0]} and {depths[1]} layers of teacher and "
            f"student, got {alignment.teacher_layers} and {alignment.student_layers}"
        )
    return alignment


def _check_widths(student: nn.Module, teacher: nn.Module) -> None:
    widths = [
        getattr(getattr(_sites.unwrapped(model), "config", None), "hidden_size", None)
        for model in (teacher, student)
    ]
    if widths[0] != widths[1]:
        raise ValueError(
            f"{NAME}: cosine_weight must be 0 for models of different widths, got {widths[0]} and "
            f"{widths[1]}"
        )
