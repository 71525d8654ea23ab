"""Whole runs of the command, and runs that are stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.killed import kill_at_step, kill_behind, resume, same_student
from safetensors.torch import load_file, save_file

from kdkernels.api.distill import pipeline, runner, text, train
from kdkernels.api.distill.config import from_yaml
from kdkernels.api.distill.results import ARMS, unit_name

Command = Callable[..., Result]
UNITS = ["teacher", "logits", *(unit_name(arm, seed) for arm in ARMS for seed in (0, 1))]


def results(folder: Path) -> dict[str, Any]:
    """What the units found, without times."""
    found = {}
    for unit in UNITS:
        result = json.loads((folder / "state" / f"{unit}.json").read_text())
        kept = ("test_accuracy", "dev_accuracy", "curve", "examples", "steps", "texts")
        found[unit] = {key: result[key] for key in kept if key in result}
    return found


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def check_log(folder: Path) -> None:
    """Every unit occurs once: no line is missing, none is from an abandoned attempt."""
    tests = [line["unit"] for line in log_lines(folder) if line.get("split") == "test"]
    assert sorted(tests) == sorted(unit for unit in UNITS if unit != "logits")
    steps = [(line["unit"], line["step"]) for line in log_lines(folder) if line["event"] == "step"]
    assert len(steps) == len(set(steps)) > 0


def test_run_leaves_everything_behind(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()} - {".lock"}
    files = {"config.yaml", "log.jsonl", "curves.png", "report.md"}
    assert names == files | {"state", "student", "teacher"}
    assert from_yaml((finished / "config.yaml").read_text()).seeds == (0, 1)
    check_log(finished)
    found = results(finished)
    assert found["teacher"]["test_accuracy"] > 80
    assert found["distilled-seed0"]["test_accuracy"] > 70


def test_log_has_losses_with_their_parts_and_the_speed(finished: Path) -> None:
    lines = [line for line in log_lines(finished) if line["unit"] == "distilled-seed0"]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == [20, 24]  # 90 texts in batches of 16, 4 epochs
    for line in steps:
        assert line.keys() == {"unit", "event", "step", "loss", "parts", "lr", "tokens_per_s"}
        assert line["parts"] == {"kd": line["loss"]}  # alpha is 1
        assert line["tokens_per_s"] > 0
    dev = [line for line in lines if line.get("split") == "dev"]
    curve = json.loads((finished / "state" / "distilled-seed0.json").read_text())["curve"]
    assert [[line["step"], line["accuracy"]] for line in dev] == curve


def test_student_reloads_with_plain_transformers_and_scores_the_same(
    finished: Path, reviews: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from kdkernels.api.distill.data import Limits
    from kdkernels.api.distill.own_data import load_own

    model = AutoModelForSequenceClassification.from_pretrained(finished / "student")
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.num_hidden_layers == 2
    test = load_own(reviews, Limits()).test
    runtime = train.Runtime(torch.device("cpu"), bf16=False)
    ids = text.encode(tokenizer, test.texts, 128)
    logits = train.predict(model, ids, runtime, tokenizer.pad_token_id)
    best = json.loads((finished / "state" / "student.json").read_text())["seed"]
    found = results(finished)
    assert found[f"distilled-seed{best}"]["test_accuracy"] == pytest.approx(
        train.accuracy(logits, torch.tensor(test.labels))
    )
    scores = [found[f"distilled-seed{seed}"]["dev_accuracy"] for seed in (0, 1)]
    assert scores[best] == max(scores)


def test_existing_run_is_not_touched(
    finished_copy: Path, command: Command, small_run: list[str]
) -> None:
    before = (finished_copy / "report.md").stat().st_mtime_ns
    again = command(*small_run)
    assert again.exit_code == 1
    assert "distill: name must name a run that does not exist yet (--resume" in again.output
    assert (finished_copy / "report.md").stat().st_mtime_ns == before


def test_resuming_a_finished_run_reports_again(finished_copy: Path, command: Command) -> None:
    (finished_copy / "report.md").unlink()
    again = command("--resume", "--name", "small")
    assert again.exit_code == 0, again.output
    assert "distilled" in again.output
    assert (finished_copy / "report.md").exists()


@pytest.mark.usefixtures("finished_copy")
def test_resume_names_the_differing_key(command: Command) -> None:
    again = command("--resume", "--name", "small", "--temperature", "3")
    assert again.exit_code == 1
    assert (
        "distill: temperature must be 2.0, as the run began, to resume it, got 3.0" in again.output
    )


def test_resume_notices_changed_data(
    command: Command, finished_copy: Path, reviews: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "reviews.csv"
    changed.write_text(reviews.read_text().replace("film", "movie"))
    config = finished_copy / "config.yaml"
    config.write_text(config.read_text().replace(str(reviews), str(changed)))
    again = command("--resume", "--name", "small")
    assert again.exit_code == 1
    assert "distill: data must be what the run began with" in again.output


def test_resume_needs_a_run(command: Command) -> None:
    missing = command("--resume", "--name", "nothing")
    assert missing.exit_code == 1
    assert "distill: resume must continue a run that exists, got" in missing.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,a"], "distill: seeds must be integers separated by commas, got '0,a'"),
        (["--alpha", "2"], "distill: alpha must lie in [0, 1], got 2.0"),
        (["--data", "none.csv"], "distill: data must be an existing file, got none.csv"),
        (["--student-layers", "0,9"], "distill: student-layers must lie in 0..3 for this teacher"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    command: Command, small_run: list[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    failed = command(*small_run, *arguments)
    assert failed.exit_code == 1
    assert message in failed.output
    assert "Traceback" not in failed.output
    assert not (tmp_path / "runs").exists()


def test_missing_package_is_one_sentence(
    command: Command, small_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    failed = command(*small_run)
    assert failed.exit_code == 1
    assert "distill: the package transformers must be installed, got none; run" in failed.output


class Crash(BaseException):
    """Stands for a kill: no handler of the run may catch it."""


@pytest.mark.parametrize("last", [1, 2, 3, 5, 6, 9, 14])
def test_stopped_at_any_rename_resumes_to_the_same_numbers(
    command: Command,
    small_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: Path,
    last: int,
) -> None:
    """The process vanishes at the n-th time that something is put into place."""
    count = 0
    for name in ("replace", "rename"):
        original = getattr(os, name)

        def stop(*arguments: Any, original: Callable[..., None] = original) -> None:
            nonlocal count
            count += 1
            if count > last:
                raise Crash
            original(*arguments)

        monkeypatch.setattr(os, name, stop)
    stopped = tmp_path / "runs" / "stopped"
    arguments = [*small_run[:-1], "stopped"]
    with pytest.raises(Crash):
        command(*arguments)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    done = command("--resume", *arguments)
    assert done.exit_code == 0, done.output
    assert results(stopped) == results(finished)
    check_log(stopped)
    assert not list(stopped.rglob(".tmp-*"))


def test_killed_run_resumes(finished: Path, small_run: list[str], tmp_path: Path) -> None:
    """A real SIGKILL, in the middle of a student's training."""
    killed, options = tmp_path / "runs" / "killed", [*small_run[:-1], "killed"]
    kill_behind(options, tmp_path, killed / "state" / "labels-seed0.json")
    assert not (killed / "report.md").exists()
    state = killed / "state" / "labels-seed0.json"
    before = state.stat().st_mtime_ns
    resume(options, tmp_path)
    assert state.stat().st_mtime_ns == before, "a complete unit is not done again"
    assert results(killed) == results(finished)
    check_log(killed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_a_random_step_resumes_to_the_same_weights(
    finished: Path, small_run: list[str], command: Command, tmp_path: Path, seed: int
) -> None:
    """A real SIGKILL at any of the steps of any training, drawn from the seed."""
    steps = sum(result.get("steps", 0) for result in results(finished).values())
    last = random.Random(seed).randint(1, steps)
    options = [*small_run[:-1], "killed"]
    kill_at_step(options, tmp_path, last)
    killed = tmp_path / "runs" / "killed"
    assert not (killed / "report.md").exists()
    done = command("--resume", *options)
    assert done.exit_code == 0, done.output
    assert results(killed) == results(finished), f"killed at step {last} of {steps}"
    assert same_student(killed, finished)
    check_log(killed)


def test_an_interruption_says_how_to_go_on(
    command: Command, small_run: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "my runs"
    options = [*small_run, "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "load_corpus", interrupt)
        early = command(*options)
    assert early.exit_code == 130 and not out.exists()
    assert early.output == "distill: stopped; there is nothing to resume yet\n"
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", interrupt)
        stopped = command(*options)
    assert stopped.exit_code == 130
    hint = f"distill: stopped; resume with: kdkernels distill --resume --name small --out '{out}'\n"
    assert stopped.output.endswith(hint)
    done = command("--resume", "--name", "small", "--out", str(out))
    assert done.exit_code == 0, done.output


def test_disk_full_is_one_sentence_and_resumable(
    command: Command, small_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_folder", full)
        failed = command(*small_run)
    assert failed.exit_code == 1
    assert "distill: the disk must have room for the run, got no space left" in failed.output
    assert command("--resume", *small_run).exit_code == 0


def test_teacher_used_as_it_is(
    command: Command, small_run: list[str], finished: Path, tmp_path: Path
) -> None:
    fine_tuned = finished / "teacher"
    options = [*small_run[:-1], "second", "--teacher", str(fine_tuned), "--teacher-epochs", "0"]
    done = command(*options, "--alpha", "0.5", "--seeds", "0")
    assert done.exit_code == 0, done.output
    second = tmp_path / "runs" / "second"
    scores = [
        json.loads((folder / "state" / "teacher.json").read_text())["test_accuracy"]
        for folder in (fine_tuned.parent, second)
    ]
    assert scores[0] == scores[1]
    assert not (second / "teacher").exists()


def test_teacher_used_as_it_is_keeps_its_label_order(
    command: Command, small_run: list[str], finished: Path, tmp_path: Path
) -> None:
    turned = shutil.copytree(finished / "teacher", tmp_path / "turned")
    weights = load_file(turned / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, turned / "model.safetensors", {"format": "pt"})
    config = json.loads((turned / "config.json").read_text())
    config |= {"id2label": {"0": "pos", "1": "neg"}, "label2id": {"pos": 0, "neg": 1}}
    (turned / "config.json").write_text(json.dumps(config))
    options = [*small_run, "--teacher", turned, "--teacher-epochs", "0", "--seeds", "0"]
    done = command(*options)
    assert done.exit_code == 0, done.output
    scores = [
        json.loads((folder / "state" / "teacher.json").read_text())["test_accuracy"]
        for folder in (finished, tmp_path / "runs" / "small")
    ]
    assert scores[0] == scores[1] > 80


def test_untrained_teacher_cannot_be_used_as_it_is(command: Command, small_run: list[str]) -> None:
    failed = command(*small_run, "--teacher-epochs", "0")
    assert failed.exit_code == 1
    assert "distill: teacher must be a saved sequence classifier if teacher" in failed.output


def test_without_unlabelled_texts_the_training_texts_transfer(
    command: Command, small_run: list[str], reviews: Path, tmp_path: Path
) -> None:
    lines = reviews.read_text().splitlines(keepends=True)
    labelled = tmp_path / "labelled.csv"
    labelled.write_text("".join(line for line in lines if not line.rstrip().endswith(",")))
    done = command(*small_run, "--data", labelled, "--seeds", "0")
    assert done.exit_code == 0, done.output
    state = tmp_path / "runs" / "small" / "state"
    assert json.loads((state / "logits.json").read_text())["texts"] == {
        "transfer": 105,
        "train": 105,
    }


def test_a_student_of_its_own(
    command: Command, small_run: list[str], tiny_teacher: Path, tmp_path: Path
) -> None:
    done = command(*small_run, "--seeds", "0", "--student", tiny_teacher)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "runs" / "small" / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4


@pytest.mark.network
@pytest.mark.slow
def test_demo_quick(command: Command, tmp_path: Path) -> None:
    """The real model and data, tiny: downloads 86 MB and takes about half a minute.

    Run with ``pytest tests/distill -m "network and slow" -k quick``.
    """
    done = command("--quick")
    assert done.exit_code == 0, done.output
    assert "licence: all-MiniLM-L6-v2" in done.output
    assert (tmp_path / "runs" / "demo" / "report.md").exists()


@pytest.mark.network
@pytest.mark.slow
def test_demo_closes_part_of_the_gap(command: Command, tmp_path: Path) -> None:
    """The whole demo, one seed, two to four minutes.

    Run with ``pytest tests/distill -m "network and slow" -k gap``.
    """
    done = command("--seeds", "0", "--no-throughput")
    assert done.exit_code == 0, done.output
    state = tmp_path / "runs" / "demo" / "state"
    score = {
        unit: json.loads((state / f"{unit}.json").read_text())["test_accuracy"]
        for unit in ("teacher", "labels-seed0", "hard-seed0", "distilled-seed0")
    }
    assert score["teacher"] > 79
    assert score["labels-seed0"] > 72
    assert score["distilled-seed0"] - score["labels-seed0"] > 1.0
    assert score["teacher"] > score["distilled-seed0"]
