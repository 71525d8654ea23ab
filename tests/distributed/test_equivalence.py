"""1 x N = N x 1 micro-batches = 2 processes, and the count that makes it so."""

from __future__ import annotations

import pytest
import torch
from helpers.processes import launch

from kdkernels import global_valid_count, kd_loss

pytestmark = pytest.mark.distributed


def test_every_loss_over_batches_and_processes() -> None:
    launch("equivalence_cases.py")


def test_counts_are_those_of_the_loss() -> None:
    labels = torch.tensor([[1, 2, -100, 3], [-100, 0, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]])
    logits = torch.randn(2, 4, 5)
    for options in ({}, {"shift": 1}, {"mask": mask}, {"mask": mask, "shift": 1}):
        parts = kd_loss(logits, None, labels, return_parts=True, **options)
        count = global_valid_count(labels, **options)
        assert count == parts.n_valid and count.dtype == torch.int64 and count.shape == ()
    assert global_valid_count([labels, labels[:1]], mask=[mask, mask[:1]]) == 6
    assert global_valid_count(labels, ignore_index=2) == 6
    assert global_valid_count(mask=mask.bool(), units=3, averaged=True) == 18.0


def test_refusals() -> None:
    labels = torch.zeros(2, 3).long()
    for message, arguments in (
        ("labels or mask must be given", {}),
        ("shift must be 0 or 1, got 2", {"labels": labels, "shift": 2}),
        ("units must be 1 or more", {"labels": labels, "units": 0}),
        ("mask must have a tensor for each of the 2", {"labels": [labels] * 2, "mask": labels}),
        (r"mask must have the shape of labels \[2, 3\]", {"labels": labels, "mask": labels[0]}),
        ("must hold a micro-batch, got none", {"labels": []}),
    ):
        with pytest.raises(ValueError, match=f"global_valid_count: .*{message}"):
            global_valid_count(**arguments)
