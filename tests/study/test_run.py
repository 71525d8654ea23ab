"""Whole studies, and studies that are killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.studied import PROGRAM, results

from kdkernels.api.study.config import make_config
from kdkernels.api.study.store import Store
from kdkernels.api.study.worker import keyed

Command = Callable[..., Result]


def test_leaves_everything_behind(finished: tuple[Path, Result], values: dict[str, Any]) -> None:
    folder, done = finished
    names = {path.name for path in folder.iterdir()} - {".store.lock"}
    files = {"config.yaml", "study.db", "trials.jsonl", "report.md", "report.html"}
    assert names == files | {"intervals.svg", "costs.svg", "teachers", "workers"}
    found = results(folder)
    assert len(found) == 20
    for (task, student, _, arm, *_), result in found.items():
        assert (task, student) == ("reviews", "tiny")
        assert result["steps"] == 54 and result["examples"] == 840
        assert (result["teacher"] is None) == (arm in ("ft", "ls"))
    # One line a trial, and the verdict.
    assert len(re.findall(r"seed=\d +dev +[\d.]+ +test +[\d.]+ ", done.output)) == 20
    assert "Students trained from scratch: of 3 comparisons" in done.output.replace("\n", " ")


def test_teachers_are_computed_once(finished: tuple[Path, Result]) -> None:
    """One teacher, and each baseline serves as the teacher of its own student."""
    folder, _ = finished
    kept = [path.name.partition("-")[0] for path in (folder / "teachers").glob("*.safetensors")]
    assert sorted(kept) == ["self"] * 4 + ["teacher"]
    found = results(folder)
    for key, result in found.items():
        if key[3] == "self_kd":
            plain = next(r for k, r in found.items() if k[:3] + k[5:6] == key[:3] + key[5:6]
                         and k[3] == "ft")  # fmt: skip
            assert result["teacher"]["figures"] == plain["figures"]
        if key[3] == "kd":
            assert result["teacher"]["examples"] == 140


def test_a_finished_study_is_not_done_again(
    finished: tuple[Path, Result], tmp_path: Path, command: Command, write_study: Any
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "out")
    config = folder / "config.yaml"
    again = command(config, "--out", folder, "--workers", 1)
    assert again.exit_code == 0, again.output
    assert (
        "20 of 20 trials are done" in again.output
        and "test " not in again.output.partition("reviews,")[0]
    )
    # It grows by a seed, and by an arm's new name nothing is done again.
    more = write_study(tmp_path, seeds=[0, 1, 2], initialisations=["pretrained"])
    grown = command(more, "--out", folder, "--workers", 1, "--threads", 1)
    assert "10 of 15 trials are done" in grown.output
    assert len(re.findall(r"seed=2 +dev", grown.output)) == 5
    assert (
        "pretrained: of 3 comparisons with plain fine-tuning (3 seeds each)"
        in (folder / "report.md").read_text()
    )


def test_report_again_from_the_store_and_from_the_export(
    finished: tuple[Path, Result], tmp_path: Path, command: Command
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "out")
    report = (folder / "report.md").read_text()
    for removed in ("report.md", "study.db"):
        (folder / removed).unlink()
        again = command("report", folder)
        assert again.exit_code == 0, again.output
        assert (folder / "report.md").read_text() == report
    # Neither the texts nor the models need be there.
    config = folder / "config.yaml"
    config.write_text(re.sub(r"data: .*", "data: gone.csv", config.read_text()))
    assert command("report", folder).exit_code == 0


def test_killed_study_ends_with_the_same_table(
    finished: tuple[Path, Result], write_study: Any, tmp_path: Path
) -> None:
    """SIGKILL of the command and both of its workers, in the middle, and then of one worker."""
    folder, config = tmp_path / "killed", write_study(tmp_path)
    options = ["--out", str(folder), "--workers", "2", "--threads", "1"]
    arguments = [sys.executable, "-c", PROGRAM, str(config), *options]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        wait_for(folder, 4, process)
        os.killpg(process.pid, signal.SIGKILL)
    running = {trial.state.name for trial in Store(None, "small", folder)._trials()}
    assert "RUNNING" in running  # a trial was under way
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        wait_for(folder, 9, process)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode == 0, output
    assert "trials of workers that died are tried again" in output
    assert "a worker died (exit code -9)" in output
    assert results(folder) == results(finished[0])
    tables = [findings((out / "report.md").read_text()) for out in (folder, finished[0])]
    assert tables[0] == tables[1] and len(tables[0]) == 10


def findings(report: str) -> list[str]:
    """The lines of a report's tables of tests."""
    found = re.compile(r"\| (better|worse|equivalent|not enough evidence) \|$")
    return [line for line in report.splitlines() if found.search(line)]


def wait_for(folder: Path, done: int, process: subprocess.Popen[Any]) -> None:
    """Until so many trials are complete."""
    deadline = time.monotonic() + 240
    while not (folder / "study.db").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    store = None
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
        store = store or Store(None, "small", folder)
        states = [trial.state.name for trial in store._trials()]
        if states.count("COMPLETE") >= done and "RUNNING" in states:
            return


def children(parent: int) -> list[int]:
    """Processes that run trials for the command (spawn starts a tracker of resources as well)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, line = (folder / "status").read_text(), (folder / "cmdline").read_text()
        except OSError:  # it ended meanwhile
            continue
        if f"PPid:\t{parent}\n" in status and "spawn_main" in line:
            found.append(int(folder.name))
    return found


def test_stopping_gives_the_trial_back(
    write_study: Any, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdkernels.api.study import train

    def stop(self: object, trial: object, on_event: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "run", stop)
    config, folder = write_study(tmp_path), tmp_path / "out"
    stopped = command(config, "--out", folder, "--workers", 1)
    assert stopped.exit_code == 130
    assert "study: stopped; the same command continues" in stopped.output
    keys = keyed(make_config(json.loads(json.dumps(_values(config)))))
    store = Store(None, "small", folder)
    assert store.errors(keys) == {} and store.results(keys) == {}
    assert store.recover(keys) == 0 and store.unfinished(keys) == 20


def test_a_trial_that_fails_is_named(write_study: Any, tmp_path: Path, command: Command) -> None:
    methods = ["ft", "ls"]
    students = {"tiny": {**_values(write_study(tmp_path))["students"]["tiny"]}}
    students["wrong"] = {**students["tiny"], "layers": [0, 7]}
    config = write_study(tmp_path, methods=methods, students=students, seeds=[0], epochs=1,
                         initialisations=["pretrained"])  # fmt: skip
    done = command(config, "--out", tmp_path / "out", "--workers", 1)
    assert done.exit_code == 0, done.output
    line = "failed: reviews wrong pretrained ft lr=0.005 seed=0: layers must lie in 0..2"
    assert line in done.output
    assert "2 of 4 trials are done." in done.output.replace("\n", " ")


def _values(config: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(config.read_text())
    return found


def test_dry_run_trains_nothing(write_study: Any, tmp_path: Path, command: Command) -> None:
    done = command("--dry-run", write_study(tmp_path), "--out", tmp_path / "out", "--workers", 2)
    assert done.exit_code == 0, done.output
    assert "reviews tiny scratch ls label_smoothing=0.2 lr=0.005 seed=1" in done.output
    assert re.search(r"reviews tiny scratch +[\d.]+ ms x 54, in all [\d.]+ s", done.output)
    assert "for 20 trials and 1 teachers" in done.output and "by 2 workers" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.yaml"], "config must be an existing YAML file, got no.yaml"),
        (["report", "nowhere"], "folder must be a study's, with config.yaml, got nowhere"),
    ],
)
def test_bad_input_is_one_line(command: Command, arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.exit_code == 1
    assert f"study: {message}" in done.output and done.output.count("\n") == 1


def test_bad_numbers(command: Command, write_study: Any, tmp_path: Path) -> None:
    config = write_study(tmp_path)
    done = command(config, "--workers", 0, "--out", tmp_path / "out")
    assert "study: workers must be at least 1, got 0" in done.output
    done = command(config, "--storage", "nothing", "--out", tmp_path / "out")
    assert "study: storage must be a database to write to" in done.output


def test_both_spellings(command: Command) -> None:
    assert "--workers" in command("run", "--help").output
    shown = command("--help").output
    assert "report" in shown and "run" in shown


def test_results_do_not_depend_on_what_ran_before(
    finished: tuple[Path, Result], tmp_path: Path, values: dict[str, Any]
) -> None:
    from kdkernels.api.distill.train import Runtime
    from kdkernels.api.study.train import Trainer

    torch.set_num_threads(1)
    trials = keyed(make_config(values)).values()
    last = next(t for t in trials if (t.initialisation, t.arm, t.seed) == ("scratch", "kd", 1))
    runtime = Runtime(torch.device("cpu"), bf16=False)
    alone = Trainer(tmp_path, runtime, False, print).run(last, lambda event: None)
    among = next(r for k, r in results(finished[0]).items() if k[2:6:3] == ("scratch", 1)
                 and k[3] == "kd")  # fmt: skip
    assert alone["figures"] == among["figures"] and alone["loss"] == among["loss"]
