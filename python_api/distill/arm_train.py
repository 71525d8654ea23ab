"""One training of an arm, whatever its loss: linear decay of the learning rate, and a dev curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kdkernels.api.distill import train
from kdkernels.api.distill.swa_train import Trained
from kdkernels.api.distill.task import Task
from kdkernels.api.distill.train import Loop, Recipe

Listener = Callable[[dict[str, Any]], None]


def fit(
    task: Task[Any],
    model: Any,
    steps: Sequence[Any],
    loss: Callable[[Any], Any],
    recipe: Recipe,
    on_event: Listener,
) -> Trained:
    """Trains a model in place.

    Args:
        task: What it is evaluated on.
        model: The model before training.
        steps: What ``loss`` takes, in the order of training.
        loss: The loss of a step, with a gradient.
        recipe: Hyperparameters.
        on_event: As in :func:`~kdkernels.api.distill.train.fit`.
    """
    found = Trained(model)

    def evaluate() -> float:
        figure = task.evaluate(model, "dev")[task.metric]
        found.curve.append({"live": figure})
        return figure

    def seen(event: dict[str, Any]) -> None:
        if "dev" in event:
            found.curve[-1]["step"] = event["step"]
        on_event(event)

    loop: Loop[Any] = Loop(
        loss=loss,
        evaluate=evaluate,
        metric="dev",
        size=task.size,
        on_event=seen,
        schedule=partial(train.linear_decay, warmup_fraction=recipe.warmup),
        tokens=task.tokens,
    )
    found.fitted = train.run(model, steps, loop, recipe)
    return found
