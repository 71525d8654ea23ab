"""The demo's task: four domains of short texts, rated for sentiment by people."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kdkernels.api.distill.data import SPLIT_SEED, Corpus, Labelled, Limits, limit_transfer
from kdkernels.api.distill.errors import DistillError, require

TEST_SHARE = 0.20
DEV_SHARE = 0.04
LABELS = ("negative", "positive")
SOURCE = "human-rated sentiment of movie, product, news and tweet snippets, by sign"

SENTIMENT_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
# Domain, file, and whether several snippets come from one document (`document_snippet` ids).
SENTIMENT_FILES = (
    ("movie", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"),
    ("amazon", "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"),
    ("nyt", "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"),
    ("tweets", "hutto_ICWSM_2014/tweets_GroundTruth.txt"),
)


@dataclass(frozen=True)
class Snippet:
    """A text of a document, with its class."""

    document: str
    text: str
    label: int


def read_snippets(archive: Path) -> Iterator[Snippet]:
    """Reads the four domains out of the source archive, without snippets rated exactly zero."""
    with tarfile.open(archive) as outer:
        member = outer.extractfile(SENTIMENT_MEMBER)
        if member is None:
            raise DistillError(f"{archive} must hold {SENTIMENT_MEMBER}, got a folder there")
        inner_bytes = member.read()
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        for domain, name in SENTIMENT_FILES:
            file = inner.extractfile(name)
            if file is None:
                raise DistillError(f"{archive} must hold {name}, got a folder there")
            for line in file.read().decode("utf-8").splitlines():
                fields = line.split("\t", 2)
                if len(fields) != 3 or float(fields[1]) == 0.0:
                    continue
                document = fields[0].split("_")[0]
                yield Snippet(f"{domain}/{document}", fields[2].strip(), int(float(fields[1]) > 0))


def documents(snippets: Iterable[Snippet]) -> list[list[Snippet]]:
    """Groups snippets by document, dropping texts seen before, in a fixed random order."""
    seen: set[str] = set()
    groups: dict[str, list[Snippet]] = {}
    for snippet in snippets:
        key = " ".join(snippet.text.lower().split())
        if key and key not in seen:
            seen.add(key)
            groups.setdefault(snippet.document, []).append(snippet)
    found = [groups[name] for name in sorted(groups)]
    random.Random(SPLIT_SEED).shuffle(found)
    return found


def load_sentiment(archive: Path, limits: Limits) -> Corpus:
    """Builds the demo's corpus; no document is in two splits.

    Args:
        archive: The verified source archive.
        limits: How much of it to use.
    """
    found = documents(read_snippets(archive))
    total = sum(len(document) for document in found)
    queue = iter(found)

    def take(count: int) -> list[Snippet]:
        taken: list[Snippet] = []
        while len(taken) < count and (document := next(queue, None)) is not None:
            taken += document
        return taken

    test = _labelled(take(round(TEST_SHARE * total)))
    dev = _labelled(take(round(DEV_SHARE * total)))
    pool = total - len(test) - len(dev)
    wanted = limits.labels or pool
    require(wanted <= pool, "labels", f"be at most {pool} for this data", wanted)
    train = _labelled(take(wanted)).head(wanted)
    transfer = [snippet.text for snippet in take(pool)]
    return Corpus(
        train=train,
        dev=dev,
        test=test.head(limits.test),
        transfer=limit_transfer(transfer, limits),
        label_names=list(LABELS),
        source=SOURCE,
    )


def _labelled(snippets: list[Snippet]) -> Labelled:
    return Labelled([s.text for s in snippets], [s.label for s in snippets])
