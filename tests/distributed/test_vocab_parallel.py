"""``kdkernels.parallel``: vocabularies divided over two and four processes against one."""

from __future__ import annotations

import doctest
import sys

import pytest
import torch
from helpers.processes import launch

import kdkernels

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("processes", [2, 4])
def test_shards_are_like_one_process(processes: int) -> None:
    launch("vocab_cases.py", processes)


@pytest.mark.parametrize("module", ["parallel", "vocab_parallel"])
def test_examples(module: str) -> None:
    found = doctest.testmod(sys.modules[f"kdkernels.api.{module}"])
    assert found.attempted and not found.failed


def test_without_processes() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="vocab_parallel_kd_loss: group must be a process group"):
        kdkernels.parallel.vocab_parallel_kd_loss(x, x)
