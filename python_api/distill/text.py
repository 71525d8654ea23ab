"""Tokenising, and batches of texts of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Texts are sorted by length within windows of this many batches: long enough that a batch holds
# almost no padding, short enough that the order stays random over an epoch.
WINDOW_BATCHES = 50


def encode(
    tokenizer: Any, texts: Sequence[str], max_length: int, pairs: Sequence[str] | None = None
) -> list[list[int]]:
    """Tokenises texts.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: The texts.
        max_length: Longest sequence kept, special tokens included.
        pairs: Second texts, one for each; None where texts stand alone.

    Returns:
        One list of token ids per text, unpadded.
    """
    if not texts:
        return []
    second = None if pairs is None else list(pairs)
    encoded = tokenizer(list(texts), second, truncation=True, max_length=max_length)
    return [list(ids) for ids in encoded["input_ids"]]


def training_batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Splits rows into batches of similar length, in random order.

    Args:
        lengths: Number of tokens of each row.
        batch_size: Rows per batch; the last batch of a window may be smaller.
        generator: Source of the order.

    Returns:
        Lists of row numbers; every row occurs once.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = WINDOW_BATCHES * batch_size
    batches = []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lambda row: lengths[row])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def inference_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Splits rows into batches sorted by length; every row occurs once."""
    rows = sorted(range(len(lengths)), key=lambda row: lengths[row])
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def collate(
    ids: Sequence[Sequence[int]],
    rows: Sequence[int],
    pad_id: int,
    device: torch.device,
    types: Sequence[Sequence[int]] | None = None,
) -> dict[str, torch.Tensor]:
    """Pads the chosen rows to the longest of them.

    Returns:
        ``input_ids`` and ``attention_mask``, with ``types`` ``token_type_ids`` as well, int64
        ``[len(rows), longest]``, ready for a model.
    """
    longest = max(len(ids[row]) for row in rows)
    padding = [longest - len(ids[row]) for row in rows]
    input_ids = [[*ids[row], *[pad_id] * pad] for row, pad in zip(rows, padding, strict=True)]
    mask = [[1] * (longest - pad) + [0] * pad for pad in padding]
    batch = {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
    if types is not None:
        padded = [[*types[row], *[0] * pad] for row, pad in zip(rows, padding, strict=True)]
        batch["token_type_ids"] = torch.tensor(padded, device=device)
    return batch
