"""What a run of recipes found, gathered from its completed units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdkernels.api.distill.recipes import ARMS, SOFT
from kdkernels.api.distill.results import TEACHER, Scores, unit_name

MEASURE = "measure-"


def measure_name(arm: str) -> str:
    """Name of the unit of work that measures an arm."""
    return f"{MEASURE}{arm}"


def arm_of(unit: str) -> str:
    """The arm of such a unit."""
    return unit.removeprefix(MEASURE)


@dataclass(frozen=True)
class RecipeRow(Scores):
    """One line of the main table.

    Attributes:
        dev_accuracies: Dev accuracy of each seed.
        parameters: Parameters of the model.
        step: What :func:`~kdkernels.api.distill.recipe_measure.measure` found of a training step;
            None for the teacher.
        losses: The same of the losses alone.
    """

    dev_accuracies: list[float]
    parameters: int
    step: Mapping[str, Any] | None
    losses: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RecipeResults:
    """Everything the tables, the picture and the report show.

    Attributes:
        rows: Teacher, soft labels, and every recipe.
        phases: Seconds by phase.
        best: The unit whose student was kept.
    """

    rows: list[RecipeRow]
    phases: dict[str, float]
    best: str

    def row(self, arm: str) -> RecipeRow:
        """The row of an arm."""
        return next(row for row in self.rows if row.arm == arm)

    @property
    def recipes(self) -> list[RecipeRow]:
        """The rows of the recipes."""
        return [row for row in self.rows if row.arm not in (TEACHER, SOFT)]


def _row(
    arm: str, title: str, units: Sequence[dict[str, Any]], measured: Mapping[str, Any] | None
) -> RecipeRow:
    return RecipeRow(
        arm=arm,
        title=title,
        accuracies=[unit["test_accuracy"] for unit in units],
        curves=[[(step, value) for step, value in unit["curve"]] for unit in units],
        dev_accuracies=[u["dev_accuracy"] for u in units if u["dev_accuracy"] is not None],
        parameters=units[0]["parameters"],
        step=None if measured is None else measured["step"],
        losses=[] if measured is None else measured["losses"],
    )


def gather(
    units: Mapping[str, dict[str, Any]], arms: Sequence[str], seeds: Sequence[int]
) -> RecipeResults:
    """Builds the results from the units' result files.

    Args:
        units: Result of every unit by name.
        arms: The run's arms, in order.
        seeds: The run's seeds.
    """
    rows = [_row(TEACHER, TEACHER, [units[TEACHER]], None)]
    phases = {TEACHER: units[TEACHER]["seconds"]}
    for arm in arms:
        title, chosen = ARMS[arm].title, [units[unit_name(arm, seed)] for seed in seeds]
        rows.append(_row(arm, title, chosen, units[measure_name(arm)]))
        phases[f"students, {title}"] = sum(unit["seconds"] for unit in chosen)
    phases["measuring"] = sum(units[measure_name(arm)]["seconds"] for arm in arms)
    return RecipeResults(rows, phases, units["student"]["best"])


def as_json(found: RecipeResults) -> dict[str, Any]:
    """The results for ``results.json``."""
    return {
        "arms": {
            row.arm: {
                "title": row.title,
                "test_accuracy": row.accuracies,
                "test_accuracy_mean": row.mean,
                "test_accuracy_spread": row.spread,
                "dev_accuracy": row.dev_accuracies,
                "parameters": row.parameters,
                "step": row.step,
                "losses": list(row.losses),
            }
            for row in found.rows
        },
        "student": found.best,
        "seconds": found.phases,
    }
