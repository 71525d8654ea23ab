"""Tables, sentences and the picture of a run that compares arms over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kdkernels.api.distill import plot
from kdkernels.api.distill.arm_results import Arm, ArmResults, Difference, mean_text, title_of
from kdkernels.api.distill.tables import rich_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A p-value below which a difference is called one.
SIGNIFICANT = 0.05


def columns_of(found: ArmResults) -> tuple[str, ...]:
    """Heads of the table of arms."""
    others = [f"test\n{name}" for name in _others(found)]
    metric = found.metric
    averages = ("not\naveraged", "models") if averaged(found) else ()
    return ("model", f"test\n{metric}", *others, f"dev\n{metric}", *averages)


def averaged(found: ArmResults) -> bool:
    """Whether any arm has averages."""
    return any(arm.averages for arm in found.arms)


def _others(found: ArmResults) -> list[str]:
    """Further test figures of the task."""
    return [name for name in found.arms[0].units[0]["kept"]["test"] if name != found.metric]


def cells_of(arm: Arm, found: ArmResults) -> tuple[str, ...]:
    """An arm's line in that table."""
    others = [mean_text(arm.other(name)) for name in _others(found)]
    live = mean_text(arm.of("live", "test")) if arm.averages else "-"
    count = str(next(iter(arm.units[0]["models"].values()))) if arm.averages else "-"
    averages = (live, count) if averaged(found) else ()
    return (arm.title, mean_text(arm.test), *others, mean_text(arm.of("kept", "dev")), *averages)


def difference_cells(difference: Difference) -> tuple[str, ...]:
    """A line of the table of differences."""
    width = "-" if difference.interval is None else f"± {difference.interval:.2f}"
    p = "-" if difference.p is None else _p_text(difference.p).removeprefix("= ")
    names = f"{title_of(difference.arm)} against {title_of(difference.against)}"
    return names, f"{difference.mean:+.2f}", width, p


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


DIFFERENCE_COLUMNS = ("by seed", "better\nby", "95 %\ninterval", "paired\nt-test, p")


def sweep_of(found: ArmResults) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Averages of one training, compared: dev and test figures of each arm."""
    arms = [arm for arm in found.arms if len(arm.averages) > 1]
    columns = ["average"]
    for arm in arms:
        columns += [f"{arm.title},\ndev", f"{arm.title},\ntest"]
    lines = []
    for key in arms[0].averages if arms else []:
        cells = [mean_text(arm.of(key, split)) for arm in arms for split in ("dev", "test")]
        lines.append((key, *cells))
    return tuple(columns), lines


def findings(found: ArmResults) -> list[str]:
    """What the tables say, in sentences."""
    sentences = []
    for difference in found.differences:
        names = f"{title_of(difference.arm)} against {title_of(difference.against)}"
        sentence = f"{names}: {difference.mean:+.2f}"
        if difference.p is None:
            sentence += ", of too few seeds to say whether that is chance"
        elif difference.p < SIGNIFICANT:
            sentence += f", a difference (paired t-test over seeds, p {_p_text(difference.p)})"
        else:
            sentence += (
                f", not told from chance (paired t-test over seeds, p {_p_text(difference.p)})"
            )
        sentences.append(sentence + ".")
    for arm in found.trained:
        if arm.averages:
            live = statistics.mean(arm.of("live", "test"))
            sentences.append(
                f"{arm.title}: its last weights have {live:.2f}, their average "
                f"{statistics.mean(arm.test):.2f}."
            )
    sign = 1 if found.higher_is_better else -1
    for arm in found.trained:
        if len(arm.averages) > 1:
            dev = {key: sign * statistics.mean(arm.of(key, "dev")) for key in arm.averages}
            sentences.append(f"{arm.title}: best on dev is {max(dev, key=dev.__getitem__)}.")
    return sentences


def show(console: Console, folder: Path, found: ArmResults) -> None:
    """Prints the tables and where everything lies."""
    what = "fine-tuning" if found.plain else f"{found.metric} by arm"
    title = f"{what} (seeds: {len(found.trained[0].units)})"
    console.print(rich_table(title, columns_of(found), [cells_of(a, found) for a in found.arms]))
    differences = [difference_cells(difference) for difference in found.differences]
    if differences:
        console.print(rich_table("differences", DIFFERENCE_COLUMNS, differences))
    columns, lines = sweep_of(found)
    if lines:
        console.print(rich_table("averages of the same trainings", columns, lines))
    for sentence in findings(found):
        console.print(sentence, highlight=False)
    console.print(f"model:  {folder / 'student'}\nreport: {folder / 'report.md'}", markup=False)


def save_plot(path: Path, found: ArmResults) -> None:
    """Draws curves and test figures into a PNG file."""
    figure, (curves, dots) = plot.panels()
    _draw_curves(curves, found)
    _draw_dots(dots, found)
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Axes, found: ArmResults) -> None:
    """Dev figure by share of the training: live weights dashed, averages solid."""
    for arm in found.trained:
        colour = plot.COLOURS[arm.name]
        for kind, style in (("live", "--" if arm.averages else "-"), ("average", "-")):
            points = _mean_curve(arm.curves, kind)
            if points:
                label = arm.title if style == "-" else f"{arm.title}: not averaged"
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=colour,
                    marker="o",
                    ms=3,
                    label=label,
                    alpha=1.0 if style == "-" else 0.6,
                )
    axes.set(xlabel="share of the training", ylabel=f"dev {found.metric}", xlim=(0, None))
    axes.set_title("while training (mean over seeds)", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _mean_curve(curves: Sequence[Sequence[Any]], kind: str) -> list[tuple[float, float]]:
    """Points that every seed has, at their share of the training."""
    points = []
    for same in zip(*curves, strict=False):
        if all(kind in point for point in same):
            share = same[0]["step"] / curves[0][-1]["step"]
            points.append((share, statistics.mean(point[kind] for point in same)))
    return points


def _draw_dots(axes: Axes, found: ArmResults) -> None:
    """Test figure of each seed, and the mean as a line."""
    for i, arm in enumerate(found.arms):
        colour = plot.COLOURS[arm.name]
        axes.scatter([i] * len(arm.test), arm.test, s=18, color=colour, zorder=3)
        mean = statistics.mean(arm.test)
        axes.hlines(mean, i - 0.3, i + 0.3, color=colour, linewidth=2)
        axes.annotate(f"{mean:.2f}", (i + 0.32, mean), va="center", fontsize=8)
    axes.set_xticks(range(len(found.arms)), [a.title.replace(", ", ",\n") for a in found.arms])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(-0.6, len(found.arms) - 0.2)
    axes.set_ylabel(f"test {found.metric}")
    axes.set_title("at the end (dots: seeds; line: mean)", loc="left", fontsize=10)
