"""Training with a recipe: the teacher runs beside the student, both are watched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kdkernels
from kdkernels.api.distill import models, recipes_fused, train
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.recipes import Losses, Options, Shape, SoftLabels, States
from kdkernels.api.distill.text import collate
from kdkernels.api.distill.train import (
    EvalSet,
    FitResult,
    Loop,
    Parted,
    Recipe,
    Runtime,
    TrainSet,
)

Batch = Mapping[str, Tensor]
Event = dict[str, Any]


class Watched:
    """A classifier together with what a recipe needs to see of it.

    Hidden states and queries, keys and values come from :class:`kdkernels.Capture`, so the model
    keeps whichever attention it has.
    """

    def __init__(
        self,
        model: Any,
        argument: str,
        hidden: Sequence[int],
        attention: Sequence[int],
        kinds: tuple[str, ...],
    ) -> None:
        """Args: the model, its name in errors, layers by number, which of ``q``, ``k``, ``v``."""
        self.model = model
        self._captures: list[tuple[Sequence[int], list[str], kdkernels.Capture]] = []
        paths = models.layer_paths(model, argument) if hidden or attention else []
        for layers, what in ((hidden, "output"), (attention, kinds)):
            if layers:
                named = [paths[layer] for layer in layers]
                try:
                    capture = kdkernels.Capture(model, named, what=what)
                except (TypeError, ValueError) as error:
                    raise DistillError(
                        f"{argument} must be a model whose states can be captured, got "
                        f"{type(model).__name__}: {error}"
                    ) from error
                self._captures.append((layers, named, capture))
        self._hidden = bool(hidden)

    def __call__(self, batch: Batch) -> States:
        """Runs the model."""
        with ExitStack() as stack:
            for _, _, capture in self._captures:
                stack.enter_context(capture)
            logits = self.model(**batch).logits
        found = []
        for layers, named, capture in self._captures:
            found.append({layer: capture[path] for layer, path in zip(layers, named, strict=True)})
            capture.clear()  # the tensors live as long as their graph, not until the next batch
        hidden = found.pop(0) if self._hidden else {}
        return States(logits.float(), hidden, found[0] if found else {})


class _Recorded:
    """Losses that keep what each of them was, detached and without the recipe's weights."""

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self.parts: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        loss = getattr(self._losses, name)

        def recording(*arguments: Any) -> Tensor:
            value: Tensor = loss(*arguments)
            self.parts[name.removeprefix("match_")] = value.detach()
            return value

        return recording


class StepLoss:
    """The loss of one batch of one stage of a recipe."""

    def __init__(
        self,
        recipe: SoftLabels,
        stage: int,
        student: Any,
        teacher: Any,
        runtime: Runtime,
        losses: Losses = recipes_fused,
    ) -> None:
        """Args: as the attributes of a recipe are called; the teacher gets no gradient."""
        self.recipe, self.stage, self.runtime, self.losses = recipe, stage, runtime, losses
        # The last of several stages trains on soft labels alone.
        watched = stage == 0
        hidden = recipe.hidden if watched else []
        attention = recipe.attention if watched else []
        self._models = []
        for place, (model, argument) in enumerate(((student, "student"), (teacher, "teacher"))):
            layers = [[pair[place] for pair in pairs] for pairs in (hidden, attention)]
            self._models.append(Watched(model, argument, layers[0], layers[1], recipe.kinds))

    def states(self, batch: Batch) -> tuple[States, States]:
        """What the student and the teacher make of a batch."""
        student, teacher = self._models
        with torch.no_grad(), self.runtime.autocast():
            taught = teacher(batch)
        with self.runtime.autocast(), self.runtime.training_attention():
            return student(batch), taught

    def of(
        self, student: States, teacher: States, mask: Tensor, losses: Losses | None = None
    ) -> Tensor:
        """The loss from given states; ``mask`` is bool ``[batch, sequence]``."""
        with self.runtime.autocast():
            return self.recipe.loss(self.stage, student, teacher, mask, losses or self.losses)

    def parts(self, batch: Batch) -> Parted:
        """The loss of a batch, with a graph, and what it is made of."""
        recorded: Any = _Recorded(self.losses)
        loss = self.of(*self.states(batch), batch["attention_mask"].bool(), recorded)
        return Parted(loss, recorded.parts)

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of a batch, with a graph."""
        return self.of(*self.states(batch), batch["attention_mask"].bool())


def make_recipe(
    arm: type[SoftLabels], student: Any, teacher: Any, options: Options, seed: int
) -> SoftLabels:
    """A recipe for two models, its projections drawn from the seed, where the student is."""
    torch.manual_seed(seed)
    recipe = arm(Shape.of(student.config), Shape.of(teacher.config), options)
    recipe.projections.to(student.device)
    return recipe


def fit(
    recipe: SoftLabels,
    student: Any,
    teacher: Any,
    ids: Sequence[Sequence[int]],
    dev: EvalSet,
    hyper: Recipe,
    runtime: Runtime,
    pad_id: int,
    on_event: Callable[[Event], None],
    losses: Losses = recipes_fused,
) -> FitResult:
    """Trains a classifier in place, in the stages of a recipe.

    The batches and their order are those of every other recipe with the same seed; two stages
    share them out, half and half.

    Args:
        recipe: What to learn; its projections are trained beside the student.
        student: A transformers sequence classifier on the runtime's device.
        teacher: The same, with the student's vocabulary; it is left as it is.
        ids: Token ids of the texts to learn on.
        dev: Held-out texts, for the curve of the last stage; they choose nothing here.
        hyper: Hyperparameters.
        runtime: Device and precision.
        pad_id: Padding token.
        on_event: As in :func:`~kdkernels.api.distill.train.fit`.
        losses: Where the losses come from.

    Returns:
        Timing and the dev curve.
    """
    teacher.eval()
    trained = nn.ModuleList([student, recipe.projections])
    steps = train.schedule([TrainSet(ids)], hyper)
    result, first = FitResult(), 0
    for stage in range(recipe.stages):
        end = len(steps) * (stage + 1) // recipe.stages
        part, last = steps[first:end], stage == recipe.stages - 1
        loss = StepLoss(recipe, stage, student, teacher, runtime, losses)
        loop = Loop[tuple[TrainSet, list[int]]](
            loss=partial(_batch_loss, loss, pad_id),
            evaluate=lambda: train.accuracy(
                train.predict(student, dev.ids, runtime, pad_id), dev.labels
            ),
            metric="dev_accuracy",
            size=lambda step: len(step[1]),
            on_event=_shifted(on_event, first, len(steps)),
            tokens=train.count_tokens,
        )
        # Before the last stage nothing has trained the classifier's head.
        evaluations = hyper.evaluations if last else 0
        fitted = train.run(trained, part, loop, dataclasses.replace(hyper, evaluations=evaluations))
        result.seconds += fitted.seconds
        result.examples += fitted.examples
        result.curve += [(first + step, value) for step, value in fitted.curve]
        first = end
    result.steps = len(steps)
    return result


def _batch_loss(loss: StepLoss, pad_id: int, step: tuple[TrainSet, list[int]]) -> Parted:
    texts, rows = step
    return loss.parts(collate(texts.ids, rows, pad_id, loss.runtime.device))


def _shifted(on_event: Callable[[Event], None], first: int, total: int) -> Callable[[Event], None]:
    """Counts the steps of a stage within the whole training."""
    return lambda event: on_event({**event, "step": first + event["step"], "steps": total})
