"""Loads the compiled libraries, and remembers why one was not loaded.

Nothing is compiled here and nothing fails here: a missing or broken library leaves a reason that
``unsupported()`` of each op, ``kdkernels info`` and the error of an explicit request repeat.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

# Elsewhere only for tests of a library built in another way (make test-sanitize).
_FOLDER = Path(os.environ.get("KDKERNELS_LIBRARIES") or Path(__file__).parent)

# The stable ABI that the libraries are built against (CMakeLists.txt).
OLDEST_TORCH = (2, 11)


def _load(device: str) -> str | None:
    """Loads ``_native_<device>.so``; returns the reason when that is not possible."""
    path = _FOLDER / f"_native_{device}.so"
    if not path.exists():
        return f"{path.name} was not built (KDKERNELS_NATIVE=off, or no compiler at install time)"
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    if release < OLDEST_TORCH:  # it would load, and fail at the first call
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"{path.name} needs torch {oldest} or newer, this is {torch.__version__}"
    if device == "cuda" and torch.version.cuda is None:
        return f"{path.name} needs a CUDA build of torch, this is {torch.__version__}"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:
        return f"{path.name} could not be loaded: {str(error).splitlines()[0]}"
    return None


_reasons: dict[str, str | None] = {device: _load(device) for device in ("cpu", "cuda")}


def reason(device: str) -> str | None:
    """Why native kernels cannot run on this device type; ``None`` when they can."""
    if device in _reasons:
        return _reasons[device]
    return f"there are no native kernels for {device} tensors"


def host() -> ModuleType | None:
    """The compiled host helpers (build facts, CPU features, launch plans), if they were built."""
    try:
        return importlib.import_module("kdkernels._host")
    except ImportError:
        return None
