"""Tables, sentences, picture and Markdown of a run."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kdkernels.api.distill import plot, report
from kdkernels.api.distill.config import make_config
from kdkernels.api.distill.data import Corpus, Labelled
from kdkernels.api.distill.results import ARMS, Results, gather, unit_name
from kdkernels.api.distill.train import Runtime


def unit(accuracy: float, parameters: int) -> dict[str, Any]:
    return {
        "test_accuracy": accuracy,
        "dev_accuracy": accuracy - 1,
        "curve": [[10, accuracy - 5], [20, accuracy - 1]],
        "parameters": parameters,
        "steps": 20,
        "examples": 640,
        "train_seconds": 2.0,
        "seconds": 3.0,
    }


@pytest.fixture
def units() -> dict[str, dict[str, Any]]:
    times = {"fused": 10.0, "eager": 30.0}
    found: dict[str, dict[str, Any]] = {
        "teacher": unit(82.0, 20_000_000),
        "logits": {"seconds": 5.0},
        "student": {"seed": 1, "seconds": 0.0},
        "speed": {
            "seconds": 1.0,
            "loss": {"labels": times, "logits": times},
            "inference": {"teacher": 100.0, "student": 300.0},
        },
        "throughput": {"seconds": 9.0, "rows": [{"vocabulary": 32000, "fused, ms": 1.2345}]},
    }
    for arm, mean in zip(ARMS, (75.0, 78.0, 78.5), strict=True):
        for seed, shift in ((0, -0.5), (1, 0.5)):
            found[unit_name(arm, seed)] = unit(mean + shift, 10_000_000)
    return found


@pytest.fixture
def found(units: dict[str, dict[str, Any]]) -> Results:
    return gather(units, (0, 1))


def test_rows_hold_mean_and_spread(found: Results) -> None:
    distilled = found.row("distilled")
    assert distilled.mean == 78.5
    assert distilled.accuracy_text == "78.50 ± 0.71"
    assert distilled.training_rate == 320.0
    assert found.row("teacher").accuracy_text == "82.00"
    assert found.phases["students, distilled"] == 6.0


def test_findings_keep_the_sources_of_the_gain_apart(found: Results) -> None:
    sentences = " ".join(report.findings(found))
    assert "50 % of the teacher's parameters" in sentences
    assert "3.0 times as many texts" in sentences
    assert "-3.50 points against the teacher and +3.50 against the same student" in sentences
    assert "+3.00 from learning the teacher's hard labels" in sentences
    assert "+0.50 from soft targets" in sentences


def test_one_seed_is_said_to_be_one(units: dict[str, dict[str, Any]]) -> None:
    one = gather(units, (0,))
    assert one.row("labels").spread is None
    assert "One seed" in report.findings(one)[-1]


def test_table_fits_eighty_columns(found: Results, tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=(tmp_path / "screen").open("w"))
    report.show(console, tmp_path, found)
    lines = console.export_text().splitlines()
    assert "…" not in "".join(lines)
    (distilled,) = [line for line in lines if line.strip().startswith("distilled")]
    assert "78.50 ± 0.71" in distilled
    assert any("32000" in line and "1.23" in line for line in lines)


def test_markdown_is_complete(found: Results) -> None:
    corpus = Corpus(
        train=Labelled(["a"], [0]),
        dev=Labelled(["b"], [1]),
        test=Labelled(["c"], [0]),
        transfer=["d", "e"],
        label_names=["neg", "pos"],
        source="two texts",
    )
    config = make_config({"seeds": (0, 1)})
    text = report.markdown(config, found, corpus, Runtime(torch.device("cpu"), True))
    for part in (
        "| distilled | 78.50 ± 0.71 | 10.00 | 320 | 300 | 10 | 30 |",
        "(curves.png)",
        "seed 1",
        "Apache-2.0",
        "MIT",
        "temperature: 2.0",
        f"torch {torch.__version__}",
        "| 32000 | 1.23 |",
        "| teacher | 3.0 |",
    ):
        assert part in text
    assert "None" not in text


def test_own_data_carries_no_licence_of_the_demo(found: Results, tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    own.write_text("text,label\n")
    config = make_config({"data": str(own), "teacher": str(tmp_path)})
    empty = Labelled([], [])
    corpus = Corpus(Labelled(["a"], [0]), empty, empty, [], ["neg", "pos"], "own")
    text = report.markdown(config, found, corpus, Runtime(torch.device("cpu"), False))
    assert "Apache-2.0" not in text and "1 transfer texts" in text


def test_picture_is_a_png_of_the_right_size(found: Results, tmp_path: Path) -> None:
    plot.save(tmp_path / "curves.png", found)
    header = (tmp_path / "curves.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:24]) == (1500, 630)


def test_picture_without_a_teacher_curve(units: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    units["teacher"] |= {"curve": [], "examples": 0, "train_seconds": 0.0, "dev_accuracy": None}
    found = gather(units, (0,))
    assert found.row("teacher").training_rate is None
    plot.save(tmp_path / "curves.png", found)
