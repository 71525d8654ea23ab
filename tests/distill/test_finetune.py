"""Runs of ``kdkernels finetune``."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from kdkernels.api.distill import swa_train
from kdkernels.api.distill.arm_results import mean_text
from kdkernels.api.distill.config import from_yaml
from kdkernels.api.distill.finetune_config import FinetuneConfig

Command = Callable[..., Result]
SMALL = ["--precision", "fp32", "--evaluations", "2", "--max-length", "32", "--batch-size", "16"]


@pytest.fixture
def finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Calls ``kdkernels finetune`` in an empty folder with an empty cache."""
    from kdkernels.api.cli.finetune import finetune as command

    app = typer.Typer()
    app.command()(command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    return lambda *arguments: CliRunner().invoke(app, [str(item) for item in arguments])


def kept(folder: Path, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """What the trainings found, without times."""
    found = []
    for seed in seeds:
        result = json.loads((folder / "state" / f"ft-seed{seed}.json").read_text())
        found.append({key: value for key, value in result.items() if "seconds" not in key})
    return found


def test_pairs_are_classified_and_a_stopped_run_goes_on(
    finetune: Command, tiny_teacher: Path, glue_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", tiny_teacher, "--task", "rte", "--data", glue_folder, *SMALL]
    options += ["--student-layers", "0,3", "--seeds", "0,1", "--epochs", "8", "--lr", "3e-3"]
    done = finetune(*options, "--name", "whole")
    assert done.exit_code == 0, done.output
    found = kept(Path("runs/whole"), (0, 1))
    test = [unit["kept"]["test"]["accuracy (%)"] for unit in found]
    assert min(test) > 80
    report = Path("runs/whole/report.md").read_text()
    dev = [unit["kept"]["dev"]["accuracy (%)"] for unit in found]
    assert "# Fine-tuning, run `whole`" in report and "Linear decay to zero." in report
    assert "| model | test accuracy (%) | dev accuracy (%) |" in report
    assert f"| fine-tuning | {mean_text(test)} | {mean_text(dev)} |" in report
    assert "fine-tuning (seeds: 2)" in done.output and mean_text(test) in done.output
    for word in ("averag", "SWA", "swa", "differ", "teacher_", "by seed"):
        assert word not in report.replace("Mean and standard deviation", ""), word
        assert word not in done.output, word
    stored = from_yaml(Path("runs/whole/config.yaml").read_text())
    assert isinstance(stored, FinetuneConfig) and stored.arms == ("ft",) and stored.lr == 3e-3

    fit = swa_train.fit

    def stop(*arguments: Any, **named: Any) -> swa_train.Trained:
        if named["seed"] == 1:
            raise KeyboardInterrupt
        return fit(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(swa_train, "fit", stop)
        done = finetune(*options, "--name", "stopped")
    assert done.exit_code == 130
    assert (
        "finetune: stopped; resume with: kdkernels finetune --resume --name stopped" in done.output
    )
    assert finetune(*options, "--name", "stopped").exit_code == 1, "the name is taken"
    done = finetune(*options[:-1], "2e-3", "--name", "stopped", "--resume")
    assert done.exit_code == 1
    assert "finetune: lr must be 0.003, as the run began, to resume it, got 0.002" in done.output
    done = finetune("--name", "stopped", "--resume", "--task", "rte")
    assert done.exit_code == 0, done.output
    assert kept(Path("runs/stopped"), (0, 1)) == found
    (glue_folder / "RTE" / "dev.tsv").touch()
    assert finetune(*options, "--name", "stopped", "--resume").exit_code == 0


def test_other_data_do_not_resume_a_run(
    finetune: Command, tiny_teacher: Path, glue_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "RTE"
    folder.mkdir()
    for path in (glue_folder / "RTE").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    options = ["--model", tiny_teacher, "--task", "rte", "--data", folder, *SMALL]
    options += ["--seeds", "0", "--epochs", "1", "--labels", "16", "--student-layers", "0"]
    assert finetune(*options).exit_code == 0
    changed = (folder / "dev.tsv").read_text().replace("day 1", "day 2")
    (folder / "dev.tsv").write_text(changed, encoding="utf-8")
    done = finetune(*options, "--resume")
    assert done.exit_code == 1
    assert "finetune: data must be what the run began with, got other texts in" in done.output


def test_a_distilled_student_learns_scores(
    finetune: Command, tiny_teacher: Path, glue_folder: Path, tmp_path: Path
) -> None:
    """A student with a head of two classes, as ``kdkernels distill`` writes it."""
    from transformers import AutoModelForSequenceClassification

    from kdkernels.api.distill import models

    student = tmp_path / "student"
    student.mkdir()
    teacher = models.load_classifier(tiny_teacher, ["neg", "pos"], "teacher", 0)
    models.cut_layers(teacher, (0, 3)).save(student)
    options = ["--model", student, "--task", "sts-b", "--data", glue_folder, *SMALL]
    done = finetune(*options, "--seeds", "0", "--lr", "3e-3", "--epochs", "6", "--test", "30")
    assert done.exit_code == 0, done.output
    (found,) = kept(Path("runs/finetune"), (0,))
    figures = found["kept"]["test"]
    assert list(figures) == ["Pearson (%)", "Spearman (%)"] and figures["Pearson (%)"] > 60
    report = Path("runs/finetune/report.md").read_text()
    row = " | ".join(f"{value:.2f}" for value in figures.values())
    assert "| model | test Pearson (%) | test Spearman (%) | dev Pearson (%) |" in report
    assert f"| fine-tuning | {row} |" in report and "and 30 test examples" in report
    results = json.loads(Path("runs/finetune/results.json").read_text())
    assert results["arms"]["ft"]["figures"] == {name: [v] for name, v in figures.items()}
    model = AutoModelForSequenceClassification.from_pretrained("runs/finetune/student")
    assert model.config.num_hidden_layers == 2 and model.config.problem_type == "regression"


def test_a_masked_language_model_learns_to_tag(
    finetune: Command, tiny_teacher: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder, path, source = tmp_path / "mlm", tmp_path / "tagged.txt", random.Random(3)
    AutoModelForMaskedLM.from_pretrained(tiny_teacher).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    lines = []
    for _ in range(60):
        words = source.choices(["the", "film", "was"], k=4)
        lines += [f"{word} O" for word in words] + ["good B-P", "great I-P", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    options = ["--model", folder, "--task", "ner", "--data", path, "--seeds", "0", *SMALL]
    done = finetune(*options, "--lr", "3e-3", "--student-layers", "0,1")
    assert done.exit_code == 0, done.output
    (found,) = kept(Path("runs/finetune"), (0,))
    assert found["kept"]["test"]["span F1 (%)"] > 90
    assert (
        "| test span F1 (%) | test token accuracy (%) |"
        in Path("runs/finetune/report.md").read_text()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "lm"], "task must be one of sentiment, r8, r52, 20news, ner, qa, cola, sst-2"),
        (["--task", "cola"], "data must name the folder of GLUE's files for --task cola, got none"),
        (["--task", "cola", "--data", "x"], "data must name the folder of GLUE's files for --task"),
        (["--task", "cola", "--data", "."], "data must be the folder of CoLA (train.tsv, dev.tsv)"),
        (["--task", "ner", "--data", "."], "data must exist, got ."),
        (["--task", "r8", "--seeds", "a"], "seeds must be integers separated by commas, got 'a'"),
        (["--model", "none"], "model must exist, got none"),
        (["--model", "."], "model must be a folder written by save_pretrained (config.json"),
        (["--labels", "0"], "labels must be at least 1, got 0"),
        (["--resume"], "resume must continue a run that exists, got runs/finetune"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    finetune: Command, reviews: Path, tiny_teacher: Path, options: list[str], message: str
) -> None:
    given = [] if "--data" in options or "--task" in options else ["--data", reviews]
    given += [] if "--model" in options else ["--model", tiny_teacher]
    done = finetune(*options, *given)
    assert done.exit_code == 1
    assert f"finetune: {message}" in done.output, done.output
    assert done.output.count("\n") == 1 and not Path("runs").exists()


def test_defaults_of_a_run() -> None:
    """The whole model on all of the data; a quick run is of a quick run's sizes."""
    from kdkernels.api.distill.config import make_config

    config = make_config({"objective": "finetune", "task": "20news"})
    assert isinstance(config, FinetuneConfig)
    assert (config.labels, config.test, config.student_layers) == (None, None, None)
    assert config.train_embeddings and config.seeds == (0, 1, 2) and config.lr == 1e-4
    config = make_config({"objective": "finetune", "task": "qa", "quick": True})
    assert isinstance(config, FinetuneConfig)
    assert (config.max_length, config.labels, config.seeds, config.dev) == (192, 64, (0,), None)
    assert config.teacher_epochs == FinetuneConfig.teacher_epochs


def test_distill_refuses_the_objective(command: Command) -> None:
    done = command("--objective", "finetune")
    assert done.exit_code == 1
    assert "objective must be asked for by kdkernels finetune, got finetune" in done.output


def test_swa_takes_the_tasks_of_glue(
    command: Command, tiny_teacher: Path, glue_folder: Path
) -> None:
    options = ["--method", "swa", "--task", "rte", "--data", glue_folder, "--model", tiny_teacher]
    options += ["--student-layers", "0", "--epochs", "1", "--seeds", "0", "--labels", "32", *SMALL]
    done = command(*options)
    assert done.exit_code == 0, done.output
    report = Path("runs/swa/report.md").read_text()
    assert "# Weight averaging" in report and "SWA against fine-tuning" in report
