"""The tables, the picture and the Markdown report of the language-model objective."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kdkernels.api.distill import fetch
from kdkernels.api.distill.config import to_yaml
from kdkernels.api.distill.lm_config import LmConfig
from kdkernels.api.distill.lm_data import WIKITEXT2_NAME
from kdkernels.api.distill.lm_measure import EAGER, HIDDEN
from kdkernels.api.distill.lm_models import SMOLLM2_NAME
from kdkernels.api.distill.lm_results import ARMS, START, TEACHER, LmResults, LmRow, figure
from kdkernels.api.distill.plot import COLOURS
from kdkernels.api.distill.store import write_file, write_text
from kdkernels.api.distill.tables import markdown_table, rich_table, versions
from kdkernels.api.distill.train import Runtime

# Two lines each, so that the table fits a terminal of 80 columns.
COLUMNS = ("model", "test\nperplexity", "params,\nM", "train,\ntokens/s", "train,\ns")
ROUTE_COLUMNS = ("loss", "route", "peak,\nMB", "tokens/s")


def _cells(row: LmRow) -> tuple[str, ...]:
    return (
        row.title,
        row.text,
        f"{row.parameters / 1e6:.1f}",
        "-" if row.training_rate is None else f"{row.training_rate:,.0f}",
        "-" if row.seconds is None else f"{row.seconds:.0f}",
    )


def _route_cells(route: Mapping[str, Any]) -> tuple[str, ...]:
    peak = route["peak_mb"]
    shown = "-" if peak is None else f"{peak:,.0f}"
    return (route["loss"], route["route"], shown, f"{route['tokens_per_second']:,.0f}")


def findings(found: LmResults) -> list[str]:
    """What the tables say, in sentences."""
    ce, live, cached = (found.row(arm) for arm in ARMS)
    start, teacher = found.row(START), found.row(TEACHER)
    sentences = [
        f"Test perplexity of the student: {figure(start.mean)} before training, "
        f"{figure(ce.mean)} after cross-entropy alone, {figure(live.mean)} distilled from the live "
        f"teacher, {figure(cached.mean)} from its cached top-k; the teacher's is "
        f"{figure(teacher.mean)}. The data and its order are the same."
    ]
    by_name = {(route["loss"], route["route"]): route for route in found.routes}
    for loss in dict.fromkeys(name for name, _ in by_name):
        ours, eager = by_name[loss, HIDDEN], by_name[loss, EAGER]
        speed = ours["tokens_per_second"] / eager["tokens_per_second"]
        sentence = f"Loss with a {loss}, {ours['rows']:,} tokens: {speed:.1f} times as fast as "
        sentence += "eager PyTorch on full logits"
        if ours["peak_mb"] and eager["peak_mb"]:
            sentence += f", in 1/{eager['peak_mb'] / ours['peak_mb']:.1f} of its memory"
        sentences.append(sentence + ".")
    if len(live.perplexities) == 1:
        sentences.append("One seed says nothing about the spread: run several before comparing.")
    return sentences


def show(console: Console, folder: Path, found: LmResults) -> None:
    """Prints the tables and where everything lies."""
    title = f"the teacher, and its first layers trained three ways (seeds: {_seeds(found)})"
    console.print(rich_table(title, COLUMNS, [_cells(row) for row in found.rows]))
    lines = [_route_cells(route) for route in found.routes]
    console.print(rich_table("one loss, forward and backward", ROUTE_COLUMNS, lines))
    for sentence in findings(found):
        console.print(sentence, highlight=False)
    console.print(f"student: {folder / 'student'}\nreport:  {folder / 'report.md'}", markup=False)


def _seeds(found: LmResults) -> int:
    return len(found.rows[-1].perplexities)


def _licences(config: LmConfig) -> list[str]:
    """Licences of what the run downloaded."""
    archives = [fetch.SMOLLM2] if config.model == SMOLLM2_NAME else []
    archives += [fetch.WIKITEXT2] if config.text == WIKITEXT2_NAME else []
    return [
        f"- {archive.licence}; {archive.project} {archive.version}, sha256 `{archive.sha256}`"
        for archive in archives
    ]


def markdown(
    config: LmConfig, found: LmResults, counts: Mapping[str, int], runtime: Runtime
) -> str:
    """The report as Markdown; ``counts`` are the tokens of each split."""
    rows = found.routes[0]["rows"]
    trained = "" if config.train_embeddings else " (its embedding and head frozen)"
    parts = [
        f"# Distillation run `{config.name}`",
        markdown_table(COLUMNS, [_cells(row) for row in found.rows]),
        f"The students are the teacher's first {config.layers} layers{trained}, trained on the "
        "same tokens in the same order: on the next token alone, from the teacher run on each "
        f"batch, and from its {config.top_k} most probable classes per token, computed once and "
        f"read from a cache of {found.cache_bytes / 1e6:.1f} MB. Training speed includes the live "
        f"teacher's. Perplexity is per token of {config.model}'s vocabulary, each block of "
        f"{config.seq_len} tokens by itself, without its first token.",
        "\n".join(findings(found)),
        "![Dev perplexity while training](curves.png)",
        "## The loss by itself",
        markdown_table(ROUTE_COLUMNS, [_route_cells(route) for route in found.routes]),
        f"One forward and backward pass of {rows:,} tokens, heads included: memory above hidden "
        "states and heads, tokens per second as the median of turns. Eager: full float32 logits, "
        "PyTorch's softmax and autograd.",
        "## Data",
        f"{config.text}: {counts['train']:,} training, {counts['valid']:,} dev and "
        f"{counts['test']:,} test tokens, in blocks spread evenly over the text. The dev text "
        f"chose which student is in `student/` ({found.best}), nothing else in this run.",
        "\n".join(_licences(config)),
        "## Configuration",
        f"```yaml\n{to_yaml(config)}```",
        "## Time",
        markdown_table(
            ("phase", "seconds"), [(name, f"{s:.1f}") for name, s in found.phases.items()]
        ),
        "## Versions",
        versions(runtime),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def save_plot(path: Path, found: LmResults) -> None:
    """Draws dev perplexity against training steps into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    for arm, title in ARMS.items():
        for i, curve in enumerate(found.row(arm).curves):
            steps, values = zip(*curve, strict=True)
            label = title if i == 0 else None
            axes.plot(steps, values, color=COLOURS[arm], marker="o", markersize=4, label=label)
    teacher = found.row(TEACHER).dev_perplexities[0]
    axes.axhline(teacher, color=COLOURS[TEACHER], linestyle="--", linewidth=1.2, label="teacher")
    axes.set(xlabel="training step", ylabel="dev perplexity", yscale="log", xlim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def write(
    folder: Path,
    config: LmConfig,
    found: LmResults,
    counts: Mapping[str, int],
    runtime: Runtime,
) -> None:
    """Writes the picture and the report into the run's folder."""
    write_file(folder / "curves.png", lambda path: save_plot(path, found))
    write_text(folder / "report.md", markdown(config, found, counts, runtime))
