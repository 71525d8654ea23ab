"""The tables on the screen, the report and the results file of a run of recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kdkernels.api.distill import plot
from kdkernels.api.distill.config import DistillConfig
from kdkernels.api.distill.data import Corpus
from kdkernels.api.distill.recipe_measure import EAGER, FUSED
from kdkernels.api.distill.recipe_results import RecipeResults, RecipeRow, as_json
from kdkernels.api.distill.recipes import ARMS, SOFT
from kdkernels.api.distill.report import closing, licences
from kdkernels.api.distill.store import write_file, write_text
from kdkernels.api.distill.tables import markdown_table, rich_table
from kdkernels.api.distill.train import Runtime

# Two lines each, so that the tables fit a terminal of 80 columns.
COLUMNS = (
    "model",
    "test\naccuracy, %",
    "fused,\nms/step",
    "eager,\nms/step",
    "eager /\nfused",
    "fused,\npeak MB",
    "eager,\npeak MB",
)
LOSS_COLUMNS = (
    "losses alone",
    "texts x\ntokens",
    "fused,\nms",
    "eager,\nms",
    "eager /\nfused",
    "fused,\npeak MB",
    "eager,\npeak MB",
)
NOTE = (
    "A step is the teacher's forward pass, the student's, the losses, the backward pass and the "
    "optimizer, median of real batches, fused and eager in turns; of a recipe in two stages that "
    "of the first, the second being that of soft labels. Peak: above the models and the "
    "optimizer's state. Eager losses get the same queries, keys and states, and are "
    "checked to be equal before they are timed."
)


def _figures(measured: Mapping[str, Any]) -> tuple[str, ...]:
    """Times, their ratio, peaks."""
    fused, eager = measured["ms"][FUSED], measured["ms"][EAGER]
    peaks = [measured["mb"][variant] for variant in (FUSED, EAGER)]
    shown = ["-" if peak is None else _figure(peak) for peak in peaks]
    return (_figure(fused), _figure(eager), f"{eager / fused:.2f}", *shown)


def _figure(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cells(row: RecipeRow) -> tuple[str, ...]:
    figures = ("-",) * 5 if row.step is None else _figures(row.step)
    return (row.title, row.accuracy_text, *figures)


def _loss_lines(found: RecipeResults) -> list[tuple[str, ...]]:
    return [
        (row.title, f"{case['rows']} x {case['tokens']}", *_figures(case))
        for row in found.recipes
        for case in row.losses
    ]


def findings(found: RecipeResults) -> list[str]:
    """What the table says, in sentences; a difference within the spread is called that."""
    soft = found.row(SOFT)
    sentences = []
    for row in found.recipes:
        gain = row.mean - soft.mean
        sentence = f"{row.title}: {gain:+.2f} points against soft labels alone"
        if row.spread is not None and soft.spread is not None:
            within = abs(gain) <= max(row.spread, soft.spread)
            sentence += ", within the spread" if within else ", more than the spread"
            sentence += " over seeds"
        sentences.append(sentence + ".")
    if not any(row.mean > soft.mean for row in found.recipes):
        sentences.append("No recipe beats soft labels here.")
    if soft.spread is None:
        sentences.append("One seed says nothing about the spread: run several before comparing.")
    return sentences


def show(console: Console, folder: Path, found: RecipeResults) -> None:
    """Prints the tables and where everything lies."""
    seeds = len(found.rows[-1].accuracies)
    title = f"the teacher, and students by recipe (seeds: {seeds})"
    console.print(rich_table(title, COLUMNS, [_cells(row) for row in found.rows]))
    console.print(rich_table("forward and backward", LOSS_COLUMNS, _loss_lines(found)))
    for sentence in findings(found):
        console.print(sentence, highlight=False)
    console.print(f"student: {folder / 'student'}\nreport:  {folder / 'report.md'}", markup=False)


def markdown(config: DistillConfig, found: RecipeResults, corpus: Corpus, runtime: Runtime) -> str:
    """The report as Markdown."""
    transfer = len(corpus.transfer) or len(corpus.train)
    seeds = ", ".join(map(str, config.seeds))
    each = "\n".join(
        f"- {row.title}: " + ", ".join(f"{value:.2f}" for value in row.accuracies)
        for row in found.rows
    )
    about = "\n".join(
        f"- {ARMS[row.arm].title}: {' '.join((ARMS[row.arm].__doc__ or '').split())}"
        for row in found.recipes
    )
    wide = next((case["width"] for row in found.recipes for case in row.losses[1:]), None)
    parts = [
        f"# Recipes, run `{config.name}`",
        markdown_table(COLUMNS, [_cells(row) for row in found.rows]),
        f"The students start from the same weights and see the same batches, {config.epochs} "
        f"epochs of {transfer:,} texts without labels. Mean and standard deviation over seeds "
        f"{seeds}; the teacher was fine-tuned once. {NOTE}",
        "\n".join(findings(found)),
        "## Losses alone",
        markdown_table(LOSS_COLUMNS, _loss_lines(found)),
        "Forward and backward pass from given states: those of a real batch, and random ones of "
        f"width {wide} without padding.",
        "![Dev accuracy while training, and test accuracy](curves.png)",
        f"Test accuracy of each seed:\n\n{each}",
        "## Recipes",
        about,
        "## Data",
        f"{corpus.source}. Labels: {', '.join(corpus.label_names)}. {len(corpus.train):,} labelled "
        f"training texts (the teacher's), {transfer:,} transfer texts, {len(corpus.dev):,} dev "
        f"texts, {len(corpus.test):,} test texts. In this run the dev texts chose which student is "
        f"in `student/` ({found.best}), nothing else; the test texts chose nothing.",
        *closing(licences(config), config, found.phases, runtime),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(
    folder: Path, config: DistillConfig, found: RecipeResults, corpus: Corpus, runtime: Runtime
) -> None:
    """Writes the picture, the report and the results into the run's folder."""
    write_file(folder / "curves.png", lambda path: plot.save(path, found))
    write_text(folder / "results.json", json.dumps(as_json(found), indent=1) + "\n")
    write_text(folder / "report.md", markdown(config, found, corpus, runtime))
