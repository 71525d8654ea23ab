"""Peak memory of a call above its inputs.

On CUDA torch's allocator counts it. On the CPU it is the resident peak of a process of its own
that runs nothing else (allocators keep freed blocks, so a second call would seem to need none).
"""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kdkernels.bench import cases
from kdkernels.bench.cases import Setting
from kdkernels.bench.variants import build, preparer


def peaks(
    op: str,
    setting: Setting,
    shape: tuple[int, int],
    mode: str,
    backends: Sequence[str],
    against: Sequence[str],
) -> dict[str, int]:
    """Bytes above the inputs by variant; empty where the system does not tell."""
    if setting.device == "cuda":
        return _measure(op, setting, shape, mode, backends, against)
    request = {
        "op": op,
        "setting": {**dataclasses.asdict(setting), "dtype": str(setting.dtype)},
        "shape": shape,
        "mode": mode,
        "backends": list(backends),
        "against": list(against),
    }
    command = [sys.executable, "-m", "kdkernels.bench.memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return {}
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(
    op: str,
    setting: Setting,
    shape: tuple[int, int],
    mode: str,
    backends: Sequence[str],
    against: Sequence[str],
) -> dict[str, int]:
    case = cases.load(op)
    variants, _ = build(case, setting, backends, against)
    small, real = case.inputs(setting, (2, 64)), case.inputs(setting, shape)
    found = {}
    for name, variant in variants.items():
        prepare = preparer(variant, [small, real], mode)
        # Libraries and code are loaded on a small input; what is compiled for one shape needs
        # that shape.
        prepare(1 if name == "compile" else 0)()
        call = prepare(1)
        gc.collect()
        found[name] = peak(call, setting.device)
    return found


def peak(call: Callable[[], object], device: str) -> int:
    """Bytes by which a call raises the peak over what is held now; see the module for the CPU."""
    return _peak_cuda(call) if device == "cuda" else resident_peak(call)


def _peak_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_peak(call: Callable[[], object]) -> int:
    """Bytes by which a call raises the peak of this process over what it holds now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _main(request: dict[str, Any]) -> None:
    values = request.pop("setting")
    dtype = getattr(torch, values.pop("dtype").removeprefix("torch."))
    shape = tuple(request.pop("shape"))
    print(json.dumps(_measure(setting=Setting(dtype=dtype, **values), shape=shape, **request)))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
