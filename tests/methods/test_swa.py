"""Stochastic weight averaging for fine-tuning."""

from __future__ import annotations

import copy
import doctest
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import kdkernels
from kdkernels import SWA

STEPS = 20


def _training(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, SWA]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, SWA(model, optimizer, STEPS, **options)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    batch = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().double() for p in model.parameters()]


@pytest.mark.parametrize("start", [0.0, 0.5, 0.73])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("count_start", [True, False])
def test_mean_of_the_models(start: float, every: int, count_start: bool) -> None:
    model, optimizer, swa = _training(start=start, every=every, count_start=count_start)
    first = int(start * STEPS)
    kept = [_weights(model)] if first == 0 and count_start else []
    for number in range(1, STEPS + 1):
        _step(model, optimizer, number)
        swa.step()
        later = number > first and (number - first) % every == 0
        if later or (count_start and number == first):
            kept.append(_weights(model))
    live = _weights(model)
    assert int(swa.averager.n_averaged) == len(kept)
    with swa.swapped() as averaged:
        for parameter, *models in zip(averaged.parameters(), *kept, strict=True):
            mean = torch.stack(models).mean(0)
            torch.testing.assert_close(parameter.double(), mean, rtol=1e-6, atol=1e-7)
    for parameter, before in zip(model.parameters(), live, strict=True):
        assert torch.equal(parameter.double(), before)


def test_torch_convention_is_torchs() -> None:
    model, optimizer, swa = _training(start=0.5, every=2, count_start=False)
    other = AveragedModel(model)
    for number in range(1, STEPS + 1):
        _step(model, optimizer, number)
        swa.step()
        if number > 10 and number % 2 == 0:
            other.update_parameters(model)
    with swa.swapped():
        for own, theirs in zip(model.parameters(), other.module.parameters(), strict=True):
            torch.testing.assert_close(own, theirs)


def test_learning_rates() -> None:
    _, optimizer, swa = _training(start=0.5, warmup=0.2, lr_factor=0.5)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        swa.step()
    rising, falling = rates[:4], rates[4:10]
    assert rising == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert falling == pytest.approx([0.01 - 0.005 * i / 6 for i in range(6)])
    assert rates[10:] == pytest.approx([0.005] * 10)


def test_resumes_to_the_bit() -> None:
    model, optimizer, swa = _training(start=0.25, every=2, lr_factor=0.7)
    for number in range(1, STEPS + 1):
        if number == 13:
            state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), swa.state_dict()))
        _step(model, optimizer, number)
        swa.step()
    other, second, resumed = _training(start=0.25, every=2, lr_factor=0.7)
    for part, kept in zip((other, second, resumed), state, strict=True):
        part.load_state_dict(kept)
    for number in range(13, STEPS + 1):
        _step(other, second, number)
        resumed.step()
    for mine, whole in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, whole)
    with swa.swapped(), resumed.swapped():
        for mine, whole in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(mine, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.0}, r"SWA: start must lie in \[0, 1\), got 1.0"),
        ({"start": -0.1}, r"SWA: start must be in \[0, 1\], got -0.1"),
        ({"every": 0}, "SWA: every must be 1 or more, got 0"),
        ({"every": 11}, "SWA: every must be at most the 10 steps from the start on, got 11"),
        ({"lr_factor": math.inf}, "SWA: lr_factor must be finite and 0 or more, got inf"),
        ({"warmup": 2.0}, r"SWA: warmup must be in \[0, 1\], got 2.0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _training(**options)


def test_refuses_a_state_of_something_else() -> None:
    *_, swa = _training()
    with pytest.raises(ValueError, match="SWA: state must have 'step', got none"):
        swa.load_state_dict({})


def test_example() -> None:
    found = doctest.testmod(sys.modules[SWA.__module__])
    assert found.attempted > 4
    assert found.failed == 0
    assert "SWA" in kdkernels.__all__
