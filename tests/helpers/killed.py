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

# The same, dying in the middle of a training: before the optimizer's n-th step of the process.
DYING = """
import os, signal, torch
step, count = torch.optim.AdamW.step, 0
def counted(*arguments, **named):
    global count
    count += 1
    if count == {last}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments, **named)
torch.optim.AdamW.step = counted
"""


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


def kill_at_step(options: Sequence[str], cwd: Path, last: int) -> None:
    """Starts a run that gets SIGKILL at its n-th training step, whichever training that is in."""
    program = DYING.format(last=last) + PROGRAM
    done = subprocess.run([sys.executable, "-c", program, *options], cwd=cwd, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


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
