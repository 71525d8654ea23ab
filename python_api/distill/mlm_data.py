"""Texts for masked language models: lines as sequences, and which of their tokens are hidden."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels.api.distill import fetch, lm_data
from kdkernels.api.distill.errors import DistillError, require

# What causal distillation's data lack: shorter lines, and lines of which half is unknown.
SHORTEST = 12
UNKNOWN_SHARE = 0.5
# Of the hidden tokens: become the mask, become any token; the others stay.
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
# Which tokens are hidden in evaluations, whatever the training seed.
EVALUATION_SEED = 2018


def mlm_sequences(
    name_or_path: str,
    tokenizer: Any,
    split: str,
    max_length: int,
    notify: fetch.Notify = lambda line: None,
) -> list[list[int]]:
    """Cuts a text into sequences for a masked language model.

    Every line is a text; one that is too long is cut into several. Each sequence gets the
    tokenizer's special tokens. Sequences of fewer than 12 tokens, or half of which the tokenizer
    does not know, are left out.

    Args:
        name_or_path: ``wikitext-2``, fetched once by checksum; a UTF-8 text file, whose last tenth
            is held out; or a folder with one file each that has ``train``, ``valid`` and ``test``
            in its name.
        tokenizer: A Hugging Face tokenizer.
        split: ``train``, ``valid`` or ``test``.
        max_length: Longest sequence, special tokens included.
        notify: Receives one line per thing worth telling (download, licence).

    Returns:
        Token ids of each sequence, in the order of the text.

    Raises:
        DistillError: Nothing of that name, or no sequence in it.
    """
    require(split in lm_data.SPLITS, "split", f"be one of {lm_data.SPLITS}", repr(split))
    lines = [line for line in _text(name_or_path, split, notify).splitlines() if line.strip()]
    before, behind = _special_tokens(tokenizer)
    room = max_length - len(before) - len(behind)
    sequences = []
    for start in range(0, len(lines), lm_data.LINES_AT_A_TIME):
        part = lines[start : start + lm_data.LINES_AT_A_TIME]
        for ids in tokenizer(part, add_special_tokens=False)["input_ids"]:
            for begin in range(0, len(ids), room):
                piece = list(ids[begin : begin + room])
                whole = [*before, *piece, *behind]
                unknown = piece.count(tokenizer.unk_token_id)
                if len(whole) >= SHORTEST and unknown < UNKNOWN_SHARE * len(piece):
                    sequences.append(whole)
    contract = f"have a line of at least {SHORTEST} tokens in {split}"
    require(len(sequences) > 0, "data", contract, f"none in {name_or_path}")
    return sequences


def data_files(path: Path) -> list[Path]:
    """The files that are read of one's own data."""
    return [path] if path.is_file() else [_member(path, split) for split in lm_data.SPLITS]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    probe = "the"
    bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(probe)["input_ids"])
    place = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:place], whole[place + len(bare) :]


def _text(name_or_path: str, split: str, notify: fetch.Notify) -> str:
    path = Path(name_or_path)
    if name_or_path == lm_data.WIKITEXT2_NAME or path.is_file():
        return lm_data.split_text(name_or_path, split, notify)
    contract = f"be {lm_data.WIKITEXT2_NAME}, a text file or a folder of them"
    require(path.is_dir(), "data", contract, name_or_path)
    member = _member(path, split)
    try:
        return member.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DistillError(f"data must be UTF-8 text, got {member}: {error}") from error


def _member(folder: Path, split: str) -> Path:
    found = sorted(file for file in folder.iterdir() if split in file.name and file.is_file())
    contract = f"have one file with {split} in its name"
    require(len(found) == 1, "data", contract, f"{len(found)} in {folder}")
    return found[0]


def hide(
    ids: Sequence[Sequence[int]], tokenizer: Any, probability: float, generator: torch.Generator
) -> tuple[list[list[int]], list[list[int]]]:
    """Hides tokens of sequences: what a masked language model gets, and what it is to find.

    Each token that is not special is chosen with ``probability``, at least one of a sequence. Of
    the chosen ones 80 % become the mask, 10 % any token, and 10 % stay.

    Args:
        ids: Sequences with their special tokens.
        tokenizer: Their tokenizer.
        probability: Share of the tokens.
        generator: Source of the draws.

    Returns:
        The sequences with tokens hidden, and labels: the token where it was chosen, else -100.
    """
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    inputs, labels = [], []
    for row in ids:
        tokens = torch.tensor(row)
        draws = torch.rand(len(row), generator=generator)
        draws[torch.isin(tokens, special)] = 2.0
        chosen = draws < max(probability, draws.min().item() + 1e-7)
        kind = torch.rand(len(row), generator=generator)
        any_token = torch.randint(len(tokenizer), (len(row),), generator=generator)
        hidden = torch.where(kind < MASK_SHARE, tokenizer.mask_token_id, tokens)
        random = (kind >= MASK_SHARE) & (kind < MASK_SHARE + RANDOM_SHARE)
        hidden = torch.where(random, any_token, hidden)
        inputs.append(torch.where(chosen, hidden, tokens).tolist())
        labels.append(torch.where(chosen, tokens, -100).tolist())
    return inputs, labels


def partners(count: int, seed: int) -> Tensor:
    """A fixed partner for each of so many sequences: a random permutation, drawn once."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
