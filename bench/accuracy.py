"""When a result counts as right: an error budget that is earned, not typed in.

A kernel may err, against float64, at most twice what the same-dtype PyTorch reference errs, plus
the rounding of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One comparison; error and budget are relative to the largest value."""

    name: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the budget (a NaN is not)."""
        return self.error <= self.budget

    def __str__(self) -> str:
        return f"{self.name} errs by {self.error:.2e}, its budget is {self.budget:.2e}"


def compare(
    name: str, actual: Tensor, oracle: Tensor, reference: Tensor, dtype: torch.dtype
) -> Check:
    """Checks a result.

    Args:
        name: what is compared, for messages.
        actual: what the kernel gave.
        oracle: what the reference gives in float64.
        reference: what the reference gives on inputs of the tested dtype.
        dtype: dtype of the result, whose rounding is allowed on top.

    Returns:
        The check. Its error is infinite where values are not finite that should be, and where an
        infinite value of the oracle (mass where the other model has none) is missing.
    """
    actual, oracle, reference = (x.detach().double().cpu() for x in (actual, oracle, reference))
    finite = torch.isfinite(oracle)
    if not torch.equal(actual[~finite], oracle[~finite]) or not actual[finite].isfinite().all():
        return Check(name, torch.inf, 0.0)
    actual, oracle, reference = actual[finite], oracle[finite], reference[finite]
    if oracle.numel() == 0:
        return Check(name, 0.0, 0.0)
    scale = oracle.abs().max().item() or 1.0
    error = (actual - oracle).abs().max().item() / scale
    earned = (reference - oracle).abs().max().item() / scale
    return Check(name, error, 2 * (earned + torch.finfo(dtype).eps))
