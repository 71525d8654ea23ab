"""How commands fail, are interrupted and are completed by a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdkernels import ops
from kdkernels._backend import BACKENDS
from kdkernels.api.cli import app, complete, runs
from kdkernels.api.distill import (
    config,
    diito_config,
    metakd_config,
    stark_config,
    swa_config,
)
from kdkernels.api.methods.alignment import NAMES

# A command that fails in its own way, and what becomes of it.
PLANT = """
import sys, kdkernels.api.cli as cli
from kdkernels.api.cli import runs
def planted(): {body}
cli.app.command('planted')(planted)
sys.argv = ['kdkernels', *{arguments}, 'planted']
cli.main()
"""


def run_planted(body: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = PLANT.format(body=body, arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_an_unexpected_failure_is_one_line_with_its_type() -> None:
    done = run_planted("{}['depth']")
    assert done.returncode == 1
    assert done.stderr == "kdkernels: KeyError: 'depth' (kdkernels --debug ... shows where)\n"


def test_a_broken_contract_is_its_own_sentence() -> None:
    done = run_planted("raise ValueError('op: x must be positive, got -1\\nmore')")
    assert (done.returncode, done.stderr) == (1, "kdkernels: op: x must be positive, got -1\n")


@pytest.mark.parametrize(
    ("arguments", "environment"), [(["--debug"], {}), ([], {"KDKERNELS_DEBUG": "1"})]
)
def test_debug_shows_where(arguments: list[str], environment: dict[str, str]) -> None:
    done = run_planted("{}['depth']", *arguments, **environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "in planted" in done.stderr


def test_debug_shows_where_a_sentence_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.Debugging, "on", False)
    arguments = ["distill", "--config", "nowhere.yaml"]
    plain = CliRunner().invoke(app, arguments)
    assert plain.exit_code == 1 and isinstance(plain.exception, SystemExit)
    traced = CliRunner().invoke(app, ["--debug", *arguments])
    assert "config must be an existing file" in plain.output
    assert type(traced.exception).__name__ == "DistillError"


def test_an_interruption_is_130() -> None:
    """A real SIGINT, into a command that has nothing to resume."""
    # A process of a job in the background of a shell ignores the signal.
    heeded = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    done = run_planted(f"{heeded}; signal.raise_signal(signal.SIGINT)")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def complete_words(*words: str) -> list[str]:
    """What bash is offered for the last of the words."""
    environment = {
        **os.environ,
        "_KDKERNELS_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["kdkernels", *words]),
        "COMP_CWORD": str(len(words)),
    }
    # The entry point's own program, which says what it has loaded when it ends.
    program = (
        "import atexit, sys; atexit.register(lambda: print([m for m in ('torch', 'transformers', "
        "'numpy', 'matplotlib', 'yaml') if m in sys.modules], file=sys.stderr)); "
        "from kdkernels.api.cli import main; sys.argv = ['kdkernels']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stderr == "[]\n", "a completion loads nothing heavy"
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["pl"], ["plot"]),
        (["distill", "--task", "s"], ["sentiment", "sst-2", "sts-b"]),
        (["distill", "--recipe", "pkd,mi"], ["pkd,minilm"]),
        (["bench", "--op", "linear_kd"], ["linear_kd_loss"]),
        (["cache", "v"], ["verify"]),
    ],
)
def test_completion_loads_no_torch(words: list[str], found: list[str]) -> None:
    assert complete_words(*words) == found


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output


def test_completed_names_are_the_real_ones() -> None:
    assert complete.ops() == tuple(sorted(ops.__all__))
    methods = (swa_config, diito_config, stark_config, metakd_config)
    assert set(complete.TASKS) == {name for method in methods for name in method.TASKS}
    arms = {name for method in methods for name in method.ARMS} | {*metakd_config.ABLATIONS}
    assert set(complete.ARMS) == arms
    assert set(complete.ALIGNMENTS) == set(NAMES)
    assert complete.RECIPES == config.RECIPES
    assert complete.PRECISIONS == config.PRECISIONS
    assert complete.DEVICES == config.DEVICES
    assert set(complete.BACKENDS) == set(BACKENDS)


def test_runs_are_completed_by_their_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("demo", "lm"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "log.jsonl").touch()
    (tmp_path / "runs" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert complete.run_folders("") == ["runs/demo", "runs/lm"]
    assert complete.run_folders("runs/d") == ["runs/demo"]
