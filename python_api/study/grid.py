"""The trials of a study: the product of its lists, each trial with a stable key."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from kdkernels.api.distill.fetch import sha256_of
from kdkernels.api.methods.label_regularisation import LabelRegulariser
from kdkernels.api.study.config import (
    BASELINE,
    MethodSpec,
    Scalar,
    StudentSpec,
    StudyConfig,
    TaskSpec,
    TeacherSpec,
)

# Goes into every key: raised when a trial of the same values would give other figures.
VERSION = 1


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        task: The task.
        student: The model.
        initialisation: ``pretrained`` or ``scratch``.
        arm: Name of the arm.
        method: Its method.
        parameters: The method's parameters that were chosen, by name.
        lr: Peak learning rate.
        seed: The seed.
        epochs: Epochs.
        batch_size: Examples per step.
        train_embeddings: As in the configuration.
        dropout: As in the configuration.
        precision: As in the configuration.
        teacher: The teacher, of a method that needs one.
    """

    task: TaskSpec
    student: StudentSpec
    initialisation: str
    arm: str
    method: str
    parameters: Mapping[str, Scalar]
    lr: float
    seed: int
    epochs: int
    batch_size: int
    train_embeddings: bool
    dropout: bool
    precision: str
    teacher: TeacherSpec | None = field(default=None)

    @property
    def loss(self) -> LabelRegulariser:
        """What it learns by."""
        return LabelRegulariser(self.method, **self.parameters)

    @property
    def cell(self) -> tuple[str, str, str]:
        """What arms are compared within: task, student, initialisation."""
        return self.task.name, self.student.name, self.initialisation

    @property
    def candidate(self) -> str:
        """What is chosen on dev within an arm: the method's parameters and the learning rate."""
        shown = [*(f"{key}={value:g}" if _is_number(value) else f"{key}={value}"
                   for key, value in self.parameters.items()), f"lr={self.lr:g}"]  # fmt: skip
        return " ".join(shown)

    @property
    def title(self) -> str:
        """Its name for people."""
        return " ".join([*self.cell, self.arm, self.candidate, f"seed={self.seed}"])

    @cached_property
    def key(self) -> str:
        """What identifies it in every store: readable, then a digest of all that determines it.

        The names of arms are left out: an arm may be called something else later.
        """
        parts = [*self.cell, self.method, *self.candidate.split(), f"seed={self.seed}"]
        return f"{'/'.join(parts)}#{digest(self.settings)}"

    @property
    def settings(self) -> dict[str, Any]:
        """All that determines the result, as plain values."""
        values = dataclasses.asdict(self)
        del values["arm"]
        values["parameters"] = self.loss.parameters  # with the defaults
        values["student"] = {k: values["student"][k] for k in ("model", "layers")}
        values["task"] = task_settings(self.task)
        if self.teacher is not None:
            values["teacher"] = teacher_settings(self.teacher)
        return values

    def baseline(self) -> Trial:
        """The fine-tuning of the same student, task, learning rate and seed: a self-teacher."""
        return dataclasses.replace(self, arm=BASELINE, method="ft", parameters={}, teacher=None)


def _is_number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def task_settings(task: TaskSpec) -> dict[str, Any]:
    """What determines the examples of a task; of files their content."""
    values = {**dataclasses.asdict(task), "task": task.kind}
    for key in ("name", "epochs"):
        del values[key]
    if task.data is not None:
        values["data"] = _content(task.data)
    return values


def teacher_settings(teacher: TeacherSpec) -> dict[str, Any]:
    """What determines a teacher."""
    values = dataclasses.asdict(teacher)
    del values["name"]
    return values


@cache
def _content(path: str) -> str:
    """A digest of a file, or of the files in a folder."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    listed = [(str(file.relative_to(root)), sha256_of(file)) for file in files]
    return digest({"files": listed})


def digest(values: Mapping[str, Any]) -> str:
    """Twelve hex digits of plain values, whatever the order of their keys."""
    text = json.dumps({"version": VERSION, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def trials_of(config: StudyConfig) -> list[Trial]:
    """All trials, seed by seed: a study that is stopped early has every arm.

    Within a seed the baselines come first: what learns from itself learns from them.
    """
    arms = sorted(config.methods, key=lambda method: method.method != BASELINE)
    found = []
    for seed in config.seeds:
        for task, student in itertools.product(config.tasks, config.students):
            for initialisation in config.initialisations_of(student):
                for arm, lr in itertools.product(arms, config.lr[initialisation]):
                    for parameters in _combinations(arm):
                        found.append(
                            _trial(config, task, student, initialisation, arm, parameters, lr, seed)
                        )
    return found


def _combinations(arm: MethodSpec) -> Iterator[dict[str, Scalar]]:
    for values in itertools.product(*arm.parameters.values()):
        yield dict(zip(arm.parameters, values, strict=True))


def _trial(
    config: StudyConfig,
    task: TaskSpec,
    student: StudentSpec,
    initialisation: str,
    arm: MethodSpec,
    parameters: dict[str, Scalar],
    lr: float,
    seed: int,
) -> Trial:
    taught = LabelRegulariser(arm.method).teacher == "teacher"
    return Trial(
        task=task,
        student=student,
        initialisation=initialisation,
        arm=arm.name,
        method=arm.method,
        parameters=parameters,
        lr=lr,
        seed=seed,
        epochs=task.epochs or config.epochs,
        batch_size=config.batch_size,
        train_embeddings=config.train_embeddings,
        dropout=config.dropout,
        precision=config.precision,
        teacher=config.teacher_of(student) if taught else None,
    )
