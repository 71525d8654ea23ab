"""``examples/torchrun_fsdp2.py``: one process, and one that goes on where two have stopped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def losses(processes: int, folder: Path, *options: str) -> list[float]:
    """What the script has printed: of each step, and of the average."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(ROOT / "examples" / "torchrun_fsdp2.py"), "--folder", str(folder), *options]
    # What torchrun tells its processes; it would set these anew.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    environment = {**os.environ, **alone, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return [float(x) for x in re.findall(r"loss (\d+\.\d+)", done.stdout)]


@pytest.mark.distributed
def test_tiny(tmp_path: Path) -> None:
    whole = losses(1, tmp_path / "one", "--tiny", "--steps", "3")
    assert len(whole) == 4
    first = losses(2, tmp_path / "two", "--tiny", "--steps", "2")
    rest = losses(1, tmp_path / "two", "--tiny", "--steps", "3")
    # Printed with six digits after the point; processes sum in another order.
    assert [*first[:2], *rest] == pytest.approx(whole, abs=5e-6)


@pytest.mark.network
def test_smollm2(tmp_path: Path) -> None:
    first = losses(2, tmp_path, "--steps", "2")
    second = losses(2, tmp_path, "--steps", "3")
    assert len(first) == 3 and len(second) == 2 and second[0] < first[0]
