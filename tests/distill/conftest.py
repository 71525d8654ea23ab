"""A tiny teacher, a task it can learn, the command as users call it, and a finished run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from click.testing import Result
from helpers import reviewed
from typer.testing import CliRunner

GLUE_HEADER = {"RTE": "index\tsentence1\tsentence2\tlabel", "STS-B": "sentence1\tsentence2\tscore"}


@pytest.fixture
def make_text() -> Callable[[int, random.Random], str]:
    """Makes a text of a class, 0 or 1."""
    return reviewed.make_text


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT encoder with four layers, saved as a transformers folder."""
    return reviewed.save_encoder(tmp_path_factory.mktemp("models") / "teacher", 4)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 labelled and 90 unlabelled rows in a CSV file; copy it to change it."""
    return reviewed.write_reviews(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.fixture
def glue_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTE and STS-B in a folder each; what decides is the first text alone."""
    source, above = random.Random(8), tmp_path_factory.mktemp("glue")
    for task, labels in (("RTE", ("not_entailment", "entailment")), ("STS-B", ("1.0", "4.0"))):
        (above / task).mkdir()
        for file, count in (("train.tsv", 130), ("dev.tsv", 40)):
            lines = [GLUE_HEADER[task]]
            for i in range(count):
                texts = f"{reviewed.make_text(i % 2, source)}\tthe day {i}\t{labels[i % 2]}"
                lines.append(f"{i}\t{texts}" if task == "RTE" else texts)
            (above / task / file).write_text("\n".join(lines), encoding="utf-8")
    return above


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


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 600 lines; what follows a word depends on it."""
    return reviewed.write_lines(tmp_path_factory.mktemp("text") / "lines.txt")


@pytest.fixture(scope="session")
def tiny_lm(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six layers with a tied head, trained a little on the text, as a folder."""
    return reviewed.save_language_model(tmp_path_factory.mktemp("models") / "lm", tiny_text)


@pytest.fixture(scope="session")
def small_lm_run(tiny_lm: Path, tiny_text: Path) -> list[str]:
    """Options of a run of the language-model objective; the name comes last."""
    options = ["--objective", "lm", "--model", str(tiny_lm), "--data", str(tiny_text)]
    options += ["--layers", "2", "--seq-len", "32", "--tokens", "4096", "--eval-tokens", "512"]
    options += ["--batch-size", "8", "--epochs", "2", "--top-k", "16", "--lr", "3e-3", "--quick"]
    return [*options, "--precision", "fp32", "--train-embeddings", "--name", "small"]


@pytest.fixture(scope="session")
def finished_lm(
    invoke: Callable[..., Result], small_lm_run: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run; copy it to change it."""
    out = tmp_path_factory.mktemp("finished-lm")
    done = invoke(*small_lm_run, "--out", out)
    assert done.exit_code == 0, done.output
    return out / "small"
