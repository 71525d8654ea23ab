"""The pictures of a study: intervals for each arm, and accuracy against cost."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kdkernels.api.study.analysis import Analysis, Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe-Ito colours: told apart also by readers who do not see red and green as different.
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555", "#F0E442")
COLUMNS = 3
WIDTH, HEIGHT = 3.7, 2.6


def intervals(found: Analysis) -> str:
    """Each arm against the baseline: the mean difference and its 95 % interval, as SVG."""
    cells = [cell for cell in found.cells if cell.comparisons]
    colours = _colours(found)

    def draw(axes: Axes, cell: Cell) -> None:
        axes.axvspan(-found.margin, found.margin, color="#eeeeee", zorder=0)
        axes.axvline(0.0, color="#888888", linewidth=0.8, zorder=1)
        for place, c in enumerate(cell.comparisons):
            colour = colours[c.arm]
            if c.interval is not None:
                axes.plot(c.interval, (place, place), color=colour, linewidth=2)
            axes.plot([c.mean], [place], "o", color=colour, markersize=5)
        axes.set_yticks(range(len(cell.comparisons)), [c.arm for c in cell.comparisons])
        axes.invert_yaxis()
        axes.set_xlabel("points better than ft", fontsize=8)

    return _svg(cells, draw)


def costs(found: Analysis) -> str:
    """The test figure of each arm against the seconds one model takes, as SVG."""
    colours = _colours(found)

    def draw(axes: Axes, cell: Cell) -> None:
        for arm in cell.arms:
            spread = arm.spread or 0.0
            axes.errorbar(
                [arm.seconds], [arm.mean], [spread], fmt="o", color=colours[arm.name],
                markersize=5, linewidth=1.2, label=arm.name,
            )  # fmt: skip
        axes.set_xlim(0.0, None)
        axes.set_xlabel("seconds a model, its teacher's included", fontsize=8)
        axes.set_ylabel(f"test {cell.metric}", fontsize=8)

    return _svg(found.cells, draw)


def _colours(found: Analysis) -> dict[str, str]:
    names = dict.fromkeys(arm.name for cell in found.cells for arm in cell.arms)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _svg(cells: Sequence[Cell], draw: Callable[[Any, Cell], None]) -> str:
    """One panel for each cell, as an SVG element that needs nothing else."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = min(COLUMNS, max(1, len(cells)))
    rows = max(1, math.ceil(len(cells) / columns))
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(cells):
            axes.set_axis_off()
            continue
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_title(cells[place].title, loc="left", fontsize=9)
        draw(axes, cells[place])
    labelled = dict(
        (label, handle)
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    )
    if labelled:
        figure.legend(
            labelled.values(), labelled, loc="outside lower center", ncols=len(labelled),
            frameon=False, fontsize=8,
        )  # fmt: skip
    target = io.StringIO()
    # The same results give the same file: no date, and ids that do not depend on the moment.
    with matplotlib.rc_context({"svg.hashsalt": "kdkernels", "svg.fonttype": "none"}):
        figure.savefig(target, format="svg", metadata={"Date": None})
    text = target.getvalue()
    return text[text.index("<svg") :]
