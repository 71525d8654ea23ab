"""The tables on the screen, the picture and the report of a run with weight averaging."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kdkernels.api.distill import plot
from kdkernels.api.distill.report import closing
from kdkernels.api.distill.store import write_file, write_text
from kdkernels.api.distill.swa_config import SwaConfig
from kdkernels.api.distill.swa_results import (
    TITLES,
    Arm,
    Difference,
    SwaResults,
    as_json,
    mean_text,
)
from kdkernels.api.distill.tables import markdown_table, rich_table
from kdkernels.api.distill.task import Task
from kdkernels.api.distill.train import Runtime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A p-value below which a difference is called one.
SIGNIFICANT = 0.05


def _columns(found: SwaResults) -> tuple[str, ...]:
    others = [f"test\n{name}" for name in _others(found)]
    metric = found.metric
    averages = ("not\naveraged", "models") if _averaged(found) else ()
    return ("model", f"test\n{metric}", *others, f"dev\n{metric}", *averages)


def _averaged(found: SwaResults) -> bool:
    """Whether any arm has averages."""
    return any(arm.averages for arm in found.arms)


def _others(found: SwaResults) -> list[str]:
    """Further test figures of the task."""
    return [name for name in found.arms[0].units[0]["kept"]["test"] if name != found.metric]


def _cells(arm: Arm, found: SwaResults) -> tuple[str, ...]:
    others = [mean_text(arm.other(name)) for name in _others(found)]
    live = mean_text(arm.of("live", "test")) if arm.averages else "-"
    count = str(next(iter(arm.units[0]["models"].values()))) if arm.averages else "-"
    averages = (live, count) if _averaged(found) else ()
    return (arm.title, mean_text(arm.test), *others, mean_text(arm.of("kept", "dev")), *averages)


def _difference_cells(difference: Difference) -> tuple[str, ...]:
    width = "-" if difference.interval is None else f"± {difference.interval:.2f}"
    p = "-" if difference.p is None else _p_text(difference.p).removeprefix("= ")
    names = f"{TITLES[difference.arm]} against {TITLES[difference.against]}"
    return names, f"{difference.mean:+.2f}", width, p


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


DIFFERENCE_COLUMNS = ("by seed", "better\nby", "95 %\ninterval", "paired\nt-test, p")


def _sweep(found: SwaResults) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
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


def findings(found: SwaResults) -> list[str]:
    """What the tables say, in sentences."""
    sentences = []
    for difference in found.differences:
        names = f"{TITLES[difference.arm]} against {TITLES[difference.against]}"
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


def show(console: Console, folder: Path, found: SwaResults) -> None:
    """Prints the tables and where everything lies."""
    what = "fine-tuning" if found.plain else f"{found.metric} by arm"
    title = f"{what} (seeds: {len(found.trained[0].units)})"
    console.print(rich_table(title, _columns(found), [_cells(a, found) for a in found.arms]))
    differences = [_difference_cells(difference) for difference in found.differences]
    if differences:
        console.print(rich_table("differences", DIFFERENCE_COLUMNS, differences))
    columns, lines = _sweep(found)
    if lines:
        console.print(rich_table("averages of the same trainings", columns, lines))
    for sentence in findings(found):
        console.print(sentence, highlight=False)
    console.print(f"model:  {folder / 'student'}\nreport: {folder / 'report.md'}", markup=False)


def markdown(config: SwaConfig, found: SwaResults, task: Task[Any], runtime: Runtime) -> str:
    """The report as Markdown."""
    each = "\n".join(
        f"- {arm.title}: " + ", ".join(f"{value:.2f}" for value in arm.test) for arm in found.arms
    )
    differences = [_difference_cells(difference) for difference in found.differences]
    columns, lines = _sweep(found)
    parts = [
        f"# {'Fine-tuning' if found.plain else 'Weight averaging'}, run `{config.name}`",
        markdown_table(_columns(found), [_cells(arm, found) for arm in found.arms]),
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


def _schedules(config: SwaConfig, found: SwaResults) -> str:
    """How the learning rate went, and what the columns about averages are."""
    if not _averaged(found):
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
    folder: Path, config: SwaConfig, found: SwaResults, task: Task[Any], runtime: Runtime
) -> None:
    """Writes the picture, the report and the results into the run's folder."""
    write_file(folder / "curves.png", lambda path: _save_plot(path, found))
    write_text(folder / "results.json", json.dumps(as_json(found), indent=1) + "\n")
    write_text(folder / "report.md", markdown(config, found, task, runtime))


def _save_plot(path: Path, found: SwaResults) -> None:
    figure, (curves, dots) = plot.panels()
    _draw_curves(curves, found)
    _draw_dots(dots, found)
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Axes, found: SwaResults) -> None:
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


def _draw_dots(axes: Axes, found: SwaResults) -> None:
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
