"""``kdkernels verify`` passes what is right, fails what is wrong, and errs in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.planted import plant
from typer.testing import CliRunner

from kdkernels import _backend, available_backends, ops
from kdkernels.api.cli import app
from kdkernels.bench import cases

PLANTED = "planted_for_verify"
OPS = ", ".join(ops.__all__)


plant(PLANTED, lambda grad: grad * 1.001)


@pytest.mark.parametrize("op", cases.names())
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_runs_here_is_right(op: str, backend: str) -> None:
    if backend not in available_backends(op):
        pytest.skip(f"{backend} is not available here")
    result = CliRunner().invoke(app, ["verify", "--op", op, "--backend", backend])
    assert result.exit_code == 0, result.stdout
    assert "ok" in result.stdout and "FAILED" not in result.stdout


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_extra", (PLANTED,))
    result = CliRunner().invoke(
        app, ["verify", "--op", "kd_loss", "--device", "cpu", "--backend", PLANTED]
    )
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "forward_kl float32: gradient errs by" in " ".join(result.stdout.split())


def test_a_kernel_that_raises_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_extra", ("absent",))
    result = CliRunner().invoke(app, ["verify", "--op", "scale_grad", "--backend", "absent"])
    assert result.exit_code == 1
    assert "raised KeyError" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--backend", "cublas"], "backend must be one of native, triton, reference"),
        (["verify", "--op", "softmax"], f"op must be one of {OPS}, got 'softmax'"),
        (["verify", "--device", "tpu"], "verify: device must be one of cpu"),
        (["bench", "--device", "tpu"], "bench: device must be one of cpu"),
        (["bench", "--shape", "12"], "bench: shape must be ROWSxVOCAB, got '12'"),
        (["bench", "--mode", "sideways"], "bench: mode must be one of forward, backward, full"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "kdkernels", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
