"""Reads machine code of NVIDIA GPUs: resources and memory accesses of each kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Bits an access moves, by the suffix of its instruction; without one it is 32.
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)\b")
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
LOADS, STORES = ("LDG", "LDGSTS"), ("STG",)


@dataclass(frozen=True)
class Loop:
    """A loop without another inside, and its accesses to global memory."""

    widest_load: int  # bits; 0: it loads nothing
    widest_store: int


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    name: str
    architecture: str  # e.g. sm_90a
    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers and local arrays
    local: int  # bytes a thread, outside of the stack
    shared: int  # bytes a block, static
    widest_load: int  # bits, of global memory
    widest_store: int
    local_accesses: int  # instructions that load or store local memory
    loops: tuple[Loop, ...]


@cache
def cuobjdump() -> str:
    """NVIDIA's disassembler: of the CUDA toolkit, or the one that Triton carries.

    Raises:
        FileNotFoundError: neither is installed.
    """
    if found := shutil.which("cuobjdump"):
        return found
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    raise FileNotFoundError(
        "compiled: cuobjdump must be installed, with the CUDA toolkit or triton"
    )


def kernels(path: Path) -> list[Kernel]:
    """Every kernel of a library or cubin, for every architecture it holds."""
    resources = _resources(_dump("--dump-resource-usage", path))
    return [
        Kernel(
            name=_demangled(name),
            architecture=architecture,
            **(resources.get((architecture, name)) or resources["", name]),
            **_accesses(code),
        )
        for architecture, name, code in _functions(_dump("-sass", path))
    ]


def _dump(option: str, path: Path) -> str:
    command = [cuobjdump(), option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    """By architecture and name; a cubin does not name its architecture here."""
    found = {}
    pattern = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    for architecture, part in _parts(r"\barch = (sm_\w+)", text):
        for name, *numbers in pattern.findall(part):
            keys = ("registers", "stack", "shared", "local")
            found[architecture, name] = dict(zip(keys, map(int, numbers), strict=True))
    return found


def _functions(text: str) -> list[tuple[str, str, str]]:
    """Architecture, name and disassembly."""
    return [
        (architecture, name, code)
        for architecture, part in _parts(r"\bcode for (sm_\w+)", text)
        for name, code in _parts(r"Function : (\S+)", part)
        if name
    ]


def _parts(title: str, text: str) -> list[tuple[str, str]]:
    """The text between titles, each with its title; what precedes the first has none."""
    first, *pieces = re.split(title, text)
    return [("", first), *zip(pieces[::2], pieces[1::2], strict=True)]


def _width(instruction: str) -> int:
    found = _WIDTH.search(instruction)
    return _BITS[found[1]] if found else 32


def _accesses(code: str) -> dict[str, Any]:
    lines = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)]
    memory = []  # address, operation, width
    branches = []  # from, to: backwards
    local = 0
    for at, text in lines:
        words = text.split()
        operation = words[1] if words[0].startswith("@") and len(words) > 1 else words[0]
        kind = operation.split(".")[0]
        if kind in LOADS + STORES:
            memory.append((at, kind, _width(operation)))
        elif kind in ("LDL", "STL"):
            local += 1
        elif kind == "BRA":
            target = re.search(r"0x([0-9a-f]+)", text)
            # A branch to itself ends every kernel: padding.
            if target and int(target[1], 16) < at:
                branches.append((int(target[1], 16), at))

    def widest(kinds: tuple[str, ...], begin: int = 0, end: int = 1 << 62) -> int:
        widths = [w for at, kind, w in memory if kind in kinds and begin <= at <= end]
        return max(widths, default=0)

    loops = tuple(
        Loop(widest(LOADS, *loop), widest(STORES, *loop))
        for loop in branches
        if not any(
            other != loop and loop[0] <= other[0] <= other[1] <= loop[1] for other in branches
        )
    )
    return {
        "widest_load": widest(LOADS),
        "widest_store": widest(STORES),
        "local_accesses": local,
        "loops": loops,
    }


@cache
def _demangled(name: str) -> str:
    """The kernel's own name with its template arguments; the mangled one without binutils."""
    tool = shutil.which("c++filt")
    if tool is None or not name.startswith("_Z"):
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|\bvoid |\bkd::|torch::headeronly::|c10::", "", text)
    text = re.sub(r"\(\w+\)(?=\d)", "", text)  # (Divergence)3
    return text.split("(")[0]
