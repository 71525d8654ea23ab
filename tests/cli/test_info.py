"""``kdkernels info`` tells what is there, and works when most of it is not."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from typer.testing import CliRunner

from kdkernels import ops
from kdkernels.api.cli import app
from kdkernels.api.cli.info import NO_GPU

RUN = "from kdkernels.api.cli import main; sys.argv = ['kdkernels', 'info', *{args}]; main()"


def run_after(preparation: str, *args: str) -> str:
    """Output of the command in a process of its own, where something was broken before."""
    code = f"import sys; {preparation}; {RUN.format(args=list(args))}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_json_holds_versions_machine_and_every_op() -> None:
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == set(ops.__all__)
    for devices in found["backends"].values():
        assert devices["cpu"]["reference"] is None
        if not torch.cuda.is_available():
            assert devices["cuda"]["reference"] == NO_GPU
    assert found["machine"]["cores"] >= 1


def test_tables_name_each_backend_and_reason() -> None:
    result = CliRunner().invoke(app, ["info"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for word in ("torch", "CPU features", "NVIDIA driver", "kd_loss", "reference", "available"):
        assert word in result.stdout


def test_without_triton_and_optional_packages() -> None:
    # An entry of None makes the import system report the package as not there.
    out = run_after("sys.modules['triton'] = None", "--json")
    backends = json.loads(out)["backends"]
    assert backends["kd_loss"]["cpu"]["triton"] == "triton is not installed"
    assert backends["kd_loss"]["cuda"]["triton"] == "triton is not installed"


def test_with_broken_native_libraries() -> None:
    out = run_after(
        "import torch, pathlib; pathlib.Path.exists = lambda path: True; "
        "sys.modules['kdkernels._host'] = None; "
        "torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError('wrong ELF class'))",
        "--json",
    )
    found = json.loads(out)
    assert "wrong ELF class" in found["native"]["libraries"]["cpu"]
    assert "wrong ELF class" in found["backends"]["kd_loss"]["cpu"]["native"]
    assert found["native"]["build"] is None
    assert found["machine"]["cpu_features"] is None


def test_loads_no_heavy_package() -> None:
    out = run_after(
        "import atexit; atexit.register(lambda: print([name for name in "
        "('triton', 'transformers', 'matplotlib') if name in sys.modules]))"
    )
    assert out.splitlines()[-1] == "[]"
