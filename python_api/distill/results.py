"""What a run found, gathered from its completed units."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Arms in the order of the tables: name in the files, name for people.
ARMS = {
    "labels": "labels only",
    "hard": "hard labels",
    "distilled": "distilled",
}
TEACHER = "teacher"


def unit_name(arm: str, seed: int) -> str:
    """Name of the unit of work of one arm and seed."""
    return f"{arm}-seed{seed}"


@dataclass(frozen=True)
class Scores:
    """What every table and picture shows of an arm.

    Attributes:
        arm: Key of the arm.
        title: Its name for people.
        accuracies: Test accuracy of each seed, percent.
        curves: Dev curve of each seed: ``(step, accuracy)``.
    """

    arm: str
    title: str
    accuracies: list[float]
    curves: list[list[tuple[int, float]]]

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def accuracy_text(self) -> str:
        """Accuracy as shown in tables."""
        return f"{self.mean:.2f}" + (f" ± {self.spread:.2f}" if self.spread is not None else "")


@dataclass(frozen=True)
class Row(Scores):
    """One line of the main table.

    Attributes:
        parameters: Parameters of the model.
        training_rate: Texts per second in training, or None where nothing was trained.
        inference_rate: Texts per second read, timed in turns with the other model.
        loss_fused: Microseconds of the loss per step, forward and backward, fused code.
        loss_eager: The same with eager code.
    """

    parameters: int
    training_rate: float | None
    inference_rate: float
    loss_fused: float
    loss_eager: float


@dataclass(frozen=True)
class Results:
    """Everything the tables, the picture and the report show."""

    rows: list[Row]
    phases: dict[str, float]
    throughput: list[Mapping[str, Any]]
    best_seed: int

    def row(self, arm: str) -> Row:
        """The row of an arm."""
        return next(row for row in self.rows if row.arm == arm)


def _row(arm: str, title: str, units: list[dict[str, Any]], speed: Mapping[str, Any]) -> Row:
    times = speed["loss"]["logits" if arm == "distilled" else "labels"]
    rates = [unit["examples"] / unit["train_seconds"] for unit in units if unit["examples"]]
    return Row(
        arm=arm,
        title=title,
        accuracies=[unit["test_accuracy"] for unit in units],
        parameters=units[0]["parameters"],
        training_rate=statistics.median(rates) if rates else None,
        inference_rate=speed["inference"]["teacher" if arm == TEACHER else "student"],
        loss_fused=times["fused"],
        loss_eager=times["eager"],
        curves=[[(step, value) for step, value in unit["curve"]] for unit in units],
    )


def gather(units: Mapping[str, dict[str, Any]], seeds: tuple[int, ...]) -> Results:
    """Builds the results from the units' result files.

    Args:
        units: Result of every unit by name.
        seeds: The run's seeds.
    """
    speed = units["speed"]
    rows = [_row(TEACHER, TEACHER, [units[TEACHER]], speed)]
    phases = {"teacher": units[TEACHER]["seconds"], "teacher logits": units["logits"]["seconds"]}
    for arm, title in ARMS.items():
        chosen = [units[unit_name(arm, seed)] for seed in seeds]
        rows.append(_row(arm, title, chosen, speed))
        phases[f"students, {title}"] = sum(unit["seconds"] for unit in chosen)
    phases["timing loss and inference"] = units["speed"]["seconds"]
    throughput = units["throughput"]["rows"] if "throughput" in units else []
    if throughput:
        phases["throughput table"] = units["throughput"]["seconds"]
    return Results(rows, phases, throughput, units["student"]["seed"])
