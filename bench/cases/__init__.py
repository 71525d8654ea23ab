"""One case a benchmarked op, found by its file; the op's own rivals, inputs and checks."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdkernels.bench import steps
from kdkernels.bench.accuracy import Check

Inputs = tuple[Tensor, ...]
# What is timed: from the inputs to a result, which is differentiated for those that require it.
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Consuming:
    """A run that overwrites its first input: each call gets a copy of its own, made untimed.

    The end of that copy is then in the cache, which favours the run.
    """

    run: Run


@dataclass(frozen=True)
class TritonCall:
    """A call to compile, not to run: its tensors lie on the CPU and are never touched.

    Attributes:
        name: for people.
        launch: calls a launcher.
        wide: whether the rows are aligned and long enough to be moved 16 bytes at a time.
    """

    name: str
    launch: Callable[[], object]
    wide: bool = True


@dataclass(frozen=True)
class Setting:
    """What every case can be asked for; ``divergence`` is a loss's own word, e.g. ``mse``."""

    device: str
    dtype: torch.dtype
    divergence: str = "forward_kl"
    temperature: float = 2.0


class Case(Protocol):
    """What a file of this folder offers as ``CASE``.

    It may also have ``narrow_stores``, names of row kernels whose results are no rows: they need
    not be stored 16 bytes at a time; ``search_loops``, the number of loops by which native row
    kernels find their row; and ``mixed_traffic(setting)``, which stands for ``traffic`` where the
    tensors have several dtypes.
    """

    divergences: tuple[str, ...]  # what it can be asked for as ``Setting.divergence``
    default_divergences: tuple[str, ...]  # what is measured unless told
    modes: tuple[str, ...]  # of forward, backward, full
    rivals: tuple[str, ...]
    row_kernels: tuple[str, ...]  # names of the GPU kernels that walk over rows, 16 bytes at a time
    unchecked: tuple[str, ...]  # rivals that compute something else, a lower bound of the time
    unfused_kernels: tuple[str, ...]  # Triton kernels in which equal terms must cancel exactly

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """The default shapes, ``(rows, columns)``."""

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """Random inputs of a real size."""

    def ours(self, setting: Setting, backend: str) -> Run | Consuming:
        """The op by one of its backends."""

    def rival(self, setting: Setting, name: str) -> Run | Consuming | str:
        """A rival, or the reason why it cannot run."""

    def traffic(self, mode: str) -> int:
        """How many tensors of the first input's size have to be read or written; 0: no bound."""

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """Checks against float64 over dtypes, options and edge cases, by name."""

    def triton_calls(self) -> Iterator[TritonCall]:
        """Calls of the Triton launchers over all dtypes and launch configurations."""


def names() -> list[str]:
    """The ops that have a case."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(op: str) -> Case:
    """The case of an op, or of a training step (``kdkernels.bench.steps``).

    Raises:
        ValueError: there is none.
    """
    folders = {**dict.fromkeys(names(), __name__), **dict.fromkeys(steps.names(), steps.__name__)}
    if op not in folders:
        raise ValueError(f"bench: op must be one of {', '.join(folders)}, got {op!r}")
    case: Case = importlib.import_module(f"{folders[op]}.{op}").CASE
    return case
