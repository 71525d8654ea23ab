"""Sentences of reviews in four domains, with four kinds of sentiment (MultiEmo)."""

from __future__ import annotations

import json
from pathlib import Path

from kdkernels.api.distill.data import Corpus, Labelled, divide
from kdkernels.api.distill.errors import DistillError

DOMAINS = ("hotels", "medicine", "products", "reviews")
SHARES = (0.20, 0.10)  # of test and dev
LABELS = ("negative", "neutral", "ambivalent", "positive")
SOURCE = "sentences of hotel, medicine, product and school reviews in 4 sentiments (MultiEmo)"


def file_name(domain: str) -> str:
    """Where the sentences of a domain are in the archive."""
    return f"{domain}_sentence_en/task.json"


def load_multiemo(folder: Path) -> Corpus:
    """Builds a corpus of all four domains, mixed; a sentence that occurs twice is on one side.

    Args:
        folder: The verified files.
    """
    rows = []
    for domain in DOMAINS:
        rows += read_examples((folder / file_name(domain)).read_text(encoding="utf-8"), domain)
    train, test, dev = divide(rows, lambda row: row[1], SHARES)
    numbers = {label: number for number, label in enumerate(LABELS)}

    def labelled(part: list[tuple[str, str]]) -> Labelled:
        return Labelled([text for _, text in part], [numbers[label] for label, _ in part])

    return Corpus(labelled(train), labelled(dev), labelled(test), [], list(LABELS), SOURCE)


def read_examples(content: str, name: str) -> list[tuple[str, str]]:
    """The labels and sentences of a task file.

    Args:
        content: The file.
        name: What to call it in messages.
    """
    rows = []
    for number, example in enumerate(json.loads(content)["examples"]):
        chosen = [label for label, score in example["target_scores"].items() if score]
        if len(chosen) != 1 or chosen[0] not in LABELS:
            raise DistillError(
                f"data must have one label of {LABELS} an example, got {chosen} in example "
                f"{number} of {name}"
            )
        text = example["input"].strip()
        if text:
            rows.append((chosen[0], text))
    return rows
