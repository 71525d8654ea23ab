"""Runs of ``kdkernels distill --method diito``: of a classifier and of a masked language model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.killed import kill_behind, resume, same_student

from kdkernels.api.distill.config import from_yaml, make_config, read_values
from kdkernels.api.distill.diito_config import DiitoConfig
from kdkernels.api.distill.diito_pipeline import make_task
from kdkernels.api.distill.diito_train import weights_of
from kdkernels.api.distill.train import Runtime

Command = Callable[..., Result]
ROOT = Path(__file__).parents[2]
ACCURACY = "accuracy (%)"
CPU = Runtime(torch.device("cpu"), bf16=False)


@pytest.fixture(scope="session")
def diito_run(tiny_teacher: Path, reviews: Path) -> list[str]:
    """Options of a run that takes a few seconds; the name comes last."""
    options = ["--method", "diito", "--data", str(reviews), "--model", str(tiny_teacher)]
    options += ["--student-layers", "0,3", "--epochs", "5", "--teacher-epochs", "8"]
    options += ["--labels", "60", "--teacher-labels", "100", "--lr", "3e-3", "--teacher-lr", "3e-3"]
    options += ["--batch-size", "16", "--seeds", "0,1", "--evaluations", "2"]
    return [*options, "--precision", "fp32", "--train-embeddings", "--name", "small"]


@pytest.fixture(scope="session")
def finished_diito(
    invoke: Command, diito_run: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run; copy it to change it."""
    out = tmp_path_factory.mktemp("finished-diito")
    done = invoke(*diito_run, "--out", out)
    assert done.exit_code == 0, done.output
    return out / "small"


def results(folder: Path) -> dict[str, Any]:
    """What the units found, without times."""
    found = {}
    for unit in ("teacher", "kd-seed0", "kd-seed1", "diito-seed0", "diito-seed1"):
        result = json.loads((folder / "state" / f"{unit}.json").read_text())
        found[unit] = {key: value for key, value in result.items() if "seconds" not in key}
    return found


def test_run_of_a_classifier(finished_diito: Path) -> None:
    names = {path.name for path in finished_diito.iterdir()} - {".lock"}
    files = {"config.yaml", "log.jsonl", "curves.png", "report.md", "results.json"}
    assert names == files | {"state", "student", "teacher"}
    found = results(finished_diito)
    assert found["teacher"]["kept"]["test"][ACCURACY] > 80
    # 60 texts, 4 batches, 5 epochs.
    assert {r["steps"] for unit, r in found.items() if unit != "teacher"} == {20}
    assert found["kd-seed0"]["curve"] != found["diito-seed0"]["curve"]
    report = (finished_diito / "report.md").read_text()
    assert "distilled, DIITO against distilled" in report
    assert "DIITO: 0.5 KL, 0.5 cross-entropy, 1 counterfactual KL" in report
    kept = json.loads((finished_diito / "results.json").read_text())
    arms = kept["arms"]
    gain = sum(arms["diito"]["test"]) / 2 - sum(arms["kd"]["test"]) / 2
    assert kept["differences"][0]["mean"] == pytest.approx(gain)


def test_the_students_texts_are_the_first_of_the_teachers(finished_diito: Path) -> None:
    stored = from_yaml((finished_diito / "config.yaml").read_text())
    assert isinstance(stored, DiitoConfig)
    task, whole = (make_task(stored, CPU, lambda line: None, whole=w) for w in (False, True))
    texts, more = task.corpus.train.texts, whole.corpus.train.texts
    assert (len(texts), len(more)) == (60, 100) and more[:60] == texts
    assert task.corpus.test.texts == whole.corpus.test.texts


def test_killed_run_resumes_to_the_same_weights(
    finished_diito: Path, diito_run: list[str], tmp_path: Path
) -> None:
    """A real SIGKILL, in the middle of a training with interchanges."""
    killed, options = tmp_path / "runs" / "killed", [*diito_run[:-1], "killed"]
    kill_behind(options, tmp_path, killed / "state" / "diito-seed0.json")
    resume(options, tmp_path)
    assert results(killed) == results(finished_diito)
    assert same_student(killed, finished_diito)


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three texts whose lines have few or many words of the tiny teacher's."""
    folder, source = tmp_path_factory.mktemp("lines"), random.Random(1)
    words = ["the", "film", "phone", "story", "was", "and", "it", "very", "good", "bad"]
    for split, count in (("train", 60), ("valid", 20), ("test", 20)):
        texts = [" ".join(source.choices(words, k=source.randint(5, 40))) for _ in range(count)]
        (folder / f"wiki.{split}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return folder


def test_run_of_a_masked_language_model(command: Command, tiny_teacher: Path, lines: Path) -> None:
    options = ["--method", "diito", "--task", "mlm", "--data", lines, "--model", tiny_teacher]
    options += ["--student-layers", "0,3", "--seeds", "0", "--epochs", "2", "--max-length", "24"]
    options += [
        "--lr",
        "1e-3",
        "--precision",
        "fp32",
        "--alignment",
        "multilayer",
        "--share",
        "0.5",
    ]
    options += ["--arms", "kd,diito,kd-time", "--batch-size", "8", "--name", "lm"]
    done = command(*options)
    assert done.exit_code == 0, done.output
    kept = json.loads(Path("runs/lm/results.json").read_text())
    steps = kept["steps"]
    assert steps["kd"] == steps["diito"]
    assert steps["kd-time"] == round(kept["pace"]["ratio"] * steps["kd"])
    assert 0 < kept["arms"]["diito"]["test"][0] < 40  # of 25 words; untrained: more
    report = Path("runs/lm/report.md").read_text()
    assert "0.25 counterfactual KL; distilled: 0.333 KL, 0.333 cross-entropy" in report
    from transformers import AutoModelForMaskedLM

    student = AutoModelForMaskedLM.from_pretrained("runs/lm/student")
    assert student.config.num_hidden_layers == 2


def test_masked_lm_data(tiny_teacher: Path, lines: Path) -> None:
    config = make_config(
        {
            "objective": "diito", "task": "mlm", "data": str(lines), "model": str(tiny_teacher),
            "student_layers": (0, 3), "max_length": 24,
        }
    )  # fmt: skip
    assert isinstance(config, DiitoConfig)
    task = make_task(config, CPU, lambda line: None)
    rows = task.sequences["train"]
    start, end = task.tokenizer.cls_token_id, task.tokenizer.sep_token_id
    assert all(row[0] == start and row[-1] == end and 12 <= len(row) <= 24 for row in rows)
    step = task.schedule(1, 8, 0)[0]
    base, source = task.pair(step)
    again, _ = task.pair(step)
    assert all(torch.equal(base[key], again[key]) for key in base)
    assert source["input_ids"].shape[1] <= base["input_ids"].shape[1]
    hidden = base["labels"] != -100
    assert bool(hidden.any(1).all())  # one at least of each
    truth = torch.where(hidden, base["labels"], base["input_ids"])
    mine = [rows[row] for row in step.rows]
    for row, length, found in zip(mine, base["lengths"].tolist(), truth.tolist(), strict=True):
        assert found[:length] == row
    special = torch.isin(truth, torch.tensor([start, end, task.tokenizer.pad_token_id]))
    assert not bool((special & hidden).any())
    masks = (base["input_ids"] == task.tokenizer.mask_token_id) & hidden
    assert bool(masks.any())


def test_weights_of_the_baseline() -> None:
    given = {"objective": "diito", "task": "mlm"}
    config = make_config(given)
    assert isinstance(config, DiitoConfig)
    third = pytest.approx(1 / 3)
    expected = {"kd_weight": third, "ce_weight": third, "cosine_weight": third}
    assert weights_of(config, False) == {**expected, "cf_weight": 0.0, "cf_cosine_weight": 0.0}
    task = make_config({"objective": "diito", "kd_weight": 0.7, "ce_weight": 0.3})
    assert isinstance(task, DiitoConfig)
    assert weights_of(task, False)["kd_weight"] == 0.7 and weights_of(task, True)["cf_weight"] == 1


@pytest.mark.parametrize("path", sorted((ROOT / "studies/causal-distillation").glob("*.yaml")))
def test_published_configurations(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("models/bert-base-uncased", "data/wikitext-103"):
        (tmp_path / folder).mkdir(parents=True)
    config = make_config(read_values(path))
    assert isinstance(config, DiitoConfig)
    assert (config.batch_size * config.accumulate, config.epochs) == (240, 3)
    alignment = config.aligned(12)
    assert alignment.student_layers == len(config.student_layers)
    assert f"-{alignment.student_layers}-layers" in path.name


def test_options_from_a_file(command: Command, finished_diito: Path, tmp_path: Path) -> None:
    """A run's own file is one; flags come before it."""
    file = finished_diito / "config.yaml"
    again = command("--config", file, "--out", tmp_path / "runs", "--name", "b", "--seeds", "1")
    assert again.exit_code == 0, again.output
    alone = json.loads((tmp_path / "runs/b/state/diito-seed1.json").read_text())
    assert alone["kept"] == results(finished_diito)["diito-seed1"]["kept"]
    bad = tmp_path / "bad.yaml"
    bad.write_text("objective: diito\nalignmnt: multilayer\n", encoding="utf-8")
    done = command("--config", bad)
    assert done.exit_code == 1
    assert "hold options of kdkernels distill, got 'alignmnt'; did you mean" in done.output
    assert "distill: config must be an existing file" in command("--config", "no.yaml").output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "lm"], "task must be one of sentiment, r8, r52, 20news, cola"),
        (["--arms", "kd,swa"], "arms must name some of kd, diito, kd-time, got 'swa'"),
        (["--arms", "kd,kd-time"], "arms must have diito beside kd-time, got kd,kd-time"),
        (["--alignment", "best"], "alignment must be one of single_middle, middle_late, "),
        (["--index-mode", "x"], "index-mode must be one of aligned, release, got 'x'"),
        (["--positions", "masked"], "positions must be consecutive or random: only --task mlm"),
        (["--share", "2"], "share must lie in [0, 1], got 2.0"),
        (["--task", "mlm", "--data", "no"], "data must be an existing file or folder, got no"),
        (["--task", "cola"], "data must name the folder of GLUE's files for --task cola, got none"),
        (["--swa-every", "2"], "swa-every must be left out with --method diito, got (2,)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    command: Command, options: list[str], message: str
) -> None:
    done = command("--method", "diito", *options)
    assert done.exit_code == 1
    assert f"distill: {message}" in done.output, done.output
    assert done.output.count("\n") == 1 and not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "teacher must be a saved sequence classifier if teacher-epochs is 0, got"),
        (["--task", "mlm"], "model must be a saved masked language model if teacher-epochs is 0"),
    ],
)
def test_a_teacher_that_is_not_trained_must_have_been(
    command: Command,
    tiny_teacher: Path,
    reviews: Path,
    lines: Path,
    options: list[str],
    message: str,
) -> None:
    """An encoder's head would be drawn at random, and teach nothing."""
    data = lines if options else reviews
    given = [
        "--data",
        data,
        "--model",
        tiny_teacher,
        "--student-layers",
        "0,3",
        "--max-length",
        "24",
    ]
    done = command("--method", "diito", *options, *given, "--teacher-epochs", "0")
    assert done.exit_code == 1
    assert f"distill: {message}" in done.output, done.output
    assert not Path("runs").exists()


def test_a_trained_teacher_is_taken_as_it_is(
    command: Command, finished_diito: Path, reviews: Path
) -> None:
    given = ["--data", reviews, "--model", finished_diito / "teacher", "--student-layers", "0,3"]
    options = ["--teacher-epochs", "0", "--epochs", "1", "--seeds", "0", "--precision", "fp32"]
    done = command("--method", "diito", *given, *options, "--labels", "60", "--name", "taken")
    assert done.exit_code == 0, done.output
    taken = json.loads(Path("runs/taken/state/teacher.json").read_text())
    assert taken["kept"]["test"] == results(finished_diito)["teacher"]["kept"]["test"]
    assert taken["steps"] == 0


def test_an_alignment_must_fit_the_models(
    command: Command, diito_run: list[str], tmp_path: Path
) -> None:
    from kdkernels import Alignment

    Alignment.named("multilayer", 6, 2).save(tmp_path / "a.json")
    done = command(*diito_run, "--alignment", tmp_path / "a.json")
    assert done.exit_code == 1
    assert "alignment must be for 4 and 2 layers of teacher and student, got 6 and 2 in" in (
        done.output
    )
