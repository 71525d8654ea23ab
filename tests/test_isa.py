"""The CPU kernels of the lower instruction sets: the op tests again, in a process that has them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdkernels import _native

ROOT = Path(__file__).parents[1]
CHOSEN = "native and not compile and not opcheck"


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_op_tests_pass(isa: str) -> None:
    host = _native.host()
    if host is None or _native.reason("cpu"):
        pytest.skip(f"no compiled kernels here: {_native.reason('cpu')}")
    if isa == "avx2" and not host.cpu_features().get("avx2"):
        pytest.skip("this processor has no AVX2")
    # One thread: processes that test side by side would wait for each other's.
    environment = {**os.environ, "KDKERNELS_ISA": isa, "OMP_NUM_THREADS": "1"}
    used = "from kdkernels import _native; print(_native.host().cpu_features()['used'])"
    shown = subprocess.run(
        [sys.executable, "-c", used], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == isa
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/ops", "-m", "not slow", "-k", CHOSEN],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
