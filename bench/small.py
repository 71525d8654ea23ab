"""Runs every GPU kernel on little data, for tools that slow it a hundredfold.

``python -m kdkernels.bench.small [BACKEND]``; on a GPU, else on the CPU. Results are not checked
here: that is the tests' task.
"""

from __future__ import annotations

import itertools
import sys

import torch

from kdkernels.api.backends import available_backends
from kdkernels.bench import cases
from kdkernels.bench.cases import Consuming, Setting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# In one block, over a cluster, too long for the memory on the chip; rows that are not aligned.
SHAPES = ((3, 1001), (2, 151936), (1, 700001))


def run_all(backend: str | None = None) -> int:
    """Runs the ops forward and backward; returns the number of calls."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls = 0
    for op in cases.names():
        case = cases.load(op)
        if not case.row_kernels:
            continue  # composed of another op's kernels
        names = [b for b in available_backends(op, device) if b != "reference"]
        names = [b for b in names if backend in (None, b)]
        calls_of = itertools.product(names, DTYPES, case.divergences, SHAPES)
        for name, dtype, divergence, shape in calls_of:
            setting = Setting(device, dtype, divergence)
            run = case.ours(setting, name)
            inputs = case.inputs(setting, shape)
            result = (run.run if isinstance(run, Consuming) else run)(*inputs)
            if result.requires_grad:
                result.backward()
            calls += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return calls


if __name__ == "__main__":
    calls = run_all(*sys.argv[1:2])
    print(f"{calls} calls")
    sys.exit(calls == 0)
