"""The user's own CSV and JSONL files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdkernels.api.distill.data import Limits
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.own_data import load_own


def write_csv(folder: Path, *lines: str) -> Path:
    path = folder / "own.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def labelled_lines(count: int) -> list[str]:
    return [f"text number {i},{i % 3}" for i in range(count)]


def test_random_splits_are_disjoint_and_complete(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "text,label", *labelled_lines(100), "free one,", '"free, two",')
    corpus = load_own(path, Limits())
    parts = [corpus.train.texts, corpus.dev.texts, corpus.test.texts, corpus.transfer]
    assert [len(part) for part in parts] == [70, 10, 20, 2]
    assert len(set().union(*parts)) == 102
    assert corpus.label_names == ["0", "1", "2"]
    for text, label in zip(corpus.test.texts, corpus.test.labels, strict=True):
        assert int(text.split()[-1]) % 3 == label


def test_labels_beyond_the_limit_are_hidden_not_lost(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "text,label", *labelled_lines(100))
    corpus = load_own(path, Limits(labels=30))
    assert (len(corpus.train), len(corpus.transfer)) == (30, 40)
    assert not set(corpus.train.texts) & set(corpus.transfer)


def test_repeated_texts_stay_in_one_split(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "text,label", *labelled_lines(60), *labelled_lines(60))
    corpus = load_own(path, Limits())
    assert len(corpus.train) + len(corpus.dev) + len(corpus.test) == 60


def test_split_column_is_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [("a", "x", "train"), ("b", "y", "train"), ("c", "x", "validation"), ("d", "y", "test")]
    records = [{"text": t, "label": n, "split": s} for t, n, s in rows]
    records += [{"text": "e", "label": None, "split": "transfer"}, {"text": "f"}]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    corpus = load_own(path, Limits())
    assert sorted(corpus.train.texts) == ["a", "b"]
    assert (corpus.dev.texts, corpus.test.texts) == (["c"], ["d"])
    assert corpus.transfer == ["e", "f"]


def test_byte_order_mark_and_numeric_order(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    lines = ["text,label", *(f"text {i},{i % 11}" for i in range(110))]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    assert load_own(path, Limits()).label_names == [str(i) for i in range(11)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["label", "x"], "have a column 'text', got columns"),
        (["text,label", ",x"], "have a text in every row, got none in line 2"),
        (["text,label"], "have at least one row, got none"),
        (["text,label", "a,x", "b,x"], r"have at least two different labels, got \['x'\]"),
        (["text,label,split", "a,x,tain"], r"name a split of .*, got 'tain' in line 2"),
        (["text,label,split", "a,x,train", "b,y,"], "every labelled row or for none, got 1 of 2"),
        (["text,label,split", "a,,test"], "label in every train, dev and test row, got none in l"),
        (["text,label", "a,x", "b,y"], "have labelled rows for train, got none"),
    ],
)
def test_contracts(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DistillError, match=f"^data must .*{message}"):
        load_own(write_csv(tmp_path, *lines), Limits())


def test_file_kinds(tmp_path: Path) -> None:
    other = tmp_path / "own.txt"
    other.write_text("x")
    with pytest.raises(
        DistillError, match=r"^data must be a file of .csv, .tsv, .jsonl, got own.t"
    ):
        load_own(other, Limits())
    broken = tmp_path / "own.jsonl"
    broken.write_text('{"text": "a", "label": 1}\nnot json\n')
    with pytest.raises(DistillError, match=r"^data must hold one JSON object per line, got line 2"):
        load_own(broken, Limits())
    latin = tmp_path / "own.csv"
    latin.write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    with pytest.raises(DistillError, match=r"^data must be UTF-8 csv, got"):
        load_own(latin, Limits())


@pytest.mark.parametrize("limits", [Limits(labels=71), Limits(transfer=1)])
def test_asking_for_more_than_there_is(tmp_path: Path, limits: Limits) -> None:
    path = write_csv(tmp_path, "text,label", *labelled_lines(100))
    with pytest.raises(DistillError, match=r"(labels|transfer) must be at most \d+, .*, got \d+"):
        load_own(path, limits)
