"""Environments that lack something: the import works, losses run, ``kdkernels info`` explains."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

USE = """
import kdkernels
s = torch.randn(3, 7, requires_grad=True)
kdkernels.kd_loss(s, torch.randn(3, 7), torch.tensor([0, 1, 2]), alpha=0.5).backward()
assert s.grad.abs().sum() > 0
from kdkernels.api.cli import main
sys.argv = ["kdkernels", "info", "--json"]
main()
"""
# What is broken before kdkernels is imported, and what info says of which backend.
BROKEN = {
    "no triton": ("sys.modules['triton'] = None", "triton", "triton is not installed"),
    "no compiler at install time": (
        "import pathlib; real = pathlib.Path.exists; pathlib.Path.exists = lambda path: "
        "not path.name.startswith('_native') and real(path)",
        "native",
        "was not built (KDKERNELS_NATIVE=off, or no compiler at install time)",
    ),
    "corrupt native library": (
        "import pathlib; pathlib.Path.exists = lambda path: True; "
        "torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError('wrong ELF class'))",
        "native",
        "could not be loaded: wrong ELF class",
    ),
    "torch too old": (
        "import pathlib; pathlib.Path.exists = lambda path: True; "
        "torch.__version__ = torch.torch_version.TorchVersion('2.10.1+cpu')",
        "native",
        "needs torch 2.11 or newer, this is 2.10.1+cpu",
    ),
}


def info_after(preparation: str, **environment: str) -> dict[str, object]:
    """What ``kdkernels info --json`` says in a process of its own where a loss has run."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, torch\n{preparation}\n{USE}"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_missing_is_explained(case: str) -> None:
    preparation, backend, reason = BROKEN[case]
    backends = info_after(preparation)["backends"]
    assert reason in backends["kd_loss"]["cpu"][backend]  # type: ignore[index]
    assert backends["kd_loss"]["cpu"]["reference"] is None  # type: ignore[index]


def test_neither_gpu_nor_nvcc_nor_driver() -> None:
    found = info_after("", PATH="/nowhere", CUDA_VISIBLE_DEVICES="")
    assert found["machine"]["gpus"] == [] and found["machine"]["driver"] is None  # type: ignore[index]
    reasons = found["backends"]["kd_loss"]["cuda"]  # type: ignore[index]
    assert all(reasons.values())
