"""What a method trains on: a task with its data, its model, its loss and its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from kdkernels.api.distill.models import Heading
from kdkernels.api.distill.train import Runtime

Step = TypeVar("Step")

SPLITS = ("dev", "test")


@dataclass(frozen=True)
class TaskOptions:
    """What the tasks have in common.

    Attributes:
        model: transformers folder of the pretrained model.
        layers: Layers of it that make up the model to train, in their order; None for all.
        runtime: Device and precision.
        train: Number of training examples; None for all.
        dev: Number of dev examples; None for all.
        test: Number of test examples; None for all.
        max_length: Longest input in tokens.
        train_embeddings: Whether the embeddings are trained; frozen otherwise.
        notify: Receives one line per thing worth telling (download, licence).
    """

    model: Path
    layers: tuple[int, ...] | None
    runtime: Runtime
    train: int | None = None
    dev: int | None = None
    test: int | None = None
    max_length: int = 128
    train_embeddings: bool = False
    notify: Callable[[str], None] = lambda line: None


class Task(Protocol[Step]):
    """A task; ``Step`` is what one optimizer step learns from.

    Attributes:
        metric: Name of the figure that is plotted and that chooses, as in a table's head:
            ``accuracy (%)``.
        higher_is_better: Whether more of it is better.
        source: One sentence on where the data come from, and how many examples there are.
        licences: One line each, for the report.
    """

    metric: str
    higher_is_better: bool
    source: str
    licences: Sequence[str]

    def new_model(self, seed: int) -> Any:
        """The pretrained model before training; what is new in it depends on the seed alone."""

    def schedule(self, epochs: int, batch_size: int, seed: int) -> list[Step]:
        """All steps of all epochs; the order depends on the seed alone."""

    def size(self, step: Step) -> int:
        """How many examples a step has."""

    def tokens(self, step: Step) -> int:
        """How many tokens a step has, without padding."""

    def loss(self, model: Any, step: Step) -> Tensor:
        """The mean loss of a step, with a gradient."""

    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        """The figures on ``dev`` or ``test``, ``metric`` first; the model is left in eval mode."""

    def save(self, model: Any, folder: Path) -> None:
        """Writes the model, as plain transformers files, into an existing folder."""


class PairedTask(Task[Step], Protocol[Step]):
    """A task over an encoder that interchange interventions train on.

    Attributes:
        options: What it was made with.
        heading: What its models have on top.
    """

    options: TaskOptions
    heading: Heading

    def ready(self, model: Any) -> Any:
        """A model as it is trained."""

    def pair(self, step: Step) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The base of a step with ``labels`` and ``lengths``, and its source; None: the base."""
