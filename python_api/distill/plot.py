"""The picture of a run: dev curves and test bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kdkernels.api.distill.results import TEACHER, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito colours: told apart also by readers who do not see red and green as different.
COLOURS = {
    TEACHER: "#555555",
    "labels": "#E69F00",
    "hard": "#56B4E9",
    "distilled": "#009E73",
    # Of the language-model objective.
    "ce": "#E69F00",
    "live": "#009E73",
    "cached": "#56B4E9",
    # Of weight averaging.
    "ft": "#E69F00",
    "swa": "#D55E00",
    "kd": "#56B4E9",
    "kd-swa": "#0072B2",
    # Of causal distillation.
    "diito": "#D55E00",
    "kd-time": "#0072B2",
    # Of recipes.
    "soft": "#E69F00",
    "tinybert": "#009E73",
    "pkd": "#56B4E9",
    "minilm": "#CC79A7",
    "distilbert": "#D55E00",
}


class Compared(Protocol):
    """Results of any run of classifiers."""

    @property
    def rows(self) -> Sequence[Scores]:
        """One for each arm, the teacher's among them."""

    def row(self, arm: str) -> Scores:
        """The row of an arm."""


def save(path: Path, found: Compared) -> None:
    """Draws the picture into a PNG file."""
    figure, (curves, bars) = panels()
    _draw_curves(curves, found)
    _draw_bars(bars, found)
    figure.savefig(path, dpi=150)


def panels() -> tuple[Figure, tuple[Axes, Axes]]:
    """An empty picture: curves on the left, what came out on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, (curves, bars)


def _draw_curves(axes: Axes, found: Compared) -> None:
    """Dev accuracy against training steps: the mean over seeds, and the range as a band."""
    for row in found.rows:
        if row.arm == TEACHER or not row.curves[0]:
            continue
        steps = [step for step, _ in row.curves[0]]
        values = list(zip(*[[value for _, value in curve] for curve in row.curves], strict=True))
        means = [sum(at_step) / len(at_step) for at_step in values]
        colour = COLOURS[row.arm]
        axes.plot(steps, means, color=colour, marker="o", markersize=4, label=row.title)
        axes.fill_between(
            steps,
            [min(v) for v in values],
            [max(v) for v in values],
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
    teacher = found.row(TEACHER).curves[0]
    if teacher:
        axes.axhline(
            teacher[-1][1],
            color=COLOURS[TEACHER],
            linestyle="--",
            linewidth=1.2,
            label="teacher, at its end",
        )
    axes.set(xlabel="training step", ylabel="dev accuracy, %", xlim=(0, None))
    axes.set_title("while training (band: range over seeds)", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_bars(axes: Axes, found: Compared) -> None:
    """Test accuracy of each arm: mean as bar, seeds as dots."""
    for i, row in enumerate(found.rows):
        axes.bar(i, row.mean, width=0.62, color=COLOURS[row.arm], alpha=0.85)
        if row.spread is not None:
            axes.scatter([i] * len(row.accuracies), row.accuracies, s=14, color="black", zorder=3)
        axes.annotate(
            # Side by side there is room for four.
            row.accuracy_text.replace(" ±", "\n±") if len(found.rows) > 4 else row.accuracy_text,
            (i, max(row.accuracies)),
            xytext=(0, 6),
            ha="center",
            fontsize=8,
            textcoords="offset points",
        )
    axes.set_xticks(range(len(found.rows)), [row.title for row in found.rows], fontsize=8)
    low, high = _limits(found.rows)
    axes.set_ylim(low, high)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"at the end (axis starts at {low:.0f} %)", loc="left", fontsize=10)


def _limits(rows: Sequence[Scores]) -> tuple[float, float]:
    """Axis limits that show the differences: the bars are compared with each other, not with 0."""
    values = [value for row in rows for value in row.accuracies]
    margin = max(2.0, (max(values) - min(values)) * 0.6)
    return max(0.0, float(int(min(values) - margin))), min(105.0, max(values) + margin / 2)
