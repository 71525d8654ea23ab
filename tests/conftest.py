"""Fixtures of the whole suite: backends, poisoned allocations, seeds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels then run interpreted, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests import helpers by name

from emulation import backend as emulation
from helpers.backends import Backend

EMULATED = emulation.load()  # None, or the reason why the emulated CUDA kernels cannot run


def _backends() -> list[Backend]:
    found = [
        Backend("reference", "cpu"),
        Backend("native", "cpu"),
        Backend("triton", "cpu"),
        Backend("emulated", "cpu", EMULATED),
    ]
    if torch.cuda.is_available():
        found = [b for b in found if b.name != "triton"]
        found += [Backend(name, "cuda") for name in ("reference", "native", "triton")]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # A test may also name the backends it is about itself.
    own = any("backend" in str(m.args[0]) for m in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not own:
        metafunc.parametrize("backend", _backends(), ids=str, scope="module", indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """One (backend, device); skipped with the reason in words where it cannot run."""
    chosen: Backend = request.param
    if chosen.unavailable:
        pytest.skip(chosen.unavailable)
    return chosen


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What Python launchers allocate is full of NaN until a kernel writes it."""

    def poison(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = function(*args, **kwargs)
            if out.is_floating_point() and not torch.compiler.is_compiling():
                out.fill_(float("nan"))
            return out

        return call

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    yield
