"""A tiny teacher, a task it can learn, the command as users call it, and a finished run."""

from __future__ import annotations

import csv
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

GOOD = ["good", "great", "lovely", "fine", "happy"]
BAD = ["bad", "awful", "dull", "poor", "sad"]
NEUTRAL = ["the", "film", "phone", "story", "battery", "was", "and", "it", "very", "day"]


def _make_text(label: int, source: random.Random) -> str:
    """A few neutral words and two that give the label away, in random order."""
    words = source.choices(NEUTRAL, k=source.randint(3, 9))
    words += source.sample(GOOD if label else BAD, 2)
    source.shuffle(words)
    return " ".join(words)


@pytest.fixture
def make_text() -> Callable[[int, random.Random], str]:
    """Makes a text of a class, 0 or 1."""
    return _make_text


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT encoder with four layers, saved as a transformers folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "teacher"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *NEUTRAL]
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    vocabulary.write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 labelled and 90 unlabelled rows in a CSV file; copy it to change it."""
    source = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(240):
            label = i % 2
            writer.writerow([_make_text(label, source), ("neg", "pos")[label] if i < 150 else ""])
    return path


@pytest.fixture(scope="session")
def invoke() -> Callable[..., Result]:
    """Calls ``kdkernels distill`` in this process."""
    from kdkernels.api.cli.distill import distill

    app = typer.Typer()
    app.command()(distill)
    return lambda *arguments: CliRunner().invoke(app, [str(item) for item in arguments])


@pytest.fixture
def command(
    invoke: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Calls ``kdkernels distill`` in an empty folder with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    return invoke


@pytest.fixture(scope="session")
def small_run(tiny_teacher: Path, reviews: Path) -> list[str]:
    """Options of a run that takes a second or two; the name comes last."""
    options = ["--data", str(reviews), "--teacher", str(tiny_teacher), "--student-layers", "0,3"]
    options += ["--epochs", "4", "--label-epochs", "4", "--teacher-epochs", "6", "--lr", "3e-3"]
    options += ["--teacher-lr", "3e-3", "--batch-size", "16", "--seeds", "0,1", "--no-throughput"]
    return [*options, "--precision", "fp32", "--train-embeddings", "--name", "small"]


@pytest.fixture(scope="session")
def finished(
    invoke: Callable[..., Result], small_run: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run; copy it to change it."""
    out = tmp_path_factory.mktemp("finished")
    done = invoke(*small_run, "--out", out)
    assert done.exit_code == 0, done.output
    return out / "small"


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run to change, in ``runs`` of the test's folder."""
    return shutil.copytree(finished, tmp_path / "runs" / "small")
