"""The trainings of a run of Meta-KD: teachers of one domain and of several, and students."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kdkernels
from kdkernels.api.distill import train
from kdkernels.api.distill.metakd_config import LOSSES, MetaKdConfig, loss_of, teacher_of
from kdkernels.api.distill.text import collate, training_batches
from kdkernels.api.distill.train import FitResult, Loop, Recipe, Runtime
from kdkernels.api.methods.meta_kd import MetaKD
from kdkernels.api.methods.meta_teacher import MetaTeacher

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Examples:
    """Tokenised texts of one domain or several, with labels.

    Attributes:
        ids: Token ids of each text.
        labels: int64 ``[texts]``.
        domains: int64 ``[texts]``.
        scores: fp32 ``[texts]``, how typical of its domain a text is; None where nobody asks.
    """

    ids: Sequence[Sequence[int]]
    labels: Tensor
    domains: Tensor
    scores: Tensor | None = None

    def head(self, count: int) -> Examples:
        """The first texts."""
        scores = None if self.scores is None else self.scores[:count]
        return Examples(self.ids[:count], self.labels[:count], self.domains[:count], scores)

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """The texts of several domains."""
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(
            [ids for part in parts for ids in part.ids],
            torch.cat([part.labels for part in parts]),
            torch.cat([part.domains for part in parts]),
            torch.cat(scores) if len(scores) == len(parts) else None,
        )


@dataclass(frozen=True)
class Setting:
    """What all trainings of a run have in common."""

    config: MetaKdConfig
    runtime: Runtime
    pad_id: int

    def batch(self, examples: Examples, rows: list[int]) -> dict[str, Tensor]:
        """Inputs and labels of some texts."""
        device = self.runtime.device
        inputs = collate(examples.ids, rows, self.pad_id, device)
        return {**inputs, "labels": examples.labels[rows].to(device)}

    def steps(self, examples: Examples, epochs: int, seed: int) -> list[list[int]]:
        """All batches of all epochs; texts of all domains are mixed."""
        generator = torch.Generator().manual_seed(seed)
        lengths = [len(ids) for ids in examples.ids]
        size = self.config.batch_size
        return [rows for _ in range(epochs) for rows in training_batches(lengths, size, generator)]

    def run(
        self,
        trained: nn.Module,
        steps: Sequence[list[int]],
        loss: Callable[[list[int]], Tensor],
        lr: float,
        seed: int,
        on_event: Listener,
    ) -> FitResult:
        """Trains in place; dev figures are taken at the end only, where they choose."""
        recipe = Recipe(
            epochs=1,
            lr=lr,
            batch_size=self.config.batch_size,
            seed=seed,
            evaluations=0,
        )
        loop: Loop[list[int]] = Loop(
            loss=loss, evaluate=lambda: 0.0, metric="dev", size=len, on_event=on_event
        )
        return train.run(trained, steps, loop, recipe)


def fit_teacher(
    setting: Setting, teacher: Any, examples: Examples, seed: int, on_event: Listener
) -> FitResult:
    """Trains a classifier on labels, or a :class:`~kdkernels.MetaTeacher` by its own loss."""
    config, runtime = setting.config, setting.runtime

    def loss(rows: list[int]) -> Tensor:
        batch = setting.batch(examples, rows)
        with runtime.autocast(), runtime.training_attention():
            if not isinstance(teacher, MetaTeacher):
                labels = batch.pop("labels")
                return _cross_entropy(teacher(**batch).logits, labels)
            scores = None if examples.scores is None else examples.scores[rows]
            with warnings.catch_warnings():  # the last batch may be small, and of one domain
                warnings.simplefilter("ignore", UserWarning)
                found: Tensor = teacher(batch, examples.domains[rows], scores)
        return found

    steps = setting.steps(examples, config.teacher_epochs, seed)
    return setting.run(teacher, steps, loss, config.teacher_lr, seed, on_event)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = kdkernels.kd_loss(logits.float(), None, labels)
    return loss


def make_loss(config: MetaKdConfig, arm: str, student: Any, teacher: Any, seed: int) -> MetaKD:
    """The loss of an arm.

    A teacher that is no meta-teacher has learnt nothing transferable: its students have the
    weights alone.
    """
    options: dict[str, Any] = {
        "stages": config.stages,
        "temperature": config.temperature,
        "gamma2": config.gamma2,
        "faithful_to": config.faithful_to,
        # Frozen embeddings have nothing to learn.
        "embedding_weight": 1.0 if config.train_embeddings else 0.0,
        "seed": seed,
    }
    options |= LOSSES[loss_of(arm)]
    if teacher_of(arm) != "meta":
        options["gamma2"] = 0.0
    return MetaKD(student, teacher, **options)


def fit_student(
    setting: Setting,
    arm: str,
    student: Any,
    teacher: Any,
    examples: Examples,
    domain: int,
    epochs: int,
    seed: int,
    on_event: Listener,
) -> FitResult:
    """Trains the student of a domain in place, stage by stage.

    Args:
        setting: What all trainings have in common.
        arm: Teacher and loss.
        student: The student before training.
        teacher: It is left as it is.
        examples: The domain's texts.
        domain: The domain's number with the teacher; -1 for one that it was not trained on.
        epochs: Of each stage.
        seed: Of the order.
        on_event: As in :func:`~kdkernels.api.distill.train.fit`.
    """
    config, runtime = setting.config, setting.runtime
    meta_kd = make_loss(config, arm, student, teacher, seed)
    scored = loss_of(arm) != "no-scores"
    result = FitResult()

    def loss(stage: int, rows: list[int]) -> Tensor:
        scores = None if examples.scores is None or not scored else examples.scores[rows]
        batch = setting.batch(examples, rows)
        with runtime.autocast(), runtime.training_attention():
            found: Tensor = meta_kd(batch, domain, scores, stage=stage)
        return found

    # One stage has the steps of both.
    parts = 2 * epochs if config.stages == 1 else epochs
    for stage in range(config.stages):
        steps = setting.steps(examples, parts, seed + 1000 * stage)
        trained = nn.ModuleList([student, meta_kd])
        shifted = partial(_shifted, on_event, result.steps, len(steps) * config.stages)
        fitted = setting.run(trained, steps, partial(loss, stage), config.lr, seed, shifted)
        result.seconds += fitted.seconds
        result.examples += fitted.examples
        result.steps += fitted.steps
    return result


def _shifted(on_event: Listener, first: int, total: int, event: dict[str, Any]) -> None:
    """Counts the steps of a stage within the whole training."""
    on_event({**event, "step": first + event["step"], "steps": total})
