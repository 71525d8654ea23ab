"""Whole runs of the language-model objective, stopped ones too."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from kdkernels.api.distill.config import from_yaml
from kdkernels.api.distill.lm_config import LmConfig
from kdkernels.api.distill.lm_results import ARMS, START, TEACHER
from kdkernels.api.distill.log import read_log
from kdkernels.api.distill.results import unit_name

Command = Callable[..., Result]
STUDENTS = [unit_name(arm, 0) for arm in ARMS]
UNITS = [TEACHER, START, *STUDENTS]


def results(folder: Path) -> dict[str, Any]:
    """What the units found, without times."""
    found = {}
    for unit in UNITS:
        result = json.loads((folder / "state" / f"{unit}.json").read_text())
        kept = ("test_perplexity", "dev_perplexity", "curve", "tokens", "steps")
        found[unit] = {key: result[key] for key in kept if key in result}
    return found


def check_log(folder: Path) -> None:
    """Every unit occurs once: no line is missing, none is from an abandoned attempt."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["unit"] for line in lines if line["event"] == "test"] == STUDENTS


def test_run_leaves_everything_behind(finished_lm: Path) -> None:
    names = {path.name for path in finished_lm.iterdir()} - {".lock"}
    files = {"config.yaml", "log.jsonl", "curves.png", "report.md"}
    assert names == files | {"state", "student", "teacher-cache"}
    config = from_yaml((finished_lm / "config.yaml").read_text())
    assert isinstance(config, LmConfig) and config.layers == 2
    check_log(finished_lm)
    found = results(finished_lm)
    for unit in STUDENTS:
        assert found[unit]["tokens"] == 2 * 4096
        assert found[unit]["test_perplexity"] < 0.9 * found[START]["test_perplexity"]


def test_log_has_the_parts_of_losses(finished_lm: Path) -> None:
    log = read_log(finished_lm)
    assert list(log) == STUDENTS
    assert log["ce-seed0"].parts.keys() == {"ce"}
    for arm in ("live-seed0", "cached-seed0"):
        ce, kd = (log[arm].parts[name] for name in ("ce", "kd"))
        for (step, loss), (_, hard), (_, soft) in zip(log[arm].loss, ce, kd, strict=True):
            assert step > 0 and loss == pytest.approx(0.5 * hard + 0.5 * soft, rel=1e-5)
        assert log[arm].figure == "perplexity" and log[arm].dev and log[arm].speed


def test_report_is_complete(finished_lm: Path) -> None:
    text = (finished_lm / "report.md").read_text()
    for part in (
        "| student, distilled, live teacher |",
        "| student, distilled, cached top-k |",
        "| live teacher | from hidden states |",
        "| cached top-k | eager, full logits |",
        "objective: lm",
        "top_k: 16",
        "times as fast as eager PyTorch",
        "One seed",
    ):
        assert part in text
    assert "None" not in text.replace("cache: null", "") and "nan" not in text
    assert "CC BY-SA" not in text, "own data carry no licence of what was not downloaded"
    assert (finished_lm / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_student_reloads_with_plain_transformers(finished_lm: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished_lm / "student")
    assert model.config.num_hidden_layers == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(finished_lm / "student")("good film")["input_ids"]


class Crash(BaseException):
    """Stands for a kill: no handler of the run may catch it."""


@pytest.mark.parametrize("last", [1, 5, 8, 11])
def test_stopped_at_any_rename_resumes_to_the_same_numbers(
    command: Command,
    small_lm_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished_lm: Path,
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
    arguments = [*small_lm_run[:-1], "stopped"]
    with pytest.raises(Crash):
        command(*arguments)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    done = command("--resume", *arguments)
    assert done.exit_code == 0, done.output
    stopped = tmp_path / "runs" / "stopped"
    assert results(stopped) == results(finished_lm)
    check_log(stopped)
    assert not list(stopped.rglob(".tmp-*"))


def test_a_cache_of_its_own_and_the_other_route(
    command: Command, small_lm_run: list[str], tmp_path: Path, finished_lm: Path
) -> None:
    """A cache from elsewhere is used; losses from full logits are the same within rounding."""
    kept = shutil.copytree(finished_lm / "teacher-cache", tmp_path / "kept")
    done = command(*small_lm_run, "--cache", kept, "--route", "logits")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "small"
    assert not (folder / "teacher-cache").exists()
    assert json.loads((folder / "state" / "cache.json").read_text())["blocks"] == 0
    found, expected = results(folder), results(finished_lm)
    for unit in STUDENTS:
        assert found[unit]["test_perplexity"] == pytest.approx(
            expected[unit]["test_perplexity"], rel=1e-3
        )


def test_a_cache_of_something_else(
    command: Command, small_lm_run: list[str], tmp_path: Path, finished_lm: Path
) -> None:
    kept = finished_lm / "teacher-cache"
    failed = command(*small_lm_run, "--cache", kept, "--temperature", "2")
    assert failed.exit_code == 1
    assert "distill: cache must be one of this run's teacher, got TeacherCache: temp" in " ".join(
        failed.output.split()
    )
    assert not (tmp_path / "runs").exists()


def test_resume_names_the_differing_key(
    command: Command, finished_lm: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_lm, tmp_path / "runs" / "small")
    for options, message in (
        (["--top-k", "8"], "distill: top-k must be 16, as the run began, to resume it, got 8"),
        (["--objective", "classification"], "distill: objective must be lm, as the run began"),
    ):
        again = command("--resume", "--name", "small", *options)
        assert again.exit_code == 1
        assert message in again.output


def test_resume_notices_another_text(
    command: Command, finished_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished_lm, tmp_path / "runs" / "small")
    changed = tmp_path / "changed.txt"
    changed.write_text(tiny_text.read_text().replace("film", "movie"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_text), str(changed)))
    again = command("--resume", "--name", "small")
    assert again.exit_code == 1
    assert "distill: data must be what the run began with" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "7"], "distill: layers must lie in 1..6 for this teacher, got 7"),
        (["--seq-len", "65"], "distill: seq-len must be at most 64 for this teacher, got 65"),
        (["--top-k", "999"], "distill: top-k must be at most"),
        (["--route", "x"], "distill: route must be one of ('hidden', 'logits'), got x"),
        (["--full"], "distill: full must be left out with --quick, got both"),
        (["--labels", "5"], "distill: labels must be left out with --objective lm, got 5"),
        (["--model", "x"], "distill: model must be smollm2-135m or an existing folder, got x"),
        (["--data", "x"], "distill: data must be wikitext-2 or an existing file, got x"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    command: Command, small_lm_run: list[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    failed = command(*small_lm_run, *arguments)
    assert failed.exit_code == 1
    assert message in failed.output
    assert "Traceback" not in failed.output
    assert not (tmp_path / "runs").exists()


def test_unknown_objective(command: Command) -> None:
    failed = command("--objective", "x")
    assert failed.exit_code == 1
    assert "distill: objective must be one of ('classification', 'lm'), got 'x'" in failed.output


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_quick(command: Command, tmp_path: Path) -> None:
    """The real model and text, tiny: downloads 178 MB and takes a minute or two.

    Run with ``pytest tests/distill -m "network and slow" -k smollm2``.
    """
    done = command("--objective", "lm", "--quick")
    assert done.exit_code == 0, done.output
    assert "licence: SmolLM2" in done.output and "licence: WikiText-2" in done.output
    found = results(tmp_path / "runs" / "lm")
    for unit in STUDENTS:
        assert found[unit]["test_perplexity"] < found[START]["test_perplexity"]
    assert found[TEACHER]["test_perplexity"] < 150
