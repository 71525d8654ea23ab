"""The log of a run, ``log.jsonl``: written while models train, read to draw their curves.

A line is one JSON object. ``event`` is ``step`` (``step``, ``loss``, its ``parts``, ``lr``,
``tokens_per_s``), every 20 steps and at the last, or ``evaluation`` (``step``, ``split`` and one
figure); ``unit`` says of which training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdkernels.api.distill.errors import require
from kdkernels.api.distill.progress import Bar
from kdkernels.api.distill.store import LOG_NAME, RunFolder

KEPT = ("step", "loss", "parts", "lr", "tokens_per_s")
# What training loops call the figure of an evaluation.
METRICS = ("dev", "dev_accuracy", "dev_perplexity")


def listener(
    folder: RunFolder, unit: str, bar: Bar, figure: str
) -> Callable[[dict[str, Any]], None]:
    """What takes the events of a training: the screen, and the run's log.

    Args:
        folder: The run.
        unit: Name of the training.
        bar: Its bar.
        figure: What the dev figure is called in the log.
    """

    def on_event(event: dict[str, Any]) -> None:
        bar.event(event)
        if "loss" in event:
            folder.log(unit, event="step", **{key: event[key] for key in KEPT if key in event})
        for key in METRICS:
            if key in event:
                values = {"step": event["step"], "split": "dev", figure: event[key]}
                folder.log(unit, event="evaluation", **values)

    return on_event


@dataclass
class UnitLog:
    """What the log has of one training, each as points ``(step, value)``.

    Attributes:
        loss: The loss of a step.
        parts: The parts of it by name.
        lr: The learning rate.
        speed: Tokens a second.
        dev: The dev figure.
        figure: Its name.
    """

    loss: list[tuple[int, float]] = field(default_factory=list)
    parts: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    lr: list[tuple[int, float]] = field(default_factory=list)
    speed: list[tuple[int, float]] = field(default_factory=list)
    dev: list[tuple[int, float]] = field(default_factory=list)
    figure: str = ""

    def add(self, line: dict[str, Any]) -> None:
        """Takes the values of a line."""
        step = line.get("step", 0)
        if line.get("event") == "step":
            for key, points in (("loss", self.loss), ("lr", self.lr), ("tokens_per_s", self.speed)):
                if key in line:
                    points.append((step, line[key]))
            for name, value in line.get("parts", {}).items():
                self.parts.setdefault(name, []).append((step, value))
        elif line.get("event") == "evaluation" and line.get("split") == "dev":
            self.figure = min(line.keys() - {"unit", "event", "step", "split"})
            self.dev.append((step, line[self.figure]))


def read_log(run: Path) -> dict[str, UnitLog]:
    """The log of a run by training, finished or not.

    Args:
        run: The run's folder.

    Raises:
        DistillError: It has no log, or one without a single step.
    """
    path = run / LOG_NAME
    require(path.is_file(), "run", f"be a folder with a {LOG_NAME}", run)
    found: dict[str, UnitLog] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the line that a running or a killed process has not finished
        found.setdefault(line["unit"], UnitLog()).add(line)
    found = {unit: log for unit, log in found.items() if log.loss or log.dev}
    require(len(found) > 0, "run", "have logged a step of a training", f"none in {path}")
    return found
