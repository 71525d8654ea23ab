"""What nvcc made of the CUDA kernels, read from the library: no spills, wide memory accesses."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from kdkernels import _native

LIBRARY = Path(_native.__file__).parent / "_native_cuda.so"


def _tool() -> str | None:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


TOOL = _tool()
pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library was not built (no nvcc)"),
    pytest.mark.skipif(TOOL is None, reason="triton, which carries cuobjdump, is not installed"),
]


@cache
def dump(*options: str) -> str:
    assert TOOL is not None
    command = [TOOL, *options, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def sass() -> dict[str, str]:
    """Disassembly of each kernel for sm_90a."""
    parts = re.split(r"Function : (\S+)", dump("-sass", "-arch", "sm_90a"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def row_kernels() -> list[str]:
    return [name for name in sass() if "kd_loss_rows" in name]


def test_no_kernel_uses_the_stack() -> None:
    """Spilled registers live there; this covers every architecture in the library."""
    used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
                      dump("--dump-resource-usage"))  # fmt: skip
    assert len(used) > 50
    assert [entry for entry in used if (entry[2], entry[3]) != ("0", "0")] == []
    # 65536 registers an SM: at 80 a thread, two blocks of 384 threads fit.
    assert max(int(entry[1]) for entry in used) <= 80


def test_every_dtype_and_divergence_is_there() -> None:
    # 3 dtypes x 8 divergences x (on chip, looped)
    assert len(row_kernels()) == 48


def test_rows_are_read_and_written_by_16_bytes() -> None:
    for name in row_kernels():
        text = sass()[name]
        assert re.search(r"LDG\.E\S*\.128|LDGSTS\S*\.128", text), name
        assert re.search(r"STG\.E\S*\.128", text), name
        assert not re.search(r"\b(LDL|STL)\b", text), name


def test_on_chip_rows_are_copied_asynchronously() -> None:
    on_chip = [name for name in row_kernels() if "LDGSTS" in sass()[name]]
    assert len(on_chip) == 24
    for name in on_chip:
        assert re.search(r"LDGSTS\.E\.BYPASS\S*\.128", sass()[name]), name
