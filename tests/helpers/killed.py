"""Runs of ``kdkernels distill`` in a process of their own that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

PROGRAM = (
    "import typer; from kdkernels.api.cli.distill import distill; "
    "app = typer.Typer(); app.command()(distill); app()"
)


def command(options: Sequence[str]) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-c", PROGRAM, *options]


def kill_behind(options: Sequence[str], cwd: Path, file: Path) -> None:
    """Starts a run and sends it SIGKILL soon after a file of it is there."""
    with subprocess.Popen(command(options), cwd=cwd, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not file.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def resume(options: Sequence[str], cwd: Path) -> None:
    """The same command with ``--resume``, to its end."""
    again = command([*options, "--resume"])
    done = subprocess.run(again, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def same_student(first: Path, second: Path) -> bool:
    """Whether the students of two runs are the same to the bit."""
    weights = [load_file(run / "student" / "model.safetensors") for run in (first, second)]
    return weights[0].keys() == weights[1].keys() and all(
        torch.equal(weight, weights[1][name]) for name, weight in weights[0].items()
    )
