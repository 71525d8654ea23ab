"""The report of a run of causal distillation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdkernels.api.distill.arm_report import (
    DIFFERENCE_COLUMNS,
    cells_of,
    columns_of,
    difference_cells,
    findings,
    save_plot,
)
from kdkernels.api.distill.arm_results import ArmResults, as_json
from kdkernels.api.distill.diito_config import DiitoConfig
from kdkernels.api.distill.diito_train import weights_of
from kdkernels.api.distill.report import closing
from kdkernels.api.distill.store import write_file, write_text
from kdkernels.api.distill.tables import markdown_table
from kdkernels.api.distill.task import Task
from kdkernels.api.distill.train import Runtime

WORDS = {
    "kd_weight": "KL",
    "ce_weight": "cross-entropy",
    "cosine_weight": "cosine",
    "cf_weight": "counterfactual KL",
    "cf_cosine_weight": "counterfactual cosine",
}


def write(
    folder: Path,
    config: DiitoConfig,
    found: ArmResults,
    task: Task[Any],
    runtime: Runtime,
    pace: Mapping[str, Any] | None,
) -> None:
    """Writes the picture, the report and the results into the run's folder."""
    write_file(folder / "curves.png", lambda path: save_plot(path, found))
    results = as_json(found) | {"pace": pace, "steps": _steps(found)}
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "report.md", markdown(config, found, task, runtime, pace))


def markdown(
    config: DiitoConfig,
    found: ArmResults,
    task: Task[Any],
    runtime: Runtime,
    pace: Mapping[str, Any] | None,
) -> str:
    """The report as Markdown."""
    each = "\n".join(
        f"- {arm.title}: " + ", ".join(f"{value:.2f}" for value in arm.test) for arm in found.arms
    )
    differences = [difference_cells(difference) for difference in found.differences]
    columns = (*columns_of(found), "steps", "training,\ns a seed")
    lines = [
        (*cells_of(arm, found), str(arm.units[0]["steps"]), f"{_seconds(arm.units):.0f}")
        for arm in found.arms
    ]
    parts = [
        f"# Causal distillation, run `{config.name}`",
        markdown_table(columns, lines),
        f"Mean and standard deviation over seeds {', '.join(map(str, config.seeds))}. Peak "
        f"learning rate {config.lr:g}, linear decay to zero, {config.epochs} epochs. "
        f"{_loss_text(config)} {_exchange(config)}",
        markdown_table(DIFFERENCE_COLUMNS, differences) if differences else "",
        "\n".join(findings(found)),
        _pace_text(pace),
        "![Dev figures while training, and test figures](curves.png)",
        f"Test figure of each seed:\n\n{each}",
        f"## Data\n\n{task.source}. The dev examples chose which model is in `student/` "
        f"({found.best}); the test examples chose nothing.",
        *closing(task.licences, config, found.phases, runtime),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _steps(found: ArmResults) -> dict[str, int]:
    return {arm.name: arm.units[0]["steps"] for arm in found.arms}


def _seconds(units: Any) -> float:
    return sum(unit["train_seconds"] for unit in units) / len(units)


def _loss_text(config: DiitoConfig) -> str:
    texts = []
    for name, interchanges in (("DIITO", True), ("distilled", False)):
        weights = weights_of(config, interchanges)
        named = ", ".join(f"{v:.3g} {WORDS[key]}" for key, v in weights.items() if v)
        texts.append(f"{name}: {named}")
    return f"Loss: {'; '.join(texts)}."


def _exchange(config: DiitoConfig) -> str:
    return (
        f"Alignment `{config.alignment}`, {config.index_mode}; {config.share:.0%} of the shorter "
        f"text, {config.positions} positions."
    )


def _pace_text(pace: Mapping[str, Any] | None) -> str:
    if pace is None:
        return ""
    return (
        f"A step with interchanges took {pace['ratio']:.2f} times one without (median of steps in "
        "turn); *same time* trains for so many times the steps."
    )
