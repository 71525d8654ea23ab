"""Compiles every Triton kernel ahead of time, with no GPU.

``python -m kdkernels.bench.compiled_triton 90`` prints what it found for sm_90 as JSON.
The launchers themselves run, against a driver that compiles for the wanted target and launches
nothing: what is compiled is exactly what a GPU would get. In a process of its own, because the
driver replaces Triton's, and because Triton must not be interpreted here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kdkernels.bench import cases
from kdkernels.bench.machine_code import Kernel, Loop, kernels

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Compiled:
    """A kernel and the call that it was compiled for."""

    op: str
    call: str
    kernel: Kernel
    wide: bool  # see TritonCall
    fusion: bool  # whether products may be fused into sums


def compile_all(architectures: Sequence[int] = ARCHITECTURES) -> list[Compiled]:
    """What the launchers of every op compile, for each architecture (two at a time)."""

    def run(architecture: int) -> list[Compiled]:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TRITON_CACHE_DIR": folder}
            environment.pop("TRITON_INTERPRET", None)
            command = [sys.executable, "-m", __name__, str(architecture)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(
                f"compiled: sm_{architecture} must compile, got {done.stderr[-2000:]}"
            )
        return [_from_json(entry) for entry in json.loads(done.stdout)]

    with ThreadPoolExecutor(2) as pool:
        return [entry for part in pool.map(run, architectures) for entry in part]


def _from_json(entry: dict[str, Any]) -> Compiled:
    loops = tuple(Loop(**loop) for loop in entry["kernel"].pop("loops"))
    kernel = Kernel(loops=loops, **entry.pop("kernel"))
    return Compiled(kernel=kernel, **entry)


class CompilingDriver:
    """Stands in for a GPU: Triton compiles for it and launches nothing."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture
        self._fusion = False
        self.found: list[tuple[Kernel, bool]] = []
        self.utils = SimpleNamespace(
            load_binary=self._load_binary,
            get_device_properties=lambda device: {"max_shared_mem": 160 * 1024},
        )

    def _load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(cubin)
            self.found += [(kernel, self._fusion) for kernel in kernels(path)]
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Called before ``load_binary``."""
        self._fusion = metadata.enable_fp_fusion
        return lambda *args: None

    def get_current_target(self) -> Any:
        """The architecture to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0


def _compile(architecture: int) -> Iterator[Compiled]:
    from triton.runtime import driver

    compiling = CompilingDriver(architecture)
    driver.set_active(compiling)
    for op in cases.names():
        for call in cases.load(op).triton_calls():
            compiling.found = []
            call.launch()
            for kernel, fusion in compiling.found:
                yield Compiled(op, call.name, kernel, call.wide, fusion)


if __name__ == "__main__":
    print(json.dumps([asdict(entry) for entry in _compile(int(sys.argv[1]))]))
