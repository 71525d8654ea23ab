"""Extractive question answering in the format of SQuAD v1.1, and its official figures."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdkernels.api.distill.data import divide
from kdkernels.api.distill.errors import DistillError, require

# Files of SQuADShifts by domain; the first is SQuAD v1.1's own dev set.
SQUAD_DEV = "squaddev_v1.1.json"
DOMAINS = {
    "new_wiki": "new_wiki_v1.0.json",
    "nyt": "nyt_v1.0.json",
    "reddit": "reddit_v1.0.json",
    "amazon": "amazon_reviews_v1.0.json",
}
TEST_SHARE = 0.20
DEV_SHARE = 0.10
# With fewer articles than this a split is by context: a part of one article would be all of dev.
FEWEST_ARTICLES = 10


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        article: The article of the context; contexts that occur in several are of the first.
        context: The text that holds the answer.
        text: The question.
        answers: What people answered.
        start: Where the first of the answers begins in the context.
    """

    article: str
    context: str
    text: str
    answers: tuple[str, ...]
    start: int


@dataclass(frozen=True)
class SquadFile:
    """The questions of a file.

    Attributes:
        questions: Those whose first answer is in the context where the file says.
        dropped: How many others there were.
    """

    questions: list[Question]
    dropped: int


def load_squad(path: Path) -> SquadFile:
    """Reads a file in the JSON format of SQuAD v1.1.

    A question whose first answer is not in the context at its offset is left out.

    Args:
        path: UTF-8 JSON file.

    Raises:
        DistillError: The file breaks its contract.
    """
    require(path.is_file(), "data", "be an existing file", path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # of the encoding, too
        raise DistillError(f"data must be UTF-8 JSON, got {path}: {error}") from error
    try:
        every = list(_questions(content))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise DistillError(
            "data must have the format of SQuAD v1.1 (data, paragraphs, context, qas, question, "
            f"answers with text and answer_start), got {path} without: {error}"
        ) from error
    kept = [question for question in every if _offset_matches(question)]
    contract = "have at least one question with an answer at its offset"
    require(len(kept) > 0, "data", contract, f"none of {len(every)} in {path}")
    return SquadFile(kept, len(every) - len(kept))


def _offset_matches(question: Question) -> bool:
    answer, start = question.answers[0], question.start
    return bool(answer.strip()) and start >= 0 and question.context.startswith(answer, start)


def _questions(content: Any) -> Iterator[Question]:
    home: dict[str, str] = {}
    for number, article in enumerate(content["data"]):
        for paragraph in article["paragraphs"]:
            context = paragraph["context"]
            place = home.setdefault(context, f"{number} {article.get('title', '')}")
            for entry in paragraph["qas"]:
                answers = entry["answers"]
                contract = "have an answer to every question, as SQuAD v1.1"
                require(len(answers) > 0, "data", contract, f"none to {entry['question']!r}")
                texts = tuple(answer["text"] for answer in answers)
                start = int(answers[0]["answer_start"])
                yield Question(place, context, entry["question"].strip(), texts, start)


def divide_questions(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Splits questions at random; no article is in two splits, no context where there are few.

    Args:
        questions: What to split.
    """
    by_article = len({question.article for question in questions}) >= FEWEST_ARTICLES

    def group(question: Question) -> str:
        return question.article if by_article else question.context

    train, test, dev = divide(questions, group, [TEST_SHARE, DEV_SHARE])
    return {"train": train, "dev": dev, "test": test}


def normalised(answer: str) -> str:
    """An answer as the official figures compare it: no case, punctuation, articles or gaps."""
    plain = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers after normalisation, else 0."""
    return float(any(normalised(predicted) == normalised(answer) for answer in answers))


def f1(predicted: str, answers: Sequence[str]) -> float:
    """The best F1 of the prediction's words and those of an answer, in [0, 1]."""
    return max(_word_f1(normalised(predicted).split(), normalised(a).split()) for a in answers)


def _word_f1(predicted: list[str], answer: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(answer)).values())
    return 2.0 * common / (len(predicted) + len(answer)) if common else 0.0
