"""Quick regression figures for ``make bench``: pytest-benchmark compares them between runs.

``make bench ARGS=--benchmark-autosave`` saves a run, ``ARGS=--benchmark-compare`` compares with it.
For figures against rivals and the bandwidth of the machine use ``bench/run.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdkernels.api.backends import available_backends
from kdkernels.bench import cases
from kdkernels.bench.cases import Setting
from kdkernels.bench.variants import preparer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_ROWS = 64
SETTINGS = [
    (op, mode, shape, dtype)
    for op in cases.names()
    for mode in cases.load(op).modes
    # Few classes, whose time is that of the host, and some rows of each real size.
    for shape in [(32, 3), *((MOST_ROWS, columns) for _, columns in cases.load(op).shapes(DEVICE))]
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("op", "mode", "shape", "dtype"), SETTINGS, ids=str)
def test_speed(benchmark: Any, op: str, mode: str, shape: tuple[int, int], dtype: Any) -> None:
    case = cases.load(op)
    setting = Setting(DEVICE, dtype, case.default_divergences[0])
    benchmark.group = f"{op} {mode}"
    variant = case.ours(setting, available_backends(op, DEVICE)[0])
    prepare = preparer(variant, [case.inputs(setting, shape)], mode)

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        return (prepare(0),), {}

    def call(run: Any) -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, setup=setup, rounds=50, warmup_rounds=3)
