"""Two processes against one, and a teacher that they share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import trained
from helpers.trained import close, distilled, weights

pytestmark = pytest.mark.distributed
HELPERS = Path(trained.__file__).parent


def launch(script: str, *arguments: object, **environment: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(HELPERS / script)]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr


def test_two_processes(tmp_path: Path) -> None:
    """Micro-batches of uneven counts give the same on two processes as one after the other."""
    launch("trained.py", "parallel", tmp_path)
    alone = distilled(tmp_path, hidden_weight=0.3, train_sampling_strategy="sequential")
    alone.train()
    metrics = alone.evaluate(trained.texts(4))
    own = [entry for entry in alone.state.log_history if "loss" in entry]
    for sharded in (False, True):
        found: dict[str, Any] = torch.load(tmp_path / f"{sharded}.pt", weights_only=False)
        close(found["weights"], weights(alone.model))
        logged = [entry for entry in found["logs"] if "loss" in entry]
        for name in ("loss", "kd_loss", "ce_loss", "hidden_loss"):
            expected = [entry[name] for entry in own]
            assert [entry[name] for entry in logged] == pytest.approx(expected, rel=1e-5)
        for name in ("eval_kd_loss", "eval_ce_loss"):
            assert found["metrics"][name] == pytest.approx(metrics[name], rel=1e-5)


def test_teacher_of_zero3(tmp_path: Path) -> None:
    """DeepSpeed is not among the tests' packages: it compiles operators when it first runs."""
    pytest.importorskip("deepspeed")
    path = os.pathsep.join([str(HELPERS.parent), os.environ.get("PYTHONPATH", "")])
    launch("zero3_case.py", tmp_path, DS_ACCELERATOR="cpu", PYTHONPATH=path)
