"""Batches of similar length."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from kdkernels.api.distill.text import collate, inference_batches, training_batches

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=200)


@given(lengths=LENGTHS, size=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_row_occurs_once(lengths: list[int], size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for batches in (
        training_batches(lengths, size, generator),
        inference_batches(lengths, size),
    ):
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        assert max(map(len, batches)) <= size


def test_order_follows_the_seed() -> None:
    lengths = [random.Random(0).randint(1, 50) for _ in range(300)]
    first, again, other = (
        training_batches(lengths, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_batches_hold_little_padding() -> None:
    source = random.Random(0)
    lengths = [source.randint(5, 60) for _ in range(3200)]
    batches = training_batches(lengths, 32, torch.Generator().manual_seed(0))
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)


def test_collate_pads_with_the_given_token() -> None:
    batch = collate([[5, 6, 7], [8], [9, 9]], [1, 0], 3, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[8, 3, 3], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["input_ids"].dtype == torch.long
