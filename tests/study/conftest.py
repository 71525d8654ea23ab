"""A study that takes seconds: a tiny model, a task it can learn, and the command."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from helpers import reviewed
from typer.testing import CliRunner

pytest.importorskip("optuna", reason="optuna is not installed: pip install 'kdkernels[study]'")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT encoder with three layers, saved as a transformers folder."""
    return reviewed.save_encoder(tmp_path_factory.mktemp("models") / "tiny", 3, "never")


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 labelled rows in a CSV file."""
    source = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(200):
            writer.writerow([reviewed.make_text(i % 2, source, telling=1), ("neg", "pos")[i % 2]])
    return path


@pytest.fixture(scope="session")
def values(tiny_model: Path, reviews: Path) -> dict[str, Any]:
    """A small study as plain values; copy them to change them."""
    return {
        "name": "small",
        "tasks": {"reviews": {"task": "own", "data": str(reviews), "max_length": 32}},
        "students": {"tiny": {"model": str(tiny_model), "layers": [0, 2]}},
        "teachers": {"whole": {"model": str(tiny_model), "epochs": 8, "lr": 5e-3}},
        "initialisations": ["pretrained", "scratch"],
        "methods": ["ft", {"method": "ls", "label_smoothing": [0.1, 0.2]}, "kd", "self_kd"],
        "seeds": [0, 1],
        "lr": 5e-3,
        "epochs": 6,
        "batch_size": 16,
        "precision": "fp32",
    }


@pytest.fixture(scope="session")
def write_study(values: dict[str, Any]) -> Callable[..., Path]:
    """Writes a study's YAML file into a folder, with some of its values changed."""

    def write(folder: Path, **changed: Any) -> Path:
        path = folder / "study.yaml"
        path.write_text(yaml.safe_dump(values | changed, sort_keys=False), encoding="utf-8")
        return path

    return write


def invoke(*arguments: object) -> Result:
    """Calls ``kdkernels study`` in this process."""
    from kdkernels.api.cli.study import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def command() -> Callable[..., Result]:
    """``kdkernels study`` as a function of its arguments."""
    return invoke


@pytest.fixture(scope="session")
def finished(
    write_study: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """The folder of a finished study and what was printed; copy it to change it."""
    folder = tmp_path_factory.mktemp("finished")
    done = invoke(write_study(folder), "--out", folder / "out", "--workers", 1, "--threads", 1)
    assert done.exit_code == 0, done.output
    return folder / "out", done
