"""interchange against pyvene, where that is installed: pip install --no-deps pyvene==0.1.8.

Its other packages are not needed: only the file with its swap is loaded, and that has none.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kdkernels

FOUND = importlib.util.find_spec("pyvene")
pytestmark = pytest.mark.skipif(FOUND is None, reason="pyvene is not installed")
MODES = {"interchange": "swap", "add": "add", "subtract": "subtract"}
LENGTH = 3


def _utils() -> ModuleType:
    assert FOUND is not None and FOUND.origin is not None
    path = Path(FOUND.origin).parent / "models" / "intervention_utils.py"
    spec = importlib.util.spec_from_file_location("pyvene_intervention_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _states() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    base, source = (torch.randn(4, 9, 8, dtype=torch.float64, requires_grad=True) for _ in "bs")
    return base, source, torch.tensor([0, 2, 6, 5]), torch.tensor([1, 0, 3, 6])


def _theirs(
    base: Tensor, source: Tensor, start: Tensor, of: Tensor, mode: str, dims: int
) -> Tensor:
    """Gathered, combined in place and scattered, as its models do."""
    step, rows = torch.arange(LENGTH), torch.arange(4)[:, None]
    taken = base[rows, start[:, None] + step].clone()
    given = source[rows, of[:, None] + step]
    columns = [list(range(dims))] * 4
    taken = _utils()._do_intervention_by_swap(taken, given, mode, subspaces=columns)
    out = base.clone()
    out[rows, start[:, None] + step] = taken
    return out


def _ours(base: Tensor, source: Tensor, start: Tensor, of: Tensor, mode: str, dims: int) -> Tensor:
    return kdkernels.interchange(
        base,
        source,
        base_start=start,
        source_start=of,
        length=torch.full((4,), LENGTH),
        dims=(0, dims),
        mode=MODES[mode],
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", [8, 5])
@pytest.mark.parametrize("before", [torch.nn.Identity(), torch.nn.Tanh(), torch.nn.ReLU()])
def test_values_and_gradients(mode: str, dims: int, before: torch.nn.Module) -> None:
    base, source, start, of = _states()
    found = []
    for run in (_ours, _theirs):
        out = run(before(base), source, start, of, mode, dims)
        found.append((out, *torch.autograd.grad(out.square().sum(), (base, source))))
    torch.testing.assert_close(*found)


def test_its_swap_in_place_breaks_behind_an_activation() -> None:
    """Why ours is out of place: tanh keeps its result for the backward pass."""
    base, source, start, of = _states()
    state = base.tanh()
    everything = [list(range(8))] * 4
    out = _utils()._do_intervention_by_swap(state, source, "interchange", subspaces=everything)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    state = base.tanh()
    out = _ours(state, source, start, of, "interchange", 8)
    out.sum().backward()
    assert base.grad is not None
