"""The user's own task: a CSV, TSV or JSONL file with the columns ``text``, ``label``, ``split``."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdkernels.api.distill.data import SPLIT_SEED, Corpus, Labelled, Limits, limit_transfer
from kdkernels.api.distill.errors import DistillError, require

TEST_SHARE = 0.20
DEV_SHARE = 0.10
# Spellings of the split column; an unlabelled row is a transfer text whatever its split says.
SPLIT_NAMES = {
    "train": "train",
    "dev": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
    "transfer": "transfer",
    "unlabelled": "transfer",
}
SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Row:
    """A row of the file; empty: no label, no split, no column of domains."""

    number: int
    text: str
    label: str
    split: str
    domain: str = ""


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and raw records of the file."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        # utf-8-sig: spreadsheets like to put a byte order mark in front of the first column name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
            for record in reader:
                yield reader.line_num, dict(record)
    else:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _json_record(line, number)


def _json_record(line: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    contract = "hold one JSON object per line"
    require(isinstance(record, dict), "data", contract, f"line {number}: {line.strip()[:60]!r}")
    assert isinstance(record, dict)
    return record


def read_rows(path: Path, domain_column: str | None = None) -> list[Row]:
    """The rows of the file, checked.

    Args:
        path: ``.csv``, ``.tsv`` or ``.jsonl`` file.
        domain_column: Column that must name a domain in every row; None for files without.

    Raises:
        DistillError: The file breaks its contract; the message names the line.
    """
    contract = f"be a file of {', '.join(SUFFIXES)}"
    require(path.suffix.lower() in SUFFIXES, "data", contract, path.name)
    try:
        rows = [_row(number, record, domain_column) for number, record in _records(path)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DistillError(f"data must be UTF-8 {path.suffix[1:]}, got {path}: {error}") from error
    _check_rows(rows, path)
    return rows


def _row(number: int, record: dict[str, Any], domain_column: str | None) -> Row:
    require("text" in record, "data", "have a column 'text'", f"columns {sorted(map(str, record))}")
    text, label = str(record["text"] or "").strip(), record.get("label")
    require(text != "", "data", "have a text in every row", f"none in line {number}")
    split = str(record.get("split") or "").strip().lower()
    known = split == "" or split in SPLIT_NAMES
    require(known, "data", f"name a split of {sorted(SPLIT_NAMES)}", f"{split!r} in line {number}")
    domain = ""
    if domain_column is not None:
        contract = f"have a column {domain_column!r}"
        require(domain_column in record, "data", contract, f"columns {sorted(map(str, record))}")
        value = record[domain_column]
        domain = "" if value is None else str(value).strip()
        require(domain != "", "data", "name a domain in every row", f"none in line {number}")
    name = "" if label is None else str(label).strip()
    return Row(number, text, name, SPLIT_NAMES.get(split, ""), domain)


def _check_rows(rows: list[Row], path: Path) -> None:
    """Raises unless there are rows whose splits and labels fit."""
    require(len(rows) > 0, "data", "have at least one row", f"none in {path}")
    named = sum(row.split != "" for row in rows if row.label)
    labelled = sum(row.label != "" for row in rows)
    require(
        named in (0, labelled),
        "data",
        "name a split for every labelled row or for none",
        f"{named} of {labelled}",
    )
    for row in rows:
        good = row.label != "" or row.split not in ("train", "dev", "test")
        require(
            good,
            "data",
            "have a label in every train, dev and test row",
            f"none in line {row.number}",
        )


def without_repeats(rows: list[Row]) -> list[Row]:
    """Each text once: it must not be learnt from and tested on."""
    return list({" ".join(row.text.lower().split()): row for row in rows}.values())


def assign(rows: list[Row]) -> dict[str, list[Row]]:
    """Sorts labelled rows into splits, by their split column or at random."""
    splits: dict[str, list[Row]] = {"train": [], "dev": [], "test": [], "transfer": []}
    if any(row.split for row in rows):
        for row in rows:
            splits[row.split].append(row)
    else:
        splits["train"] = without_repeats(rows)
    shuffler = random.Random(SPLIT_SEED)
    shuffler.shuffle(splits["train"])
    for name, share in (("test", TEST_SHARE), ("dev", DEV_SHARE)):
        if not splits[name]:
            count = max(1, round(share * len(rows)))
            splits[name], splits["train"] = splits["train"][:count], splits["train"][count:]
    return splits


def load_own(path: Path, limits: Limits) -> Corpus:
    """Reads a task from a file.

    Unlabelled rows and labelled training rows beyond ``limits.labels`` become transfer texts.
    Without a ``split`` column a fifth of the labelled rows is held out for test, a tenth for dev.

    Args:
        path: ``.csv``, ``.tsv`` or ``.jsonl`` file.
        limits: How much of it to use.

    Raises:
        DistillError: The file breaks its contract; the message names the line.
    """
    rows = read_rows(path)
    splits = assign([row for row in rows if row.label])
    names = label_names(rows)
    numbers = {name: i for i, name in enumerate(names)}

    def labelled(chosen: list[Row]) -> Labelled:
        return Labelled([row.text for row in chosen], [numbers[row.label] for row in chosen])

    train = splits["train"]
    for name in ("train", "dev", "test"):
        require(len(splits[name]) > 0, "data", f"have labelled rows for {name}", "none")
    if limits.labels is not None and limits.exact:
        contract = f"be at most {len(train)}, the labelled training texts in {path.name}"
        require(limits.labels <= len(train), "labels", contract, limits.labels)
    used = train[: limits.labels]
    unlabelled = [row for row in rows if not row.label] + splits["transfer"] + train[len(used) :]
    return Corpus(
        train=labelled(used),
        dev=labelled(splits["dev"]),
        test=labelled(splits["test"]).head(limits.test),
        transfer=limit_transfer([row.text for row in unlabelled], limits),
        label_names=names,
        source=f"{path.name}, {len(rows)} rows",
    )


def label_names(rows: list[Row]) -> list[str]:
    """The class names: numbers in numerical order, other names in alphabetical order."""
    names = {row.label for row in rows if row.label}
    require(len(names) >= 2, "data", "have at least two different labels", sorted(names))
    if all(name.lstrip("-").isdigit() for name in names):
        return sorted(names, key=int)
    return sorted(names)
