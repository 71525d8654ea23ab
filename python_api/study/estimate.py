"""The dry run: which trials there are, and how long they will take by measured steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kdkernels.api.distill import train
from kdkernels.api.distill.pipeline import TEACHER_SEED
from kdkernels.api.distill.progress import Display
from kdkernels.api.distill.train import Runtime
from kdkernels.api.study import teacher
from kdkernels.api.study.config import StudyConfig
from kdkernels.api.study.grid import trials_of
from kdkernels.api.study.students import new_model
from kdkernels.api.study.tasks import RegularisedTask
from kdkernels.api.study.train import Trainer

# Of each kind of training: steps to warm up with, and steps that are timed, spread over an epoch.
WARM_UP, TIMED = 2, 6


@dataclass(frozen=True)
class Cost:
    """What one training of a kind takes, in seconds."""

    step: float
    steps: int
    rest: float

    @property
    def seconds(self) -> float:
        """Of the whole training with its evaluation."""
        return self.step * self.steps + self.rest


def dry_run(config: StudyConfig, runtime: Runtime, workers: int, display: Display) -> None:
    """Prints the trials and an estimate from measured step times.

    Args:
        config: The study.
        runtime: Device and precision.
        workers: Worker processes.
        display: Where to print.
    """
    trials = trials_of(config)
    for trial in trials:
        display.note(trial.title)
    display.note(f"{len(trials)} trials; measuring {TIMED} steps of each kind of training")
    with TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder), runtime, False, display.note)
        students: dict[Any, Cost] = {}
        teachers: dict[str, Cost] = {}
        for trial in trials:
            if trial.cell not in students:
                task = trainer.task(trial)
                model = new_model(task, trial.initialisation, 0, trial.dropout,
                                  trial.train_embeddings)  # fmt: skip
                students[trial.cell] = measure(task, model, trial.epochs, trial.batch_size, False)
                display.note(_line(" ".join(trial.cell), students[trial.cell]))
            if trial.teacher is not None and teacher.teacher_key(trial) not in teachers:
                taught, spec = trainer.task(trial, True), trial.teacher
                cost = measure(
                    taught, taught.new_model(TEACHER_SEED), spec.epochs, spec.batch_size, True
                )
                teachers[teacher.teacher_key(trial)] = cost
                display.note(_line(f"{trial.task.name} teacher {spec.name}", cost))
    total = sum(students[trial.cell].seconds for trial in trials)
    total += sum(cost.seconds for cost in teachers.values())
    shared = f", {_duration(total / workers)} by {workers} workers" if workers > 1 else ""
    display.note(
        f"estimate: {_duration(total)} of training for {len(trials)} trials and "
        f"{len(teachers)} teachers{shared}"
    )


def measure(task: RegularisedTask, model: Any, epochs: int, batch_size: int, logits: bool) -> Cost:
    """Times some steps and an evaluation of a kind of training.

    Args:
        task: The task.
        model: A new model of it.
        epochs: Epochs of the whole training.
        batch_size: Examples per step.
        logits: Whether the training examples are passed through the model at the end.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = train.make_optimizer(weights, 1e-5)
    schedule = task.schedule(epochs, batch_size, 0)
    spread = max(1, len(schedule) // epochs // TIMED)
    chosen = [*schedule[:WARM_UP], *schedule[::spread][:TIMED]]
    started = 0.0
    for number, step in enumerate(chosen):
        if number == min(WARM_UP, len(chosen) - 1):
            _wait(model)
            started = time.perf_counter()
        model.train()
        task.loss(model, step).backward()
        torch.nn.utils.clip_grad_norm_(weights, train.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _wait(model)
    step_seconds = (time.perf_counter() - started) / max(1, len(chosen) - WARM_UP)
    started = time.perf_counter()
    for split in ("dev", "test"):
        task.evaluate(model, split)
    if logits:
        task.train_logits(model)
    return Cost(step_seconds, len(schedule), time.perf_counter() - started)


def _wait(model: Any) -> None:
    """Until the GPU has done what it was given."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def _line(title: str, cost: Cost) -> str:
    return f"{title:<36} {1e3 * cost.step:6.1f} ms x {cost.steps}, in all {cost.seconds:.1f} s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
