"""The host emulation of CUDA as one more backend, ``emulated``, of the operators.

The ``.cu`` files are compiled as plain C++ (see ``include/cuda_runtime.h`` for the execution
model) into one library under ``build/emulation``, rebuilt when a source is newer, and registered
on CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kdkernels import _backend, ops
from kdkernels._op import Primitive

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulation"
TORCH = Path(torch.__file__).parent
# Vectorised loads and stores would not be those of the source; and with AVX-512, GCC 12 mixes up
# the fields of reduce_row's neutral structure (a warp's idle lanes had the maximum's as `live`).
SCALAR = ("-fno-tree-vectorize", "-fno-tree-slp-vectorize")
# Every load and store of the kernels becomes a call of memory.cpp.
CHECKED = (
    "-fsanitize=kernel-address", "--param=asan-instrumentation-with-call-threshold=0",
    "--param=asan-stack=0", "--param=asan-globals=0", *SCALAR,
)  # fmt: skip
H200 = {"major": 9, "shared": 232448}

_library: ctypes.CDLL | None = None


@functools.cache
def load() -> str | None:
    """Builds (if needed), loads and registers the backend; returns the reason when it cannot.

    ``KDKERNELS_EMULATED`` names another library to load, for tests of changed kernels.
    """
    global _library
    if other := os.environ.get("KDKERNELS_EMULATED"):
        path = Path(other)
    else:
        path, reason = build()
        if reason is not None:
            return reason
    for op in ops.__all__:
        module = importlib.import_module(f"kdkernels.ops.{op}.op")
        for primitive in vars(module).values():
            own = isinstance(primitive, Primitive) and primitive.name.startswith(op)
            if own and primitive.compiled:
                primitive.define("emulated")
        if hasattr(module, "attach"):  # what runs another primitive's kernels
            module.attach("emulated")
    torch.ops.load_library(str(path))
    _library = ctypes.CDLL(str(path))
    _library.emulated_reach.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _library.emulated_device.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_uint64)
    _backend.register_backend("emulated")
    return None


@contextmanager
def device(
    *, major: int = H200["major"], shared: int = H200["shared"], seed: int = 0
) -> Iterator[None]:
    """Emulates another GPU, and another order of threads, inside the ``with`` block.

    Args:
        major: of the compute capability; below 9 there are no clusters.
        shared: bytes of shared memory a block may have; little of it makes the launch plan choose
            larger clusters, and none of it the kernel that walks global memory.
        seed: order of threads; ``seed % 4`` is its kind.
    """
    assert _library is not None, "load() first"
    _library.emulated_device(major, shared, seed)
    try:
        yield
    finally:
        _library.emulated_device(H200["major"], H200["shared"], 0)


@contextmanager
def reachable(read: Iterable[torch.Tensor], written: Iterable[torch.Tensor]) -> Iterator[None]:
    """Lets kernels touch tensors whose addresses they find in another one."""
    assert _library is not None, "load() first"
    for writable, tensors in enumerate((read, written)):
        for x in tensors:
            if x.numel() > 0:
                _library.emulated_reach(x.data_ptr(), x.numel() * x.element_size(), writable)
    try:
        yield
    finally:
        _library.emulated_reach(None, 0, 0)


def build(
    sources: Path = ROOT / "csrc",
    folder: Path = BUILD,
    flags: tuple[str, ...] = CHECKED,
    *,
    everywhere: bool = False,
) -> tuple[Path, str | None]:
    """Compiles the operators; returns the library's path and the reason when there is none.

    Args:
        sources: folder of the ``.cu`` files, for tests that compile changed ones.
        folder: where the library goes.
        flags: of the compiler, for the kernels.
        everywhere: use them for the engine and the linker too.
    """
    kernels = {
        f"{source.stem}.o": (HERE / "operators.cpp", (*flags, f'-DKD_SOURCE="{source}"'))
        for source in sorted(sources.rglob("*_cuda.cu"))
    }
    link = (
        "-Wl,--wrap=torch_get_const_data_ptr,--wrap=torch_get_mutable_data_ptr",
        f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu",
    )  # fmt: skip
    common = flags if everywhere else ()
    return _build(folder / "emulated.so", kernels, (*common, *link), sources, common)


def build_planted() -> tuple[Path, str | None]:
    """Compiles the kernels of ``planted_bugs.cu``, which are no operators."""
    source = {"planted_bugs.o": (HERE / "planted_bugs.cu", (*CHECKED, "-xc++"))}
    return _build(BUILD / "planted.so", source, (), ROOT / "csrc")


def _build(
    path: Path,
    kernels: dict[str, tuple[Path, tuple[str, ...]]],
    link: tuple[str, ...],
    csrc: Path,
    engine_flags: tuple[str, ...] = (),
) -> tuple[Path, str | None]:
    """Object name -> source and flags, with the engine, to a library; rebuilt when older."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        return path, "the CUDA emulation needs g++ (or CXX)"
    inputs = [
        file
        for folder in (HERE, csrc)
        for suffix in ("*.h", "*.cuh", "*.cu", "*.cpp")
        for file in folder.rglob(suffix)
    ]
    if path.exists() and path.stat().st_mtime > max(file.stat().st_mtime for file in inputs):
        return path, None
    path.parent.mkdir(parents=True, exist_ok=True)
    # As nvcc does, g++ may contract a * b + c here: what must not be is written so.
    command = [
        compiler, "-std=c++20", "-O2", "-march=native", "-ffp-contract=fast", "-fPIC",
        "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-w", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{HERE / 'include'}", f"-I{csrc}", f"-isystem{TORCH / 'include'}",
    ]  # fmt: skip
    engine = {f"{name}.o": (HERE / f"{name}.cpp", engine_flags) for name in ("emulation", "memory")}
    objects = []
    # A folder of its own: two libraries may be built at a time, and one by two processes.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name, (source, flags) in (engine | kernels).items():
            objects.append(str(Path(folder) / name))
            reason = _run([*command, *flags, "-c", str(source), "-o", objects[-1]])
            if reason is not None:
                return path, reason
        # Put into place whole: a test process may have the old library mapped.
        fresh = Path(folder) / path.name
        reason = _run([compiler, "-shared", *objects, *link, "-o", str(fresh)])
        if reason is None:
            fresh.replace(path)
    return path, reason


def _run(command: list[str]) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr[-500:]]
    return f"the CUDA emulation could not be compiled: {errors[0]}"
