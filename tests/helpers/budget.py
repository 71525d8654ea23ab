"""Earned tolerances: a kernel may err at most twice what the same-dtype reference errs, plus eps.

Errors are measured against the float64 reference. No test states an ``atol`` or ``rtol`` of its
own; where the project promises a figure, the test names that promise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor, oracle: Tensor, reference: Tensor, dtype: torch.dtype, *, unit: float = 0.0
) -> None:
    """``max|actual - oracle| <= 2 * (max|reference - oracle| + eps * max|oracle|)``.

    In float64 the oracle is no better than the kernel, so eps counts 32 times there.

    Args:
        actual: what the kernel gave.
        oracle: the float64 reference.
        reference: the reference on inputs and arithmetic of the tested dtype.
        dtype: the dtype whose eps counts (that of the result).
        unit: size of the terms whose difference the result is, where that may cancel to nothing.
    """
    oracle = oracle.double().cpu()
    actual, reference = actual.double().cpu(), reference.double().cpu()
    # Infinite losses are legal (mass where the other model has none): they must agree exactly.
    infinite = ~torch.isfinite(oracle)
    assert torch.equal(actual[infinite], oracle[infinite])
    actual, oracle, reference = actual[~infinite], oracle[~infinite], reference[~infinite]
    assert torch.isfinite(actual).all(), "not finite"
    if oracle.numel() == 0:
        return
    scale = oracle.abs().max().clamp(min=unit)
    eps = torch.finfo(dtype).eps * (32 if dtype == torch.float64 else 1)
    budget = 2 * ((reference - oracle).abs().max() + eps * scale)
    error = (actual - oracle).abs().max()
    assert error <= budget, f"error {error:.3e} exceeds the budget {budget:.3e} (scale {scale:.3e})"


def assert_same_direction(actual: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    """Relative norm and cosine: a few outliers must not hide a bias."""
    a, b = actual.double().cpu().flatten(), oracle.double().cpu().flatten()
    norm = b.norm()
    if norm == 0:
        assert a.norm() == 0
        return
    eps = torch.finfo(dtype).eps
    assert (a - b).norm() / norm <= 4 * eps
    assert 1 - torch.dot(a, b) / (a.norm() * norm) <= 16 * eps * eps + 1e-12
