"""One training of a run with stochastic weight averaging, with or without an average."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.api.averager import WeightAverager
from kdkernels.api.distill import train
from kdkernels.api.distill.swa_config import SwaConfig
from kdkernels.api.distill.task import Task
from kdkernels.api.distill.train import FitResult, Loop, Recipe
from kdkernels.api.methods.swa import SWA, make_averager


class Pair(NamedTuple):
    """When to average: from where on, and every how many steps."""

    start: float
    every: int

    @property
    def key(self) -> str:
        """Its name in files and tables."""
        return f"start {self.start:g}, K {self.every}"


def pairs_of(config: SwaConfig) -> list[Pair]:
    """All averages of a training; the first is the one that is plotted."""
    return [Pair(*both) for both in itertools.product(config.swa_start, config.swa_every)]


@dataclass
class Trained:
    """A model after training, with what led to it.

    Attributes:
        model: With its own weights; :meth:`averaged` swaps the averages in.
        fitted: Steps and time.
        averagers: By pair; none where nothing was averaged.
        curve: ``step``, dev figure ``live``, and ``average`` once there is one.
        best: The weights with the best dev figure, and their step, where training stops early.
    """

    model: Any
    fitted: FitResult = field(default_factory=FitResult)
    averagers: dict[str, WeightAverager] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    best: tuple[int, dict[str, Tensor]] | None = None

    @contextmanager
    def kept(self) -> Iterator[Any]:
        """The model with what the training gives: the first average, if there is one."""
        if self.averagers:
            with self.averaged(next(iter(self.averagers))):
                yield self.model
        else:
            yield self.model

    @contextmanager
    def averaged(self, key: str) -> Iterator[Any]:
        """The model with an average's weights in the block."""
        with self.averagers[key].swapped():
            yield self.model


class _Averaging:
    """SWA's schedule, and all averagers of one training."""

    def __init__(self, swa: SWA, others: list[WeightAverager]) -> None:
        self._swa, self._others, self._step = swa, others, 0

    def step(self) -> None:
        self._step += 1
        self._swa.step()
        for averager in self._others:
            averager.update(self._step)


def fit(
    task: Task[Any],
    config: SwaConfig,
    average: bool,
    epochs: int,
    seed: int,
    on_event: Callable[[dict[str, Any]], None],
    lr: float | None = None,
) -> Trained:
    """Trains a new model of a task: SWA, or linear decay of the learning rate to zero.

    Args:
        task: What to learn.
        config: Rates, batch size and when to average.
        average: Whether this is SWA.
        epochs: Epochs over the task's training data.
        seed: Of the model's head and of the order.
        on_event: As in :func:`~kdkernels.api.distill.train.fit`.
        lr: Peak learning rate; None for that of the configuration.
    """
    model = task.new_model(seed)
    found, pairs, step = Trained(model), pairs_of(config), 0
    keeper = _Best(found, task.higher_is_better, config.patience)

    def averaging(optimizer: torch.optim.Optimizer, steps: int) -> _Averaging:
        convention = {"count_start": config.convention == "paper"}
        rate = config.lr if config.swa_lr is None else config.swa_lr
        swa = SWA(
            model,
            optimizer,
            steps,
            start=pairs[0].start,
            every=pairs[0].every,
            lr_factor=rate / config.lr,
            warmup=train.WARMUP_FRACTION,
            **convention,
        )
        others = [
            make_averager(model, steps, start=pair.start, every=pair.every, **convention)
            for pair in pairs[1:]
        ]
        keys = [pair.key for pair in pairs]
        found.averagers = dict(zip(keys, [swa.averager, *others], strict=True))
        return _Averaging(swa, others)

    def evaluate() -> float:
        point = {"step": step, "live": _figure(task, model)}
        first = next(iter(found.averagers.values()), None)
        started = first is not None and first.started
        if started:
            with found.averaged(pairs[0].key):
                point["average"] = _figure(task, model)
                keeper.see(step, point["average"])
        elif not average:
            keeper.see(step, point["live"])
        found.curve.append(point)
        return point["average"] if started else point["live"]

    def loss_of(batch: Any) -> Tensor:
        nonlocal step
        step += 1
        return task.loss(model, batch)

    loop: Loop[Any] = Loop(
        loss=loss_of,
        evaluate=evaluate,
        metric="dev",
        size=task.size,
        on_event=on_event,
        schedule=averaging if average else train.linear_decay,
        stop=keeper.stop,
        tokens=task.tokens,
    )
    recipe = Recipe(
        epochs, lr or config.lr, config.batch_size, seed, evaluations=config.evaluations
    )
    steps = task.schedule(epochs, config.batch_size, seed)
    found.fitted = train.run(model, steps, loop, recipe)
    keeper.restore()
    return found


def figures(task: Task[Any], model: Any) -> dict[str, dict[str, float]]:
    """All figures of a model, by split."""
    return {split: task.evaluate(model, split) for split in ("dev", "test")}


def _figure(task: Task[Any], model: Any) -> float:
    return task.evaluate(model, "dev")[task.metric]


class _Best:
    """Keeps the weights with the best dev figure, where a patience is given."""

    def __init__(self, found: Trained, higher: bool, patience: int | None) -> None:
        self._found, self._sign, self._patience = found, 1 if higher else -1, patience
        self._score, self._worse = -float("inf"), 0

    def see(self, step: int, figure: float) -> None:
        """A figure of the weights that the model has now."""
        if self._patience is None:
            return
        if self._sign * figure > self._score:
            self._score, self._worse = self._sign * figure, 0
            weights = self._found.model.named_parameters()
            kept = {name: p.detach().clone() for name, p in weights if p.requires_grad}
            self._found.best = (step, kept)
        else:
            self._worse += 1

    def stop(self) -> bool:
        return self._patience is not None and self._worse >= self._patience

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the model the best weights; there is no average beside them then."""
        if self._found.best is None:
            return
        for name, weight in self._found.best[1].items():
            self._found.model.get_parameter(name).copy_(weight)
        self._found.averagers = {}
