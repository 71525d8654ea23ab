"""The helpers of the tests fail on planted errors."""

from __future__ import annotations

import pytest
import torch
from helpers.budget import assert_same_direction, assert_within_budget


def test_budget_accepts_rounding_and_refuses_more() -> None:
    oracle = torch.randn(100, dtype=torch.float64)
    rounded = oracle.float()
    assert_within_budget(rounded, oracle, rounded, torch.float32)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(rounded + 1e-5, oracle, rounded, torch.float32)


def test_budget_refuses_nan_and_a_missing_infinity() -> None:
    oracle = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([1.0, 5.0]), oracle, oracle, torch.float32)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([torch.nan, torch.inf]), oracle, oracle, torch.float32)


def test_direction_sees_a_small_bias() -> None:
    oracle = torch.randn(10_000, dtype=torch.float64)
    assert_same_direction(oracle.float(), oracle, torch.float32)
    with pytest.raises(AssertionError):
        assert_same_direction((oracle * (1 + 1e-5)).float(), oracle, torch.float32)
