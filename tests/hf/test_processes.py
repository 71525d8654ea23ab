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


def test_two_processes(tmp_path: Path) -> None:
    """Micro-batches of uneven counts give the same on two processes as one after the other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", trained.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = ["parallel", str(tmp_path)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
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
