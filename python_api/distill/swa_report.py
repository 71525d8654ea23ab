"""The report of a run with weight averaging, or of fine-tuning alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdkernels.api.distill.arm_report import (
    DIFFERENCE_COLUMNS,
    averaged,
    cells_of,
    columns_of,
    difference_cells,
    findings,
    save_plot,
    sweep_of,
)
from kdkernels.api.distill.arm_results import ArmResults, as_json
from kdkernels.api.distill.report import closing
from kdkernels.api.distill.store import write_file, write_text
from kdkernels.api.distill.swa_config import SwaConfig
from kdkernels.api.distill.tables import markdown_table
from kdkernels.api.distill.task import Task
from kdkernels.api.distill.train import Runtime


def markdown(config: SwaConfig, found: ArmResults, task: Task[Any], runtime: Runtime) -> str:
    """The report as Markdown."""
    each = "\n".join(
        f"- {arm.title}: " + ", ".join(f"{value:.2f}" for value in arm.test) for arm in found.arms
    )
    differences = [difference_cells(difference) for difference in found.differences]
    columns, lines = sweep_of(found)
    parts = [
        f"# {'Fine-tuning' if found.plain else 'Weight averaging'}, run `{config.name}`",
        markdown_table(columns_of(found), [cells_of(arm, found) for arm in found.arms]),
        f"Mean and standard deviation over seeds {', '.join(map(str, config.seeds))}. Peak "
        f"learning rate {config.lr:g}. {_schedules(config, found)}",
        markdown_table(DIFFERENCE_COLUMNS, differences) if differences else "",
        "\n".join(findings(found)),
        "![Dev figures while training, and test figures](curves.png)",
        f"Test figure of each seed:\n\n{each}",
        f"## Averages of the same trainings\n\n{markdown_table(columns, lines)}" if lines else "",
        f"## Data\n\n{task.source}. The dev examples chose which model is in `student/` "
        f"({found.best}){' and when to stop' if config.patience else ''}; the test examples chose "
        "nothing.",
        *closing(task.licences, config, found.phases, runtime),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _schedules(config: SwaConfig, found: ArmResults) -> str:
    """How the learning rate went, and what the columns about averages are."""
    if not averaged(found):
        return "Linear decay to zero."
    rate = config.lr if config.swa_lr is None else config.swa_lr
    first = f"{config.swa_start[0]:g} of the training, every {config.swa_every[0]} steps"
    counted = "counts" if config.convention == "paper" else "does not count"
    return (
        f"Fine-tuning and distilled: linear decay to zero. SWA: a constant {rate:g} while "
        f"averaging, from {first}; the model at the start {counted}. *Not averaged* are the last "
        "weights of the same training; *models*: how many are in the average."
    )


def write(
    folder: Path, config: SwaConfig, found: ArmResults, task: Task[Any], runtime: Runtime
) -> None:
    """Writes the picture, the report and the results into the run's folder."""
    write_file(folder / "curves.png", lambda path: save_plot(path, found))
    write_text(folder / "results.json", json.dumps(as_json(found), indent=1) + "\n")
    write_text(folder / "report.md", markdown(config, found, task, runtime))
