"""The tables on the screen and the Markdown report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kdkernels.api.distill import fetch, plot
from kdkernels.api.distill.config import DistillConfig, RunConfig, to_yaml
from kdkernels.api.distill.data import Corpus
from kdkernels.api.distill.results import TEACHER, Results, Row
from kdkernels.api.distill.store import write_file, write_text
from kdkernels.api.distill.tables import markdown_table, rich_table, versions
from kdkernels.api.distill.train import Runtime

# Two lines each, so that the table fits a terminal of 80 columns.
COLUMNS = (
    "model",
    "test\naccuracy, %",
    "params,\nM",
    "train,\ntexts/s",
    "infer,\ntexts/s",
    "fused\nloss, µs",
    "eager\nloss, µs",
)
LOSS_NOTE = (
    "Loss: one forward and backward pass at the shape of a training step ({rows} x {classes} "
    "logits), median."
)


def _cells(row: Row) -> tuple[str, ...]:
    """One line of the main table."""
    return (
        row.title,
        row.accuracy_text,
        f"{row.parameters / 1e6:.2f}",
        "-" if row.training_rate is None else f"{row.training_rate:,.0f}",
        f"{row.inference_rate:,.0f}",
        f"{row.loss_fused:.0f}",
        f"{row.loss_eager:.0f}",
    )


def findings(found: Results) -> list[str]:
    """What the table says, in sentences, gains and their sources kept apart."""
    teacher, labels = found.row(TEACHER), found.row("labels")
    hard, distilled = found.row("hard"), found.row("distilled")
    share = 100 * distilled.parameters / teacher.parameters
    speed = distilled.inference_rate / teacher.inference_rate
    gain, lag = distilled.mean - labels.mean, distilled.mean - teacher.mean
    sentences = [
        f"The distilled student has {share:.0f} % of the teacher's parameters and reads "
        f"{speed:.1f} times as many texts a second. Its accuracy is {lag:+.2f} points against the "
        f"teacher and {gain:+.2f} against the same student trained on the labels alone.",
        f"Where the {gain:+.2f} comes from: {hard.mean - labels.mean:+.2f} from learning the "
        f"teacher's hard labels on the transfer texts, {distilled.mean - hard.mean:+.2f} from soft "
        "targets instead of hard ones.",
    ]
    if distilled.spread is None:
        sentences.append("One seed says nothing about the spread: run several before comparing.")
    return sentences


def _value(value: Any) -> str:
    """A cell of a table of unknown columns."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(console: Console, folder: Path, found: Results) -> None:
    """Prints the tables and where everything lies."""
    seeds = len(found.rows[-1].accuracies)
    title = f"the teacher, and students trained three ways (seeds: {seeds})"
    console.print(rich_table(title, COLUMNS, [_cells(row) for row in found.rows]))
    for sentence in findings(found):
        console.print(sentence, highlight=False)
    if found.throughput:
        columns, lines = _generic(found.throughput)
        console.print(rich_table("kd_loss at language-model vocabularies", columns, lines))
    console.print(f"student: {folder / 'student'}\nreport:  {folder / 'report.md'}", markup=False)


def _generic(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of a table whose columns are the keys of its rows."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return columns, [[_value(row.get(column, "")) for column in columns] for row in rows]


def licences(config: DistillConfig) -> list[str]:
    """Licences of what the run downloaded."""
    archives = [] if config.teacher else [fetch.TEACHER]
    archives += [] if config.data else [fetch.SENTIMENT]
    return [
        f"{archive.licence}; {archive.project} {archive.version}, sha256 `{archive.sha256}`"
        for archive in archives
    ]


def markdown(config: DistillConfig, found: Results, corpus: Corpus, runtime: Runtime) -> str:
    """The report as Markdown."""
    transfer = len(corpus.transfer) or len(corpus.train)
    seeds = ", ".join(map(str, config.seeds))
    each = "\n".join(
        f"- {row.title}: " + ", ".join(f"{value:.2f}" for value in row.accuracies)
        for row in found.rows
    )
    note = LOSS_NOTE.format(rows=config.batch_size, classes=len(corpus.label_names))
    parts = [
        f"# Distillation run `{config.name}`",
        markdown_table(COLUMNS, [_cells(row) for row in found.rows]),
        f"The students are one model trained three ways: on the labels only, on the teacher's hard "
        f"labels of the transfer texts, and by distillation from its soft ones. Mean and standard "
        f"deviation over seeds {seeds}; the teacher was fine-tuned once. {note}",
        "\n".join(findings(found)),
        "![Dev accuracy while training, and test accuracy](curves.png)",
        f"Test accuracy of each seed:\n\n{each}",
    ]
    if found.throughput:
        parts.append("## kd_loss at language-model vocabularies")
        parts.append(markdown_table(*_generic(found.throughput)))
    parts += [
        "## Data",
        f"{corpus.source}. Labels: {', '.join(corpus.label_names)}. {len(corpus.train):,} labelled "
        f"training texts, {transfer:,} transfer texts, {len(corpus.dev):,} dev texts, "
        f"{len(corpus.test):,} test texts. In this run the dev texts chose which seed's student is "
        f"in `student/` (seed {found.best_seed}), nothing else; the test texts chose nothing.",
        *closing(licences(config), config, found.phases, runtime),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def closing(
    used: Sequence[str], config: RunConfig, phases: Mapping[str, float], runtime: Runtime
) -> list[str]:
    """What a report ends with; ``used`` are the licences of what was downloaded."""
    return [
        "\n".join(f"- {line}" for line in used),
        "## Configuration",
        f"```yaml\n{to_yaml(config)}```",
        "## Time",
        markdown_table(("phase", "seconds"), [(name, f"{s:.1f}") for name, s in phases.items()]),
        "## Versions",
        versions(runtime),
    ]


def write(
    folder: Path, config: DistillConfig, found: Results, corpus: Corpus, runtime: Runtime
) -> None:
    """Writes the picture and the report into the run's folder."""
    write_file(folder / "curves.png", lambda path: plot.save(path, found))
    write_text(folder / "report.md", markdown(config, found, corpus, runtime))
