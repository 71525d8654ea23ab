"""The loss of a student's batch, by its hidden states and head or by its logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from kdkernels.api.functional import KDParts, kd_loss, linear_kd_loss, linear_topk_kd_loss
from kdkernels.api.hf import head as heads
from kdkernels.api.hf.hidden import token_mask
from kdkernels.api.hf.options import DistillOptions
from kdkernels.api.hf.teacher import LABELS, LOGITS, CachedTeacher, Signals, Teacher

NAME = "DistillMixin"
IGNORED = -100
# How classes of causal language models are called.
CAUSAL = ("ForCausalLM", "LMHeadModel")


class Loss(NamedTuple):
    """A loss with its graph, and its parts without; None where there is no such part."""

    loss: Tensor
    kd: Tensor | None
    ce: Tensor | None
    denominator: Tensor  # what they were divided by
    n_valid: Tensor  # rows that count here


class StudentLoss:
    """Runs a student and computes its loss from what a teacher said.

    Args:
        student: a model of transformers.
        teacher: whom it learns from; None for cross-entropy alone.
        options: of the loss.

    Attributes:
        route: ``hidden`` or ``logits``.
        shifts: Whether row t predicts token t + 1.
    """

    def __init__(
        self, student: nn.Module, teacher: Teacher | CachedTeacher | None, options: DistillOptions
    ) -> None:
        inner = heads.core(student)
        config = getattr(inner, "config", None)
        self._decodes = bool(getattr(config, "is_encoder_decoder", False))
        loss_type = LOSS_MAPPING.get(str(getattr(inner, "loss_type", None)))
        generates = loss_type is ForCausalLMLoss
        if loss_type is None:  # of GPT2LMHeadModel, and of classes of users
            bases = (kind.__name__ for kind in type(inner).__mro__)
            generates = any(name.endswith(CAUSAL) for name in bases)
        self._aligned = loss_type is not None or generates
        self.shifts = generates and not self._decodes
        self.route = options.route
        if self.route == "auto":
            self.route = "hidden" if generates else "logits"
        self._head = heads.find_head(student, "student") if self.route == "hidden" else None
        if isinstance(teacher, CachedTeacher):
            _check_cache(teacher, self._head, options)
        problem = getattr(config, "problem_type", None)
        one = getattr(config, "num_labels", None) == 1
        if problem is None and one and inner.loss_type == "ForSequenceClassification":
            problem = "regression"  # as such models have it
        if self.route == "logits" and problem not in (None, "single_label_classification"):
            raise ValueError(
                f"{NAME}: model must be a classifier of one label, got problem_type {problem!r}"
            )
        self._options, self._teacher = options, teacher
        self._logit_options = heads.logit_options(student)
        self._names = set(inspect.signature(inner.forward).parameters)
        self._checked = False

    def inputs(self, student: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the models are given of a batch: no labels, or they would compute a loss."""
        unwanted = {*LABELS, CachedTeacher.IDS}
        given = {name: value for name, value in batch.items() if name not in unwanted}
        if "use_cache" in self._names:
            given["use_cache"] = False
        if self._decodes and "decoder_input_ids" not in given and "labels" in batch:
            shifted = heads.core(student).prepare_decoder_input_ids_from_labels(batch["labels"])
            given["decoder_input_ids"] = shifted
        return given

    def check(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        """Before the first batch: raises for logits that are more than a head's output."""
        if self._head is not None and not self._checked:
            heads.check_logits(model, self._head, given, "student")
            self._checked = True

    def __call__(
        self,
        model: nn.Module,
        given: Mapping[str, Any],
        batch: Mapping[str, Any],
        signals: Signals,
        count: Tensor | int | None,
        whole_logits: bool,
    ) -> tuple[Loss, Any]:
        """The loss and the model's outputs.

        Args:
            model: the student as it is wrapped.
            given: its inputs.
            batch: with labels.
            signals: what the teacher said.
            count: divides the sum instead of the rows that count.
            whole_logits: whether the outputs must have logits.
        """
        if self.route == "hidden":
            return self._from_hidden(model, given, batch, signals, count, whole_logits)
        outputs = model(**given)
        return self._from_logits(outputs, batch, signals, count), outputs

    def _from_hidden(
        self,
        model: nn.Module,
        given: Mapping[str, Any],
        batch: Mapping[str, Any],
        signals: Signals,
        count: Tensor | int | None,
        whole_logits: bool,
    ) -> tuple[Loss, Any]:
        head: Any = self._head
        outputs: Any
        parts: list[KDParts] = []
        rows = _rows(batch, given, self.shifts, self._decodes)

        def answer(original: Callable[..., Any], hidden: Tensor) -> Tensor:
            # In the head's own forward pass: where its weight is sharded, here it is whole, and its
            # gradient goes where the gradients of forward passes go.
            parts.append(self._head_loss(head, hidden, signals, rows, count))
            return original(hidden) if whole_logits else heads.one_column(parts[0].loss, hidden)

        with heads.answering(head, answer, "student"):
            outputs = model(**given)
        loss = parts[0].loss
        if not whole_logits and isinstance(outputs, dict):
            # Adds nothing, but ties the loss to the output: see one_column.
            loss = loss + outputs["logits"].sum() * 0
            outputs["logits"] = None
        found = parts[0]._replace(loss=loss)
        return self._as_loss(found, rows["labels"], count), outputs

    def _head_loss(
        self,
        head: Any,
        hidden: Tensor,
        signals: Signals,
        rows: dict[str, Any],
        count: Tensor | int | None,
    ) -> KDParts:
        """The loss of what the student's head gets."""
        expected = rows["like"].shape
        if hidden.shape[:-1] != expected:
            raise ValueError(
                f"{NAME}: student must give its head one row a token {list(expected)}, got "
                f"{list(hidden.shape[:-1])} (prompt tuning?); use route='logits'"
            )
        scale, softcap = self._logit_options
        options: dict[str, Any] = {
            **self._options.loss_keywords(),
            "vocab_size": self._options.vocab_size,
            "chunk_bytes": self._options.chunk_bytes,
            "student_bias": getattr(head, "bias", None),
            "num_items_in_batch": count,
            "return_parts": True,
            **{name: rows[name] for name in ("labels", "mask", "shift")},
        }
        weight = head.weight
        if signals.topk is not None:
            del options["beta"]
            ids, logprobs = (x.to(hidden.device, non_blocking=True) for x in signals.topk)
            options |= {"logit_scale": scale, "softcap": softcap, "tail": self._options.tail}
            sparse: KDParts = linear_topk_kd_loss(hidden, weight, ids, logprobs, **options)
            return sparse
        if signals.hidden is None or signals.head is None:
            options |= {"logit_scale": scale, "softcap": softcap}
            alone: KDParts = linear_kd_loss(hidden, weight, None, None, **options)
            return alone
        assert isinstance(self._teacher, Teacher)
        # Not before: both models work at once where they are on two devices.
        said = signals.hidden.to(hidden.device, non_blocking=True)
        taught = self._teacher.head_on(hidden.device, signals.head)
        options |= {"logit_scale": (scale, taught.scale), "softcap": (softcap, taught.softcap)}
        options["teacher_bias"] = taught.bias
        whole: KDParts = linear_kd_loss(hidden, weight, said, taught.weight, **options)
        return whole

    def _from_logits(
        self, outputs: Any, batch: Mapping[str, Any], signals: Signals, count: Tensor | int | None
    ) -> Loss:
        """The loss of logits: of classes, of tokens, or of the ends of a span."""
        found = []
        for name, labels in LOGITS.items():
            logits = outputs.get(name)
            if logits is None:
                continue
            target: Any = batch.get("shift_labels", batch.get(labels))
            shift = int(self.shifts and "shift_labels" not in batch)
            if logits.dim() > 2 and not self._aligned and "shift_labels" not in batch:
                raise ValueError(
                    f"{NAME}: inputs must hold shift_labels, aligned with the logits, for a "
                    "model that transformers has no loss for, got labels alone"
                )
            if name != "logits" and target is not None:
                # Spans that were cut off point behind the end.
                target = torch.where(target < logits.shape[-1], target, IGNORED)
            mask = token_mask(batch) if target is None and logits.dim() == 3 else None
            teacher = None if signals.logits is None else signals.logits.get(name)
            if teacher is not None:
                teacher = teacher.to(logits.device, non_blocking=True)
            parts = kd_loss(
                logits,
                teacher,
                target,
                mask=mask,
                shift=shift,
                vocab_size=self._options.vocab_size,
                num_items_in_batch=count,
                return_parts=True,
                **self._options.loss_keywords(),
            )
            found.append(self._as_loss(parts, target, count))
        if not found:
            raise ValueError(
                f"{NAME}: model must give {', '.join(LOGITS)}, got {', '.join(outputs)}"
            )
        if len(found) == 1:
            return found[0]
        mean: list[Any] = [
            None if part[0] is None else torch.stack(part).mean()
            for part in zip(*found, strict=True)
        ]
        return Loss(*mean)

    def _as_loss(self, parts: KDParts, labels: Tensor | None, count: Tensor | int | None) -> Loss:
        """With the number of rows that it was divided by, and the parts that there are."""
        divided = parts.n_valid if count is None else count
        return Loss(
            parts.loss,
            None if self._teacher is None else parts.kd,
            None if labels is None else parts.ce,
            torch.as_tensor(divided, device=parts.loss.device).float(),
            parts.n_valid,
        )


def _check_cache(teacher: CachedTeacher, head: Any, options: DistillOptions) -> None:
    """Raises for a cache that a student cannot learn from."""
    if head is None:
        raise ValueError(f"{NAME}: teacher must be a model for route='logits', got a cache")
    classes, own = teacher.cache.manifest.vocab_size, head.weight.shape[0]
    sharded = hasattr(head.weight, "ds_id")  # by DeepSpeed: its shape is not known here
    if classes != own and options.vocab_size is None and not sharded:
        raise ValueError(
            f"{NAME}: teacher must have the student's {own} classes, got a cache with {classes}; "
            "give vocab_size, the number of real ones, where the rest is padding"
        )


def _rows(
    batch: Mapping[str, Any], given: Mapping[str, Any], shifts: bool, decodes: bool
) -> dict[str, Any]:
    """Labels, mask and shift of the rows that a language model's head gets."""
    labels, shift = batch.get("labels"), int(shifts)
    if batch.get("shift_labels") is not None:
        labels, shift = batch["shift_labels"], 0
    like = given.get("decoder_input_ids" if decodes else "input_ids")
    if like is None:
        like = labels
    if like is None:
        raise ValueError(f"{NAME}: inputs must hold input_ids or labels, got {', '.join(batch)}")
    mask = token_mask(given) if labels is None and not decodes else None
    return {"labels": labels, "mask": mask, "shift": shift, "like": like}
