"""The picture of one or several runs' logs: losses, their parts, dev figures, speed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdkernels.api.distill.log import UnitLog, read_log
from kdkernels.api.distill.store import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe-Ito colours and a grey, as in the other pictures.
CYCLE = ("#E69F00", "#009E73", "#56B4E9", "#D55E00", "#0072B2", "#CC79A7", "#555555", "#B8A800")
STYLES = ("-", "--", ":", "-.")
DPI = 130
FEW = 20


def save(path: Path, runs: Sequence[Path]) -> None:
    """Draws the logs of runs into one PNG file.

    One colour for each kind of training (a run's arm), whatever its seed; parts of a loss differ by
    line style.

    Args:
        path: The file, written whole or not at all.
        runs: Folders of runs.

    Raises:
        DistillError: One of them has no log.
    """
    logs = [(run, read_log(run)) for run in runs]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    loss, dev, parts, speed = axes.flat
    figures = set()
    for colour, label, log in _coloured(logs):
        _line(loss, log.loss, colour, label)
        _line(dev, log.dev, colour, label)
        _line(speed, log.speed, colour, label)
        for style, (name, points) in zip(
            itertools.cycle(STYLES), sorted(log.parts.items()), strict=False
        ):
            _line(parts, points, colour, label and f"{label}, {name}", style)
        figures |= {log.figure} - {""}
    titles = {loss: "loss", parts: "parts of the loss", speed: "tokens a second"}
    titles[dev] = f"dev {' / '.join(sorted(figures)) or 'figure'}"
    for panel, title in titles.items():
        _finish(panel, title)
    write_file(path, lambda target: figure.savefig(target, dpi=DPI, format="png"))


def _coloured(
    logs: Sequence[tuple[Path, dict[str, UnitLog]]],
) -> Iterator[tuple[str, str | None, UnitLog]]:
    """Colour, label and log of each training; of several seeds the first has the label."""
    colours: dict[str, str] = {}
    cycle = itertools.cycle(CYCLE)
    names = [run.resolve().name for run, _ in logs]
    for run, units in logs:
        for unit, log in units.items():
            arm = re.sub(r"-seed\d+$", "", unit)
            name = run.resolve().name if len(set(names)) == len(names) else run
            label = arm if len(logs) == 1 else f"{name}: {arm}"
            first = label not in colours
            yield (
                colours.setdefault(label, next(cycle) if first else ""),
                label if first else None,
                log,
            )


def _line(
    axes: Axes,
    points: Sequence[tuple[int, float]],
    colour: str,
    label: str | None,
    style: str = "-",
) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) <= FEW else None  # of one point there is no line
        axes.plot(
            steps, values, style, color=colour, label=label, marker=marker, markersize=3,
            linewidth=1.3, alpha=0.8,
        )  # fmt: skip


def _finish(axes: Axes, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("training step")
    if axes.lines:
        axes.legend(frameon=False, fontsize=7)
    else:
        axes.annotate("not in the log", (0.5, 0.5), xycoords="axes fraction", ha="center")
