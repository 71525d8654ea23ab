"""Each preset reproduces its toolkit's loss, against that loss written out here by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.budget import assert_within_budget
from torch import Tensor

import kdkernels

ROWS, CLASSES = 6, 11


def log_p(z: Tensor, temperature: float = 1.0) -> Tensor:
    return z / temperature - (z / temperature).exp().sum(1, keepdim=True).log()


def hard(s: Tensor, y: Tensor) -> Tensor:
    return -log_p(s)[torch.arange(ROWS), y].sum() / ROWS


def hinton(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    soft = -(log_p(t, 4.0).exp() * log_p(s, 4.0)).sum() / ROWS
    return 0.9 * 16.0 * soft + 0.1 * hard(s, y)


def tfkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    a, b = log_p(t, 20.0), log_p(s, 20.0)
    kl = (a.exp() * (a - b)).mean()  # over rows and classes
    return (1 - 0.95) * hard(s, y) + 0.95 * 400.0 * kl


def torchdistill(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    a, b = log_p(t, 4.0), log_p(s, 4.0)
    return 0.5 * hard(s, y) + 0.5 * 16.0 * (a.exp() * (a - b)).sum() / ROWS


def textbrewer(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return -(log_p(t, 4.0).exp() * log_p(s, 4.0)).sum(1).mean()


def distilbert(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    a, b = log_p(t, 2.0), log_p(s, 2.0)
    return 5.0 * 4.0 * (a.exp() * (a - b)).sum() / ROWS + 2.0 * hard(s, y)


def trl_gkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    p, q = log_p(s).exp(), log_p(t).exp()
    m = 0.5 * p + 0.5 * q
    jsd = 0.5 * (q * (q / m).log()).sum(1) + 0.5 * (p * (p / m).log()).sum(1)
    return jsd.sum() / ROWS


def liger_jsd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return 0.5 * hard(s, y) + 0.5 * trl_gkd(s, t, y)


def modelopt(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    a, b = log_p(t), log_p(s)
    return (a.exp() * (a - b)).sum() / ROWS


def stark(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    soft = -(log_p(t, 2.0).exp() * log_p(s, 2.0)).sum(1).mean()
    return 0.5 * (4.0 * soft + hard(s, y))


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "hinton": hinton,
    "tfkd": tfkd,
    "torchdistill": torchdistill,
    "textbrewer": textbrewer,
    "distilbert": distilbert,
    "trl_gkd": trl_gkd,
    "liger_jsd": liger_jsd,
    "modelopt": modelopt,
    "stark": stark,
}


def test_every_preset_has_a_formula() -> None:
    assert set(FORMULAS) == set(kdkernels.compat.presets())


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", FORMULAS)
def test_parity(name: str, backend: str) -> None:
    s = torch.randn(ROWS, CLASSES, requires_grad=True)
    t, y = torch.randn(ROWS, CLASSES), torch.randint(0, CLASSES, (ROWS,))
    double = s.detach().double().requires_grad_()
    oracle = FORMULAS[name](double, t.double(), y)
    single = FORMULAS[name](s, t, y)
    loss = kdkernels.kd_loss(s, t, y, **kdkernels.compat.preset(name), backend=backend)
    assert_within_budget(loss, oracle, single, torch.float32)
    assert_within_budget(
        torch.autograd.grad(loss, s)[0],
        torch.autograd.grad(oracle, double)[0],
        torch.autograd.grad(single, s)[0],
        torch.float32,
    )


def test_overrides() -> None:
    assert kdkernels.compat.preset("trl_gkd", beta=0.1)["beta"] == 0.1
    changed = kdkernels.compat.preset("distilbert", alpha=0.3)
    assert changed["alpha"] == 0.3 and "ce_weight" not in changed
    assert "alpha" not in kdkernels.compat.preset("hinton", ce_weight=1.0, kd_weight=1.0)
    with pytest.raises(ValueError, match="preset: name must be one of hinton.*got 'nobody'"):
        kdkernels.compat.preset("nobody")
