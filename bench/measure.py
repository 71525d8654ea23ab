"""Checks the variants of one op at one shape and dtype, and times those that are right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kdkernels.bench import cases, steps
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Case, Consuming, Inputs, Run, Setting
from kdkernels.bench.memory import peaks
from kdkernels.bench.report import Row
from kdkernels.bench.timing import COPY, Timing, copier, input_sets, interleaved
from kdkernels.bench.variants import Variants, build, preparer

LAUNCH_BOUND = 2**20  # bytes of the first input: below, the time is that of the host
LAUNCH_BOUND_SECONDS = 2.0
CHECKED_ROWS = 16  # enough to see a wrong kernel; float64 at full size would take gigabytes


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    op: str
    backends: tuple[str, ...]
    against: tuple[str, ...]
    modes: tuple[str, ...]
    seconds: float = 10.0  # a table
    memory: bool = True


@dataclass(frozen=True)
class Measured:
    """What came of one shape and dtype."""

    rows: list[Row]
    refused: list[str]  # kernels of ours that are wrong, with their errors
    missing: dict[str, str]  # rivals that cannot run, with the reason


def measure(plan: Plan, setting: Setting, shape: tuple[int, int]) -> Measured:
    """Checks every variant, then times it in every mode; a wrong kernel of ours is not timed."""
    case = cases.load(plan.op)
    variants, missing = build(case, setting, plan.backends, plan.against)
    checks: dict[str, list[Check]] = {}
    for name, variant in list(variants.items()):
        if name in case.unchecked:
            continue
        try:
            checks[name] = check(case, setting, shape, variant)
        except (RuntimeError, ImportError) as error:
            if name in plan.backends:
                raise
            # What a rival needs may only show when it first compiles or launches.
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del variants[name]
    refused = []
    for name in plan.backends:
        if failed := [str(one) for one in checks[name] if not one.passed]:
            size = f"{shape[0]}x{shape[1]} {dtype_name(setting.dtype)}"
            refused.append(f"{name} at {size}: {'; '.join(failed)}")
            del variants[name]
    rows = []
    if any(name in variants for name in plan.backends):
        errors = {
            name: max(one.error for one in found[1:] or found) for name, found in checks.items()
        }
        for mode in plan.modes:
            rows += _mode(plan, setting, shape, mode, variants, errors)
    return Measured(rows, refused, missing)


def check(
    case: Case, setting: Setting, shape: tuple[int, int], variant: Run | Consuming
) -> list[Check]:
    """Result and gradient of a variant against the reference in float64, on a few rows."""
    rows = getattr(case, "checked_rows", CHECKED_ROWS)
    inputs = case.inputs(setting, (min(shape[0], rows), shape[1]))
    reference = case.ours(setting, "reference")
    wide = tuple(x.detach().double() if x.is_floating_point() else x for x in inputs)
    for x, source in zip(wide, inputs, strict=True):
        x.requires_grad_(source.requires_grad)
    results = _results(variant, inputs), _results(reference, wide), _results(reference, inputs)
    names = ["result", *["gradient"] * (len(results[0]) - 1)]
    return [
        compare(name, actual, oracle, expected, expected.dtype)
        for name, actual, oracle, expected in zip(names, *results, strict=True)
    ]


def _results(variant: Run | Consuming, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    run = variant.run if isinstance(variant, Consuming) else variant
    fresh = [inputs[0].detach().clone().requires_grad_(inputs[0].requires_grad), *inputs[1:]]
    result = run(*fresh)
    leaves = [x for x in fresh if x.requires_grad]
    if not leaves:
        return (result,)
    return result.detach(), *torch.autograd.grad(result, leaves)


def _mode(
    plan: Plan,
    setting: Setting,
    shape: tuple[int, int],
    mode: str,
    variants: Variants,
    errors: Mapping[str, float],
) -> list[Row]:
    """Times the variants of one mode, a copy among them."""
    case = cases.load(plan.op)
    inputs = case.inputs(setting, shape)
    size = shape[0] * shape[1] * setting.dtype.itemsize
    if plan.op in steps.names():
        size = sum(x.nbytes for x in inputs)  # its shape is that of a batch, not of a tensor
    launch_bound = size < LAUNCH_BOUND
    ours = [name for name in plan.backends if name in variants]
    memory: dict[str, int] = {}
    if plan.memory and not launch_bound:
        rivals = [name for name in plan.against if name in variants]
        memory = peaks(plan.op, setting, shape, mode, ours, rivals)
    count = input_sets(sum(x.nbytes for x in inputs), setting.device)
    sets = [inputs, *(case.inputs(setting, shape) for _ in range(count - 1))]
    prepared = {name: preparer(variant, sets, mode) for name, variant in variants.items()}
    copied = 0
    if not launch_bound:
        prepared[COPY], copied = copier(setting.device, size)
    seconds = min(plan.seconds, LAUNCH_BOUND_SECONDS) if launch_bound else plan.seconds
    times = interleaved(prepared, sets=count, device=setting.device, seconds=seconds)
    common: dict[str, Any] = {
        "op": plan.op,
        "mode": mode,
        "rows": shape[0],
        "columns": shape[1],
        "dtype": dtype_name(setting.dtype),
        "device": setting.device,
        "divergence": setting.divergence,
        "temperature": setting.temperature,
        "launch_bound": launch_bound,
    }
    mixed = getattr(case, "mixed_traffic", None)
    traffic = mixed(setting) if mixed else case.traffic(mode)
    return [
        Row(
            **common,
            variant=name,
            ours=name in ours,
            ratio=_ratios(times, name, variants, ours),
            peak_mb_above_inputs=memory[name] / 2**20 if name in memory else None,
            gradient_error=errors.get(name),
            **_figures(times[name], times.get(COPY), copied, traffic * size),
        )
        for name in variants
    ]


def _ratios(
    times: Mapping[str, Timing], name: str, variants: Variants, ours: list[str]
) -> dict[str, float]:
    """How often ours fits into the time of each rival."""
    if name not in ours:
        return {}
    return {r: times[r].median / times[name].median for r in variants if r not in ours}


def _figures(timing: Timing, copy: Timing | None, copied: int, traffic: int) -> dict[str, Any]:
    """Times, and what they mean against the copy of the same run."""
    bandwidth = None if copy is None else copied / copy.median
    floor = traffic / bandwidth if bandwidth and traffic else None
    return {
        "ms": 1e3 * timing.median,
        "ms_20": 1e3 * timing.low,
        "ms_80": 1e3 * timing.high,
        "samples": timing.samples,
        "copy_gb_per_s": bandwidth and bandwidth / 1e9,
        "gb_per_s": floor and traffic / timing.median / 1e9,
        "floor_ms": floor and 1e3 * floor,
        "fraction_of_floor": floor and floor / timing.median,
    }


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` and so on."""
    return str(dtype).removeprefix("torch.")
