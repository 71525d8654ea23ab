"""Every Triton kernel compiles to machine code for sm_80, sm_90 and sm_100, with no GPU.

The launchers themselves run, against a driver that compiles for the wanted target and launches
nothing: what is compiled is exactly what a GPU would get. It happens in a process of its own (this
file run as a script), because the rest of the suite runs Triton interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdkernels.ops.kd_loss import Divergence, Spec
from kdkernels.ops.kd_loss.op import kd_loss_forward, kd_loss_grad, kd_loss_grad_
from kdkernels.ops.scale_grad import scale_grad_

ARCHITECTURES = (80, 90, 100)
# A multiprocessor has 65536 registers: at 64 each, two programs of 16 warps fit.
TWO_PROGRAMS = 64
# Bytes a thread. ptxas parks one scalar over a whole loop to fit one more program; a spilled block
# of a row, which would be stored and loaded in the loop, takes 16.
PARKED_SCALAR = 8

PLAIN = Spec(ce_weight=0.5, kd_weight=0.5, temperature=2.0)
EVERYTHING = PLAIN._replace(
    temperature=3.0,
    label_smoothing=0.1,
    z_loss=0.01,
    student_softcap=30.0,
    teacher_softcap=30.0,
    classes=30000,
)


def _cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for divergence in Divergence:
        number = int(divergence)
        cases[f"{divergence.name}-float32"] = {"spec": PLAIN._replace(divergence=number)}
        cases[f"{divergence.name}-bfloat16-everything"] = {
            "spec": EVERYTHING._replace(divergence=number),
            "dtype": torch.bfloat16,
            "weighted": True,
        }
    kl = PLAIN._replace(divergence=int(Divergence.FORWARD_KL))
    cases["forward-only"] = {"spec": kl, "op": kd_loss_forward}
    cases["inplace-odd-vocabulary"] = {
        "spec": kl,
        "op": kd_loss_grad_,
        "dtype": torch.float16,
        "columns": 50257,
    }
    cases["three-classes"] = {"spec": kl, "columns": 3}
    cases["one-class"] = {"spec": kl, "columns": 1}
    cases["no-labels"] = {"spec": kl._replace(ce_weight=0.0), "labels": False}
    cases["mixed-dtypes"] = {"spec": kl, "teacher_dtype": torch.bfloat16}
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def compiled() -> dict[int, dict[str, list[dict[str, Any]]]]:
    """Architecture -> case -> kernels with their resources."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")

    def run(architecture: int) -> dict[str, list[dict[str, Any]]]:
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TRITON_CACHE_DIR": cache}
            environment.pop("TRITON_INTERPRET", None)
            command = [sys.executable, __file__, str(architecture)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
        return result

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(run, ARCHITECTURES), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", [*CASES, "scale_grad"])
def test_compiles_without_spills(
    compiled: dict[int, dict[str, list[dict[str, Any]]]], case: str, architecture: int
) -> None:
    kernels = compiled[architecture][case]
    assert kernels
    for kernel in kernels:
        assert kernel["stack"] <= PARKED_SCALAR, kernel
        if kernel["name"] == "kd_loss_kernel":
            # A fused multiply-add would leave a gradient where student and teacher agree.
            assert not kernel["fusion"]
            if case.endswith("float32") and architecture == 90:
                assert kernel["registers"] <= TWO_PROGRAMS, kernel


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


class _CompilingDriver:
    """Stands in for a GPU: Triton compiles for it, reads resources, and launches nothing."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture
        self.kernels: list[dict[str, Any]] = []
        self.utils = SimpleNamespace(
            load_binary=self._load_binary,
            get_device_properties=lambda device: {"max_shared_mem": 160 * 1024},
        )

    def _load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        self.kernels[-1].update(name=name, **_resources(cubin))
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.kernels.append({"fusion": metadata.enable_fp_fusion})
        return lambda *args: None

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _launch(case: dict[str, Any]) -> None:
    spec: Spec = case["spec"]
    dtype, columns = case.get("dtype", torch.float32), case.get("columns", 32000)
    student = torch.empty(2, columns, dtype=dtype)
    teacher = torch.empty(2, columns, dtype=case.get("teacher_dtype", dtype))
    case.get("op", kd_loss_grad)(
        "triton",
        student,
        teacher if spec.needs_teacher else None,
        torch.zeros(2, dtype=torch.int64) if case.get("labels", True) else None,
        torch.ones(2) if case.get("weighted") else None,
        torch.ones(()) if case.get("weighted") else None,
        spec,
    )


def _compile_all(architecture: int) -> dict[str, list[dict[str, Any]]]:
    from triton.runtime import driver

    compiling = _CompilingDriver(architecture)
    driver.set_active(compiling)  # type: ignore[arg-type]
    result = {}
    for name, case in CASES.items():
        compiling.kernels = []
        _launch(case)
        result[name] = compiling.kernels
    compiling.kernels = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scale_grad_("triton", torch.empty(3, 50257, dtype=dtype), torch.ones(()))
    result["scale_grad"] = compiling.kernels
    return result


if __name__ == "__main__":
    print(json.dumps(_compile_all(int(sys.argv[1]))))
