"""Tables, sentences and the picture of a run of Meta-KD."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kdkernels.api.distill import fetch, plot
from kdkernels.api.distill.data import Corpus
from kdkernels.api.distill.metakd_config import META, PLAIN, MetaKdConfig, loss_of, teacher_of
from kdkernels.api.distill.metakd_results import (
    HEADLINE,
    TEACHER_TITLES,
    Arm,
    Difference,
    MetaKdResults,
    as_json,
    mean_text,
    title_of,
)
from kdkernels.api.distill.report import closing
from kdkernels.api.distill.store import write_file, write_text
from kdkernels.api.distill.tables import markdown_table, rich_table
from kdkernels.api.distill.train import Runtime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A p-value below which a difference is called one.
SIGNIFICANT = 0.05
DIFFERENCE_COLUMNS = (
    "average over domains, by seed",
    "better\nby",
    "95 %\ninterval",
    "paired\nt-test, p",
    "better in\n(domain, seed)",
)
# Of teachers; a loss other than Meta-KD's is drawn lighter.
COLOURS = {"own": "#E69F00", "mixed": "#56B4E9", "meta": "#D55E00"}


def columns_of(found: MetaKdResults) -> tuple[str, ...]:
    """Heads of the table of arms."""
    share = ("share of\nlabels",) if len(found.shares) > 1 else ()
    return ("test accuracy, %", *share, *found.domains, "average")


def lines_of(found: MetaKdResults) -> list[tuple[str, ...]]:
    """The lines of that table: teachers, then students."""
    several = len(found.shares) > 1
    lines = []
    for teacher in found.teachers:
        figures = [f"{teacher.test[domain]:.2f}" for domain in found.domains]
        mean = statistics.mean(teacher.test[domain] for domain in found.domains)
        share = ("",) if several else ()
        lines.append((TEACHER_TITLES[teacher.kind], *share, *figures, f"{mean:.2f}"))
    for arm in found.arms:
        figures = [mean_text(arm.test[domain]) for domain in found.domains]
        share = (f"{arm.share:.0%}",) if several else ()
        lines.append((arm.title, *share, *figures, mean_text(arm.average)))
    return lines


def difference_cells(difference: Difference, several: bool) -> tuple[str, ...]:
    """A line of the table of differences."""
    width = "-" if difference.interval is None else f"± {difference.interval:.2f}"
    p = "-" if difference.p is None else _p_text(difference.p).removeprefix("= ")
    names = f"{title_of(difference.arm)} against {title_of(difference.against)}"
    names += f", {difference.share:.0%}" if several else ""
    wins = f"{difference.wins} of {difference.pairs}"
    return names, f"{difference.mean:+.2f}", width, p, wins


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def findings(found: MetaKdResults) -> list[str]:
    """What the tables say of the question, in sentences."""
    sentences = []
    for teacher in found.teachers:
        if teacher.elsewhere is not None:
            sentences.append(
                f"A teacher of one domain has {statistics.mean(teacher.test.values()):.2f} % in "
                f"its own and {teacher.elsewhere:.2f} % in the others, on average."
            )
    for difference in found.differences:
        if difference.arm != HEADLINE or loss_of(difference.against) != PLAIN:
            continue
        share = f" ({difference.share:.0%} of the labels)" if len(found.shares) > 1 else ""
        sentence = (
            f"{title_of(difference.arm)} against {title_of(difference.against)}{share}: "
            f"{difference.mean:+.2f}"
        )
        if difference.p is None:
            sentence += ", of too few seeds to say whether that is chance"
        elif difference.p < SIGNIFICANT:
            sentence += f", a difference (paired t-test over seeds, p {_p_text(difference.p)})"
        else:
            p = _p_text(difference.p)
            sentence += f", not told from chance (paired t-test over seeds, p {p})"
        sentences.append(sentence + ".")
    return sentences


def show(console: Console, folder: Path, found: MetaKdResults) -> None:
    """Prints the tables and where everything lies."""
    console.print(rich_table("students by arm", columns_of(found), lines_of(found)))
    cells = [difference_cells(d, len(found.shares) > 1) for d in found.differences]
    if cells:
        console.print(rich_table("differences", DIFFERENCE_COLUMNS, cells))
    for sentence in findings(found):
        console.print(sentence, highlight=False)
    text = f"models: {folder / 'student-'}*\nreport: {folder / 'report.md'}"
    console.print(text, markup=False)


def write(
    folder: Path,
    config: MetaKdConfig,
    found: MetaKdResults,
    domains: Mapping[str, Corpus],
    runtime: Runtime,
) -> None:
    """Writes the picture, the report and the results into the run's folder."""
    write_file(folder / "students.png", lambda path: save_plot(path, found))
    write_text(folder / "results.json", json.dumps(as_json(found), indent=1) + "\n")
    write_text(folder / "report.md", markdown(config, found, domains, runtime))


def markdown(
    config: MetaKdConfig,
    found: MetaKdResults,
    domains: Mapping[str, Corpus],
    runtime: Runtime,
) -> str:
    """The report as Markdown."""
    differences = [difference_cells(d, len(found.shares) > 1) for d in found.differences]
    left = config.leave_out
    parts = [
        f"# Meta-KD, run `{config.name}`",
        markdown_table(columns_of(found), lines_of(found)),
        f"Mean and standard deviation over seeds {', '.join(map(str, config.seeds))}; each teacher "
        f"was trained once. {_training(config)}",
        f"No teacher was trained on {left}; the students are of it alone." if left else "",
        markdown_table(DIFFERENCE_COLUMNS, differences) if differences else "",
        "\n".join(findings(found)),
        "![Test accuracy by arm](students.png)",
        "Mean prototype score: "
        + ", ".join(f"{name} {score:.3f}" for name, score in found.scores.items())
        + ".",
        _data(domains, found),
        *closing(licences(config), config, found.phases, runtime),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _training(config: MetaKdConfig) -> str:
    stages = (
        "two stages: states with the transferable term, then soft labels"
        if config.stages == 2
        else "one stage with all terms"
    )
    return (
        f"Teachers: {config.teacher_epochs} epochs at {config.teacher_lr:g}, gamma1 "
        f"{config.gamma1:g}. Students: {stages}; {config.epochs} epochs a stage at {config.lr:g} "
        f"(with few labels more, see `MOST_REPEATS`), gamma2 {config.gamma2:g}, T "
        f"{config.temperature:g}, faithful to the {config.faithful_to}. Students of teachers other "
        "than the meta-teacher have no transferable term."
    )


def _data(domains: Mapping[str, Corpus], found: MetaKdResults) -> str:
    lines = [
        (name, str(len(c.train)), str(len(c.dev)), str(len(c.test))) for name, c in domains.items()
    ]
    kept = ", ".join(f"{domain}: {unit}" for domain, unit in found.kept.items())
    source = next(iter(domains.values())).source
    return (
        f"## Data\n\n{source}.\n\n"
        + markdown_table(("domain", "train", "dev", "test"), lines)
        + f"\n\nA domain's dev texts chose which of its students is in `student-*/` ({kept}); the "
        "test texts chose nothing."
    )


def licences(config: MetaKdConfig) -> list[str]:
    """Licences of what the run downloaded."""
    archives: list[Any] = [] if config.model else [fetch.TEACHER]
    if config.data is None and config.task == "sentiment":
        archives.append(fetch.SENTIMENT)
    return [
        f"{archive.licence}; {archive.project} {archive.version}, sha256 `{archive.sha256}`"
        for archive in archives
    ]


def save_plot(path: Path, found: MetaKdResults) -> None:
    """Draws the arms' averages, and what few labels do or the domains one by one."""
    figure, (left, right) = plot.panels()
    if len(found.shares) > 1:
        _draw_shares(left, found)
    else:
        _draw_domains(left, found)
    _draw_averages(right, found.at(found.shares[0]))
    figure.savefig(path, dpi=100)


def _style(arm: Arm) -> dict[str, Any]:
    loss = loss_of(arm.name)
    return {
        "color": COLOURS[teacher_of(arm.name)],
        "marker": "o" if loss == META else "s" if loss == PLAIN else "x",
        "alpha": 1.0 if loss == META else 0.55,
    }


def _draw_shares(axes: Axes, found: MetaKdResults) -> None:
    """Average over domains against the share of the labels."""
    for name in dict.fromkeys(arm.name for arm in found.arms):
        arms = sorted((a for a in found.arms if a.name == name), key=lambda a: a.share)
        points = [(100 * arm.share, statistics.mean(arm.average)) for arm in arms]
        axes.plot(*zip(*points, strict=True), label=title_of(name), **_style(arms[0]))
    axes.set_xscale("log")
    axes.set(xlabel="share of a domain's labels, %", ylabel="test accuracy, %")
    axes.set_title("few labels (mean over domains and seeds)", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7)


def _draw_domains(axes: Axes, found: MetaKdResults) -> None:
    """Mean over seeds of every arm in every domain."""
    arms = found.at(found.shares[0])
    for number, arm in enumerate(arms):
        shift = (number - (len(arms) - 1) / 2) * 0.7 / len(arms)
        places = [place + shift for place in range(len(found.domains))]
        means = [statistics.mean(arm.test[domain]) for domain in found.domains]
        axes.plot(places, means, linestyle="none", ms=5, label=arm.title, **_style(arm))
    axes.set_xticks(range(len(found.domains)), found.domains)
    axes.set_ylabel("test accuracy, %")
    axes.set_title("by domain (mean over seeds)", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7)


def _draw_averages(axes: Axes, arms: Sequence[Arm]) -> None:
    """Average of each seed, and the mean as a line."""
    for i, arm in enumerate(arms):
        style = _style(arm)
        axes.scatter([i] * len(arm.average), arm.average, s=18, zorder=3, **style)
        mean = statistics.mean(arm.average)
        axes.hlines(mean, i - 0.3, i + 0.3, color=style["color"], linewidth=2)
        axes.annotate(f"{mean:.1f}", (i, max(arm.average)), xytext=(0, 6), ha="center",
                      fontsize=7, textcoords="offset points")  # fmt: skip
    axes.set_xticks(range(len(arms)), [arm.name for arm in arms], rotation=40, ha="right")
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel("test accuracy, %")
    axes.set_title("mean over domains (dots: seeds)", loc="left", fontsize=10)
