"""The report of a study: Markdown, one HTML file that opens offline, and a table on the screen."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from kdkernels.api._files import write_text
from kdkernels.api.distill.tables import markdown_table, rich_table
from kdkernels.api.study import plot
from kdkernels.api.study.analysis import CONFIDENCE, Analysis, Arm, Cell, Comparison
from kdkernels.api.study.verdict import verdict

MARKDOWN, HTML = "report.md", "report.html"
PICTURES = {"intervals.svg": plot.intervals, "costs.svg": plot.costs}
CAPTIONS = {
    "intervals.svg": "Each arm against plain fine-tuning, paired by seed: mean and 95 % interval "
    "(Student's t). Grey: the margin within which a difference counts as none.",
    "costs.svg": "Test figure (mean, standard deviation over seeds) against seconds of training "
    "that one model takes, those of its teacher and of passing the examples through it included.",
}
SCREEN = ("arm", "test", "better by", "p (Holm)", "p (TOST)", "finding")
RESULTS = ("arm", "test, mean ± sd", "dev", "seeds", "chosen on dev", "of")
TESTS = (
    "arm against ft", "better by", "95 % interval", "bootstrap", "p", "p (Holm)", "p (TOST)",
    "finding",
)  # fmt: skip
COSTS = (
    "arm", "steps/s", "s a training", "s for its teacher", "peak MB", "trained, M",
    "texts through a teacher",
)  # fmt: skip

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.8rem 0 1.6rem; font-size: 13px; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }"""


def write(folder: Path, name: str, found: Analysis, notes: Sequence[str]) -> None:
    """Writes ``report.md``, its pictures, and ``report.html``.

    Args:
        folder: Where to.
        name: Name of the study.
        found: What the results say.
        notes: Sentences on what it ran on, and on what data.
    """
    drawn = {file: draw(found) for file, draw in PICTURES.items()}
    for file, picture in drawn.items():
        write_text(folder / file, picture)
    write_text(folder / MARKDOWN, as_markdown(name, found, notes))
    write_text(folder / HTML, as_html(name, found, notes, drawn))


def show(console: Console, folder: Path, found: Analysis) -> None:
    """Prints what each comparison found, the verdict, and where the report is."""
    for cell in found.cells:
        tested = {c.arm: c for c in cell.comparisons}
        lines = [(arm.name, mean_text(arm), *_short(tested.get(arm.name))) for arm in cell.arms]
        console.print(rich_table(f"{cell.title} ({cell.metric})", SCREEN, lines))
    console.print(verdict(found), highlight=False, markup=False)
    console.print(f"report: {folder / MARKDOWN}, {folder / HTML}", highlight=False, markup=False)


def _short(c: Comparison | None) -> tuple[str, ...]:
    """A comparison where there is little room."""
    if c is None:
        return "", "", "", ""
    return f"{c.mean:+.2f}", p_text(c.holm), p_text(c.tost), c.decision


def as_markdown(name: str, found: Analysis, notes: Sequence[str]) -> str:
    """The report as Markdown, with its pictures beside it."""
    parts = [f"# {name}", verdict(found)]
    for file, caption in CAPTIONS.items():
        parts += [f"![{caption}]({file})", caption]
    for title, tables in _sections(found):
        parts += [f"## {title}", *(markdown_table(*table) for table in tables)]
    parts += ["## How to read this", *_method(found), *notes]
    return "\n\n".join(parts) + "\n"


def as_html(name: str, found: Analysis, notes: Sequence[str], drawn: dict[str, str]) -> str:
    """The report as one file: styles and pictures are in it, nothing is loaded."""
    body = [f"<h1>{html.escape(name)}</h1>", _paragraph(verdict(found))]
    for file, picture in drawn.items():
        body.append(f"<figure>{picture}<figcaption>{html.escape(CAPTIONS[file])}</figcaption>")
        body.append("</figure>")
    for title, tables in _sections(found):
        body += [f"<h2>{html.escape(title)}</h2>", *(_html_table(*table) for table in tables)]
    body += ["<h2>How to read this</h2>", *map(_paragraph, [*_method(found), *notes])]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(name)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _sections(found: Analysis) -> Iterator[tuple[str, list[Table]]]:
    """The tables of each cell, then those of all."""
    for cell in found.cells:
        yield f"{cell.title} ({cell.metric})", [_results(cell), _tests(cell), _costs(cell)]
    worth = [(cell, c) for cell in found.cells for c in cell.worth]
    if worth:
        lines = [[f"{cell.title}: {c.arm} - {c.against}", *_figures(c)] for cell, c in worth]
        head = ("with a teacher - best without", *TESTS[1:])
        yield "Is a teacher worth its cost?", [(head, lines)]


def _results(cell: Cell) -> Table:
    lines = [
        (arm.name, mean_text(arm), f"{arm.dev:.2f}", str(len(arm.rows)), arm.candidate,
         str(arm.candidates))
        for arm in cell.arms
    ]  # fmt: skip
    return RESULTS, list(lines)


def _tests(cell: Cell) -> Table:
    return TESTS, [[c.arm, *_figures(c)] for c in cell.comparisons]


def _costs(cell: Cell) -> Table:
    lines = []
    for arm in cell.arms:
        facts = [row.result["teacher"] for row in arm.rows]
        passes = "none" if facts[0] is None else f"{facts[0]['examples']:,}, once"
        trained = arm.cost("trained")
        lines.append((
            arm.name, _number(arm.cost("steps_per_second"), 1), _number(arm.cost("seconds"), 1),
            _number(arm.teacher_seconds, 1), _number(arm.cost("memory_mb"), 0),
            _number(None if trained is None else trained / 1e6, 2), passes,
        ))  # fmt: skip
    return COSTS, list(lines)


def mean_text(arm: Arm) -> str:
    """Mean and standard deviation over seeds."""
    return f"{arm.mean:.2f}" + ("" if arm.spread is None else f" ± {arm.spread:.2f}")


def _figures(c: Comparison) -> list[str]:
    return [
        f"{c.mean:+.2f}", _interval(c.interval), _interval(c.bootstrap), p_text(c.p),
        p_text(c.holm), p_text(c.tost), c.decision,
    ]  # fmt: skip


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def p_text(p: float | None) -> str:
    """A p-value as in tables."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _method(found: Analysis) -> list[str]:
    percent = f"{100 * CONFIDENCE:g} %"
    texts = [
        "Learning rate and parameters of each arm are those with the best mean dev figure over the "
        "seeds. Differences are paired by seed: t-test, two-sided, with Holm's correction over the "
        f"arms of one table; {percent} intervals by Student's t and by resampling the seeds (too "
        "narrow with few of them); TOST: two one-sided t-tests against a margin of "
        f"±{found.margin:g} points. At level {found.level:g}: better or worse where Holm's p is "
        "below it, else equivalent where TOST's is, else there is not enough evidence. Tables are "
        "not corrected for there being several. Peak memory is of a GPU's tensors; without a GPU "
        "it is that of the whole process, which has done other trials before.",
    ]
    firsts = [row for cell in found.cells for arm in cell.arms for row in arm.rows]
    teachers = {
        (row.task, row.result["metric"], row.result["teacher"]["figures"]["test"][
            row.result["metric"]])
        for row in firsts
        if row.teacher == "teacher"
    }  # fmt: skip
    for task, metric, figure in sorted(teachers):
        texts.append(f"The teacher on {task}: test {metric} {figure:.2f}.")
    seconds = statistics.fmean(row.result["seconds"] for row in firsts)
    texts.append(f"{found.trials} trainings of {seconds:.1f} s on average.")
    return texts


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _html_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    rows = (
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for line in lines
    )
    return f"<table><tr>{head}</tr>\n" + "\n".join(rows) + "\n</table>"
