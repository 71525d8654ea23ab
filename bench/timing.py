"""Times variants side by side.

The variants take turns, so that whatever else the machine does hits all of them; their inputs
rotate, so that none finds its own in the last-level cache; a copy runs along with them and gives
the bandwidth that this run could reach.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Gets a variant ready for one of the input sets (not timed) and returns the call to time.
Prepare = Callable[[int], Callable[[], object]]

COPY = "copy"
# Calls shorter than this are timed in groups. The variant before, the copy above all, leaves code
# and data of this one out of the caches: in groups of 0.2 ms a call of 60 us was timed as 95.
SHORTEST_SAMPLE = 5e-3
LONGEST_GROUP = 200


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median and the 20 and 80 % quantiles."""

    median: float
    low: float
    high: float
    samples: int


def interleaved(
    variants: Mapping[str, Prepare],
    *,
    sets: int,
    device: str,
    seconds: float,
    rounds: tuple[int, int] = (5, 500),
) -> dict[str, Timing]:
    """Times variants in turn.

    Args:
        variants: by name.
        sets: number of input sets to rotate through.
        device: device type of the inputs.
        seconds: about how long to measure, warm-up not counted.
        rounds: fewest and most samples of each variant.

    Returns:
        One timing a variant.
    """
    turn = 0
    groups = {}
    for name, prepare in variants.items():
        _sample([prepare(0)], device)()  # first calls compile, load and allocate
        warm = _sample([prepare(1 % sets)], device)()
        groups[name] = min(LONGEST_GROUP, max(1, math.ceil(SHORTEST_SAMPLE / max(warm, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while len(samples[order[0]]) < rounds[1]:
            pending = {}
            for name in order:
                calls = [variants[name]((turn + i) % sets) for i in range(groups[name])]
                turn += groups[name]
                pending[name] = _sample(calls, device)
            for name, read in pending.items():
                samples[name].append(read() / groups[name])
            order = [*order[1:], order[0]]
            done = len(samples[order[0]])
            if done >= rounds[0] and time.perf_counter() - start > seconds:
                break
    finally:
        gc.enable()
    return {name: _summary(values) for name, values in samples.items()}


def _sample(calls: list[Callable[[], object]], device: str) -> Callable[[], float]:
    """Makes the calls; the result waits for them and gives the seconds they took."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()

        def read() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return read
    begin = time.perf_counter()
    for call in calls:
        call()
    took = time.perf_counter() - begin
    return lambda: took


def _summary(values: list[float]) -> Timing:
    values = sorted(values)

    def quantile(q: float) -> float:
        return values[round(q * (len(values) - 1))]

    return Timing(quantile(0.5), quantile(0.2), quantile(0.8), len(values))


def cache_bytes(device: str) -> int:
    """Size of the last-level cache."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    try:
        found = [path.read_text().strip() for path in sizes]
        return max(int(size[:-1]) * units[size[-1]] for size in found)
    except (OSError, KeyError, ValueError):
        return 64 * 2**20  # unknown: more than most machines have


def input_sets(bytes_of_one: int, device: str) -> int:
    """How many input sets together exceed the last-level cache twice."""
    return max(1, min(64, math.ceil(2 * cache_bytes(device) / max(bytes_of_one, 1))))


def copier(device: str, least: int) -> tuple[Prepare, int]:
    """A copy past the cache as one more variant, and the bytes it moves."""
    size = max(least, 4 * cache_bytes(device))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target: Any = torch.zeros_like(source)
    return lambda index: lambda: target.copy_(source), 2 * size
