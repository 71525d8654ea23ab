"""Reviews of products in several domains (Blitzer et al., 2007), as their files are published."""

from __future__ import annotations

import html
import random
import re
from pathlib import Path

from kdkernels.api.distill.domains import DomainExamples, Row, gather
from kdkernels.api.distill.errors import DistillError, require

FOLDER = "sorted_data_acl"
LABELS = ("negative", "positive")
UNLABELLED = "unlabeled"
# Folders of the data set whose names are no words.
NAMES = {"kitchen_&_housewares": "kitchen"}
SPLIT_SEED = 11111
FOLDS = 10
DEV_SHARE = 0.10

# No XML: there is no root, and ampersands stand for themselves.
REVIEW = re.compile(r"<review>(.*?)</review>", re.DOTALL)
TEXT = re.compile(r"<review_text>(.*?)</review_text>", re.DOTALL)


def load_amazon(folder: Path, fold: int = 0) -> DomainExamples:
    """Reads all domains of the data set and splits each of them, class by class.

    One of ten folds is for test and a tenth of the others for dev, which leaves 1,620, 180 and 200
    of 2,000 reviews. A review that occurs twice is taken once.

    Args:
        folder: The folder that has a folder for each domain, with ``positive.review`` and
            ``negative.review``, perhaps ``unlabeled.review``; or the folder of that one.
        fold: Number of the fold that is for test, from 0.

    Raises:
        DistillError: Files are missing or break their contract.
    """
    require(0 <= fold < FOLDS, "fold", f"lie in [0, {FOLDS})", fold)
    home = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    files = [f"{label}.review" for label in LABELS]
    found = [p for p in sorted(home.iterdir()) if all((p / file).is_file() for file in files)]
    contract = f"be the folder of {FOLDER}, with {' and '.join(files)} in a folder for each domain"
    require(len(found) > 0, "data", contract, f"{home} without")
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": [], "unlabelled": []}
    names = []
    for path in found:
        domain = NAMES.get(path.name, path.name)
        names.append(domain)
        seen: set[str] = set()
        for label in LABELS:
            texts = _unseen(read_reviews(path / f"{label}.review"), seen)
            for split, chosen in _split(texts, fold).items():
                parts[split] += [Row(domain, text, label) for text in chosen]
        unlabelled = path / f"{UNLABELLED}.review"
        if unlabelled.is_file():
            texts = _unseen(read_reviews(unlabelled), seen)
            parts["unlabelled"] += [Row(domain, text) for text in texts]
    shuffler = random.Random(SPLIT_SEED)
    for part in parts.values():  # classes and domains lie one behind the other
        shuffler.shuffle(part)
    source = (
        f"reviews of products by domain (Blitzer et al., 2007), fold {fold} of {FOLDS} for test"
    )
    return gather(parts, names, LABELS, source)


def read_reviews(path: Path) -> list[str]:
    """The texts of a file of reviews, without line breaks.

    Args:
        path: A file of the raw data set: ``<review>`` after ``<review>``, each with a
            ``<review_text>``.

    Raises:
        DistillError: There is no review, or one has no text.
    """
    where = f"{path.parent.name}/{path.name}"
    content = path.read_bytes().decode("latin-1")  # what it is in is not said; this never fails
    reviews = REVIEW.findall(content)
    contract = f"hold reviews as published in {FOLDER}, <review> after <review>"
    require(len(reviews) > 0, "data", contract, f"none in {where}")
    texts = []
    for number, review in enumerate(reviews, start=1):
        found = TEXT.search(review)
        text = "" if found is None else " ".join(html.unescape(found[1]).split())
        if not text:
            raise DistillError(
                f"data must have a <review_text> in every review, got none in review {number} of "
                f"{where}"
            )
        texts.append(text)
    return texts


def _unseen(texts: list[str], seen: set[str]) -> list[str]:
    found = []
    for text in texts:
        key = text.lower()
        if key not in seen:
            seen.add(key)
            found.append(text)
    return found


def _split(texts: list[str], fold: int) -> dict[str, list[str]]:
    """Texts of one class of one domain."""
    order = list(texts)
    random.Random(SPLIT_SEED).shuffle(order)
    rest = [text for number, text in enumerate(order) if number % FOLDS != fold]
    dev = round(DEV_SHARE * len(rest))
    return {"train": rest[dev:], "dev": rest[:dev], "test": order[fold::FOLDS]}
