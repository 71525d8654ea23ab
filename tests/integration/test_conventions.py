"""What trainers around the losses do: shift and count as transformers, cast as DeepSpeed."""

from __future__ import annotations

import pytest
import torch

import kdkernels
from kdkernels.api.cache import TopKCodec

loss_utils = pytest.importorskip("transformers.loss.loss_utils")

ROWS, TOKENS, VOCAB = 3, 6, 11


@pytest.mark.parametrize("items", [None, 9])
def test_shift_and_count_are_those_of_transformers(items: int | None) -> None:
    """Its loss shifts inside; ``num_items_in_batch`` counts over several batches."""
    logits = torch.randn(ROWS, TOKENS, VOCAB)
    labels = torch.randint(VOCAB, (ROWS, TOKENS))
    labels[0, 0] = labels[1, 2:] = labels[2] = -100  # also a row without any
    expected = loss_utils.ForCausalLMLoss(logits, labels, VOCAB, num_items_in_batch=items)
    found = kdkernels.kd_loss(
        logits, None, labels, shift=1, num_items_in_batch=items, return_parts=True
    )
    torch.testing.assert_close(found.loss, expected)
    assert found.n_valid == (labels[:, 1:] != -100).sum()
    twice = kdkernels.kd_loss(logits[:, :-1], None, labels[:, 1:], num_items_in_batch=items)
    torch.testing.assert_close(twice, expected)


def test_cached_rows_survive_the_cast_of_floating_point_tensors() -> None:
    """DeepSpeed casts those of a batch to the precision of the engine; packed rows are bytes."""
    codec = TopKCodec(4, VOCAB)
    top = kdkernels.topk_logprobs(torch.randn(TOKENS, VOCAB), 4)
    batch = {
        "rows": torch.from_numpy(codec.encode(top.ids, top.logprobs)),
        "logprobs": top.logprobs,
    }
    cast = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    assert not torch.equal(cast["logprobs"].float(), batch["logprobs"])
    for found, expected in zip(
        codec.decode(cast["rows"].numpy()), codec.decode(batch["rows"].numpy()), strict=True
    ):
        assert torch.equal(found, expected)
