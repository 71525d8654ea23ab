"""Sharded models: heads, averages and optimizer against one process, checkpoints by 1, 2 and 4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.processes import launch
from torch import nn

from kdkernels import linear_kd_loss
from kdkernels.api.parallel import gathered, through_head

pytestmark = pytest.mark.distributed


def test_sharded_models_are_like_one_process(tmp_path: Path) -> None:
    launch("fsdp_cases.py", tmp_path)


def test_a_head_that_is_whole() -> None:
    head, x = nn.Linear(3, 5), torch.randn(4, 3)
    weight, bias = gathered(head)
    assert weight is head.weight and bias is head.bias
    labels = torch.arange(4)

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_kd_loss(x, weight, None, None, labels, student_bias=bias)

    assert torch.equal(through_head(head, loss, x), loss(x, weight, bias))
    assert "forward" not in vars(head)
    with pytest.raises(ZeroDivisionError):
        through_head(head, lambda *_: 1 / 0, x)
    assert "forward" not in vars(head)


def test_heads_that_cannot_be_gathered() -> None:
    with pytest.raises(TypeError, match="gathered: head must be a module with a weight, got ReLU"):
        gathered(nn.ReLU())
    flat = nn.Linear(3, 5)
    flat.weight = nn.Parameter(torch.zeros(15))
    with pytest.raises(NotImplementedError, match=r"gathered: head must .* shape \[15\]"):
        gathered(flat)
    head = nn.Linear(3, 5)
    head.forward = head.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="through_head: head must have the forward of its class"):
        through_head(head, lambda *_: None)
