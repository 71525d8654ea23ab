"""Sentences with tags: reading, word pieces, span F1, and the task."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdkernels.api.distill import fetch, tasks
from kdkernels.api.distill.conll import (
    Sentence,
    load_conll,
    load_conll2003,
    span_f1,
    spans,
    tag_names,
)
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.task import TaskOptions
from kdkernels.api.distill.train import Loop, Recipe, Runtime, run

RUNTIME = Runtime(torch.device("cpu"), bf16=False)
TAGS = {"good": "B-UP", "great": "I-UP", "bad": "B-DOWN", "awful": "I-DOWN"}


@pytest.fixture
def options(tiny_teacher: Path) -> TaskOptions:
    return TaskOptions(tiny_teacher, (0, 3), RUNTIME, max_length=16, train_embeddings=True)


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 sentences in four columns; "good great" and "bad awful" are spans of two words."""
    source = random.Random(3)
    lines = ["-DOCSTART- -X- -X- O", ""]
    for _ in range(300):
        words = source.choices(["the", "film", "was", "very", "it"], k=source.randint(3, 7))
        words[1:1] = source.choice([["good", "great"], ["bad", "awful"]])
        lines += [f"{word} NN I-NP {TAGS.get(word, 'O')}" for word in words] + [""]
    path = tmp_path_factory.mktemp("columns") / "tagged.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-PER I-PER O", {(1, 2, "PER")}),
        ("O I-PER I-PER O", {(1, 2, "PER")}),
        ("B-PER B-PER", {(0, 0, "PER"), (1, 1, "PER")}),
        ("B-PER I-LOC I-LOC", {(0, 0, "PER"), (1, 2, "LOC")}),
        ("O O", set()),
        ("I-X-Y", {(0, 0, "X-Y")}),
    ],
)
def test_spans_are_those_of_conlleval(tags: str, expected: set[tuple[int, int, str]]) -> None:
    assert spans(tags.split()) == expected


def test_span_f1_by_hand() -> None:
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"], ["O", "O"]]
    said = [["I-PER", "I-PER", "O", "I-LOC"], ["B-ORG", "I-ORG"], ["O", "B-PER"]]
    # Right: PER and LOC of the first; the ORG is too long; one PER is nothing. 2 of 3, 2 of 4.
    assert span_f1(gold, said) == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert span_f1(gold, gold) == 100.0
    assert span_f1(gold, [["O"] * len(tags) for tags in gold]) == 0.0


def test_columns_are_read(columns: Path) -> None:
    sentences = load_conll(columns)
    assert len(sentences) == 300
    assert tag_names(sentences) == ["O", "B-DOWN", "B-UP", "I-DOWN", "I-UP"]
    assert sentences[0].tags[1][2:] == sentences[0].tags[2][2:] != ""


def test_other_white_space_is_part_of_words(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("a\u00a0b\tB-X\r\n\u2028 O\r\n\r\nc O\r\n".encode())
    assert load_conll(path) == [
        Sentence(("a\u00a0b", "\u2028"), ("B-X", "O")),
        Sentence(("c",), ("O",)),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"word\n", r"^data must have the word first and its tag last in every line, got 'word'"),
        (b"a O\nb NN\n", r"^data must have the tags O, B-kind and I-kind, got 'b NN' in line 2"),
        (b"a S-PER\n", r"^data must have the tags O, B-kind and I-kind"),
        (b"a B-\n", r"^data must have the tags O, B-kind and I-kind"),
        (b"\n\n", r"^data must have at least one sentence, got none in words.txt"),
        (b"caf\xe9 O\n", r"^data must be UTF-8 text, got .*words.txt"),
    ],
)
def test_bad_columns(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(DistillError, match=message):
        load_conll(path)


def test_bad_files(tmp_path: Path, options: TaskOptions) -> None:
    with pytest.raises(DistillError, match=r"^data must be an existing file, got .*none.txt"):
        load_conll(tmp_path / "none.txt")
    path = tmp_path / "outside.txt"
    path.write_text("".join(f"w{i} O\n\n" for i in range(30)))
    with pytest.raises(DistillError, match=r"^data must tag at least one span, got nothing but O"):
        tasks.conll_task(options, path)
    path.write_text("a B-X\n")
    with pytest.raises(DistillError, match=r"^data must have train sentences, got none"):
        tasks.conll_task(options, path)


def test_equal_sentences_are_on_one_side(options: TaskOptions, columns: Path) -> None:
    task = tasks.conll_task(options, columns)
    homes = [{sentence.words for sentence in part} for part in task.sentences.values()]
    assert len(set.union(*homes)) == sum(map(len, homes))
    counts = {split: len(part) for split, part in task.sentences.items()}
    assert sum(counts.values()) == 300 and counts["test"] >= 60 and counts["dev"] >= 30
    assert task.source == (
        f"tagged.txt: {counts['train']} training, {counts['dev']} dev and {counts['test']} test "
        "sentences with 5 tags"
    )


def test_first_pieces_have_the_labels(options: TaskOptions) -> None:
    sentence = Sentence(("good", "great-great", "the"), ("B-UP", "I-UP", "O"))
    parts = {split: [sentence] for split in ("train", "dev", "test")}
    task = tasks.TaggingTask(options, parts, "one sentence")
    part = task._encoded["train"]
    pieces = task.tokenizer.convert_ids_to_tokens(part.ids[0])
    assert pieces == ["[CLS]", "good", "great", "[UNK]", "great", "the", "[SEP]"]
    assert part.labels[0] == [-100, 1, 2, -100, -100, 0, -100]
    assert part.firsts[0] == {0: 1, 1: 2, 2: 5}


def test_words_that_are_cut_off_are_outside(options: TaskOptions) -> None:
    words = ("the",) * 20 + ("good",)
    sentence = Sentence(words, ("O",) * 20 + ("B-UP",))
    parts = {split: [sentence] for split in ("train", "dev", "test")}
    task = tasks.TaggingTask(options, parts, "one long sentence")
    assert len(task._encoded["train"].ids[0]) == 16
    (tags,) = task.predict(task.new_model(0), "test")
    assert len(tags) == 21 and tags[14:] == ["O"] * 7


def test_loss_is_cross_entropy_of_words(options: TaskOptions, columns: Path) -> None:
    task = tasks.conll_task(replace(options, train=40), columns)
    model, step = task.new_model(0), task.schedule(1, 8, 0)[0]
    part, logits, labels = task._encoded["train"], [], []
    for row in step:
        kept = [i for i, label in enumerate(part.labels[row]) if label != -100]
        logits.append(model(torch.tensor([part.ids[row]])).logits[0, kept])
        labels += [part.labels[row][i] for i in kept]
    expected = F.cross_entropy(torch.cat(logits), torch.tensor(labels))
    torch.testing.assert_close(task.loss(model, step), expected, rtol=1e-4, atol=1e-5)


def test_order_and_head_depend_on_the_seed_alone(options: TaskOptions, columns: Path) -> None:
    task = tasks.conll_task(options, columns)
    steps = task.schedule(2, 16, 1)
    assert steps == task.schedule(2, 16, 1) != task.schedule(2, 16, 2)
    assert sum(task.size(step) for step in steps) == 2 * len(task.sentences["train"])
    heads = [task.new_model(seed).classifier.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_task_learns_and_is_saved(options: TaskOptions, columns: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    task = tasks.conll_task(options, columns)
    model = task.new_model(0)
    steps = task.schedule(6, 16, 0)
    loop = Loop[list[int]](
        lambda step: task.loss(model, step), lambda: 0.0, "none", task.size, lambda event: None
    )
    run(model, steps, loop, Recipe(6, 3e-3, 16, 0, evaluations=0))
    figures = task.evaluate(model, "test")
    assert list(figures) == ["span F1 (%)", "token accuracy (%)"] and not model.training
    assert figures["span F1 (%)"] > 90.0
    task.save(model, tmp_path)
    loaded: Any = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert [loaded.config.id2label[i] for i in range(5)] == task.tags
    assert task.evaluate(loaded, "test") == figures


@pytest.mark.network
def test_published_conll2003(tmp_path: Path) -> None:
    """Downloads 27 MB (research use only); run with ``pytest tests/distill -m network``."""
    told: list[str] = []
    parts = load_conll2003(fetch.fetch(fetch.CONLL2003, told.append))
    assert not told or "research use only" in told[-1]
    counts = {
        split: (len(part), sum(len(sentence.words) for sentence in part))
        for split, part in parts.items()
    }
    assert counts == {"train": (14041, 203621), "dev": (3250, 51362), "test": (3453, 46435)}
    kinds = {tag[2:] for tag in tag_names(parts["train"])} - {""}
    assert kinds == {"PER", "ORG", "LOC", "MISC"}
    # Of the shared task's paper: 23,499 + 5,942 + 5,648 entities.
    found = {split: sum(len(spans(s.tags)) for s in part) for split, part in parts.items()}
    assert found == {"train": 23499, "dev": 5942, "test": 5648}
