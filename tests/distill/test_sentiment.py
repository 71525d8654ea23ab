"""The demo's splits, on a small archive of the same layout."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from kdkernels.api.distill.data import Corpus, Limits
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.sentiment import SENTIMENT_FILES, SENTIMENT_MEMBER, load_sentiment


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Four domains of 40 documents, five snippets each where documents have several."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for domain, name in SENTIMENT_FILES:
            lines = []
            for document in range(40):
                for part in range(5 if domain in ("amazon", "nyt") else 1):
                    row = f"{document}_{part}" if domain in ("amazon", "nyt") else f"{document}"
                    score = (document + part) % 3 - 1
                    lines.append(f"{row}\t{score}.0\t{domain} document{document} part{part}")
            lines.append(f"99\t1.5\t{domain}  Document0 part0")
            add(tar, name, "\r\n".join(lines).encode())
    path = tmp_path / "corpus.tar.gz"
    with tarfile.open(path, mode="w:gz") as tar:
        add(tar, SENTIMENT_MEMBER, inner.getvalue())
    return path


def parts(corpus: Corpus) -> dict[str, list[str]]:
    return {
        "train": corpus.train.texts,
        "dev": corpus.dev.texts,
        "test": corpus.test.texts,
        "transfer": corpus.transfer,
    }


def test_no_document_is_in_two_splits(archive: Path) -> None:
    corpus = load_sentiment(archive, Limits(labels=60, transfer=100))
    homes: dict[tuple[str, ...], set[str]] = {}
    for split, texts in parts(corpus).items():
        for text in texts:
            homes.setdefault(tuple(text.split()[:2]), set()).add(split)
    assert all(len(splits) == 1 for splits in homes.values())
    assert (len(corpus.train), len(corpus.transfer)) == (60, 100)
    assert len(corpus.test) > 0 and len(corpus.dev) > 0


def test_zero_scores_and_repeated_texts_are_dropped(archive: Path) -> None:
    corpus = load_sentiment(archive, Limits(labels=60))
    texts = [text for chosen in parts(corpus).values() for text in chosen]
    keys = [" ".join(text.lower().split()) for text in texts]
    assert len(keys) == len(set(keys))
    for text in texts:
        document, part = (int("".join(filter(str.isdigit, word))) for word in text.split()[1:])
        assert (document + part) % 3 != 1 or (document, part) == (0, 0)


def test_labels_are_signs(archive: Path) -> None:
    corpus = load_sentiment(archive, Limits(labels=60))
    for text, label in zip(corpus.train.texts, corpus.train.labels, strict=True):
        document, part = (int("".join(filter(str.isdigit, word))) for word in text.split()[1:])
        if (document, part) != (0, 0):
            assert label == int((document + part) % 3 == 2)


def test_splits_do_not_change(archive: Path) -> None:
    limits = Limits(labels=60, transfer=100)
    assert load_sentiment(archive, limits) == load_sentiment(archive, limits)


def test_too_large_requests_are_errors_unless_quick(archive: Path) -> None:
    with pytest.raises(DistillError, match=r"^labels must be at most"):
        load_sentiment(archive, Limits(labels=10**6))
    with pytest.raises(DistillError, match=r"^transfer must be at most"):
        load_sentiment(archive, Limits(labels=60, transfer=10**6))
    corpus = load_sentiment(archive, Limits(labels=60, transfer=10**6, test=3, exact=False))
    assert len(corpus.test) == 3
