"""What a run of the language-model objective found, gathered from its completed units."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdkernels.api.distill.results import unit_name

# Arms in the order of the tables: name in the files, name for people.
ARMS = {
    "ce": "cross-entropy alone",
    "live": "distilled, live teacher",
    "cached": "distilled, cached top-k",
}
TEACHER = "teacher"
START = "start"


def figure(perplexity: float) -> str:
    """A perplexity as shown: there are some of eight digits before training."""
    return f"{perplexity:.1f}" if perplexity < 1e5 else f"{perplexity:.1e}"


@dataclass(frozen=True)
class LmRow:
    """One line of the main table.

    Attributes:
        arm: Key of the arm.
        title: Its name for people.
        perplexities: Test perplexity of each seed.
        dev_perplexities: The same on the dev text.
        parameters: Parameters of the model.
        training_rate: Tokens per second in training, teacher included; None where nothing was
            trained.
        seconds: Seconds in training steps, mean over the seeds; None where nothing was trained.
        curves: Dev curve of each seed: ``(step, perplexity)``.
    """

    arm: str
    title: str
    perplexities: list[float]
    dev_perplexities: list[float]
    parameters: int
    training_rate: float | None
    seconds: float | None
    curves: list[list[tuple[int, float]]]

    @property
    def mean(self) -> float:
        """Mean test perplexity over the seeds."""
        return statistics.mean(self.perplexities)

    @property
    def text(self) -> str:
        """Test perplexity as shown in tables."""
        if len(self.perplexities) == 1:
            return figure(self.mean)
        return f"{figure(self.mean)} ± {figure(statistics.stdev(self.perplexities))}"


@dataclass(frozen=True)
class LmResults:
    """Everything the tables, the picture and the report show.

    Attributes:
        rows: Teacher, untrained student, and every arm.
        routes: What :func:`~kdkernels.api.distill.lm_measure.routes` measured.
        phases: Seconds by phase.
        cache_bytes: Size of the teacher's cache on the disk.
        best: The unit whose student was kept.
    """

    rows: list[LmRow]
    routes: list[dict[str, Any]]
    phases: dict[str, float]
    cache_bytes: int
    best: str

    def row(self, arm: str) -> LmRow:
        """The row of an arm."""
        return next(row for row in self.rows if row.arm == arm)


def _row(arm: str, title: str, units: Sequence[dict[str, Any]]) -> LmRow:
    trained = [unit for unit in units if "tokens" in unit]
    rates = [unit["tokens"] / unit["train_seconds"] for unit in trained]
    return LmRow(
        arm=arm,
        title=title,
        perplexities=[unit["test_perplexity"] for unit in units],
        dev_perplexities=[unit["dev_perplexity"] for unit in units],
        parameters=units[0]["parameters"],
        training_rate=statistics.median(rates) if rates else None,
        seconds=statistics.mean(unit["train_seconds"] for unit in trained) if trained else None,
        curves=[[(step, value) for step, value in unit["curve"]] for unit in trained],
    )


def gather(units: Mapping[str, dict[str, Any]], seeds: Sequence[int]) -> LmResults:
    """Builds the results from the units' result files.

    Args:
        units: Result of every unit by name.
        seeds: The run's seeds.
    """
    rows = [
        _row(TEACHER, TEACHER, [units[TEACHER]]),
        _row(START, "student, before training", [units[START]]),
    ]
    phases = {
        "teacher, evaluation": units[TEACHER]["seconds"],
        "student before training, evaluation": units[START]["seconds"],
        "teacher's cache": units["cache"]["seconds"],
    }
    for arm, title in ARMS.items():
        chosen = [units[unit_name(arm, seed)] for seed in seeds]
        rows.append(_row(arm, f"student, {title}", chosen))
        phases[f"students, {title}"] = sum(unit["seconds"] for unit in chosen)
    phases["measuring the loss routes"] = units["routes"]["seconds"]
    return LmResults(
        rows=rows,
        routes=units["routes"]["routes"],
        phases=phases,
        cache_bytes=units["cache"]["bytes"],
        best=units["student"]["best"],
    )
