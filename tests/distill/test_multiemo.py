"""Sentences with four kinds of sentiment, and the model out of a TensorFlow checkpoint."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from kdkernels.api.distill import bert_tiny, fetch, multiemo
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.tf_bundle import MAGIC, SNAPPY, read_bundle, unsnappy


def example(text: str, *labels: str) -> dict[str, object]:
    return {"input": text, "target_scores": {k: int(k in labels) for k in multiemo.LABELS}}


def test_domains_are_mixed_and_equal_sentences_stay_together(tmp_path: Path) -> None:
    for domain in multiemo.DOMAINS:
        examples = [example(f"{domain} {i % 20}", multiemo.LABELS[i % 4]) for i in range(25)]
        path = tmp_path / multiemo.file_name(domain)
        path.parent.mkdir()
        path.write_text(json.dumps({"examples": [*examples, example(" ", "neutral")]}))
    corpus = multiemo.load_multiemo(tmp_path)
    parts = [corpus.train, corpus.dev, corpus.test]
    assert sum(map(len, parts)) == 100 and len(corpus.test) >= 20 and len(corpus.dev) >= 10
    texts = [set(part.texts) for part in parts]
    assert sum(map(len, texts)) == 80  # none is in two of them
    assert {text.split()[0] for text in corpus.train.texts} == set(multiemo.DOMAINS)
    for part in parts:
        for text, label in zip(part.texts, part.labels, strict=True):
            assert label == int(text.split()[1]) % 4


def test_an_example_has_one_label() -> None:
    bad = json.dumps({"examples": [example("a", "neutral"), example("b", "neutral", "positive")]})
    with pytest.raises(DistillError, match=r"data must have one label .* in example 1 of hotels"):
        multiemo.read_examples(bad, "hotels")


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    """A block of a LevelDB table; keys share beginnings with the ones before."""
    out, before = b"", b""
    for key, value in entries:
        shared = next((i for i, (a, b) in enumerate(zip(key, before, strict=False)) if a != b),
                      min(len(key), len(before)))  # fmt: skip
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out, before = out + key[shared:] + value, key
    return out + struct.pack("<II", 0, 1)


def literal(content: bytes) -> bytes:
    """Snappy, without copies."""
    size = len(content) - 1
    return varint(len(content)) + bytes([61 << 2]) + size.to_bytes(2, "little") + content


def write_bundle(folder: Path, variables: dict[str, torch.Tensor], dtype: int = 1) -> list[Path]:
    """A checkpoint as TensorFlow writes it: one data file, one compressed block in the index."""
    data, entries = b"", [(b"", field(1, 1))]
    for name, value in sorted(variables.items()):
        raw = value.numpy().tobytes()
        shape = b"".join(field(2, field(1, size)) for size in value.shape)
        entry = field(1, dtype) + field(2, shape) + (field(4, len(data)) if data else b"")
        # A checksum, which is a number of fixed width.
        entry += field(5, len(raw)) + bytes([6 << 3 | 5]) + b"crc!"
        entries.append((name.encode(), entry))
        data += raw
    content = literal(block(entries))
    index = block([(b"z", varint(0) + varint(len(content)))])
    begin = len(content) + 5
    footer = (varint(0) + varint(0) + varint(begin) + varint(len(index))).ljust(40, b"\0")
    paths = [folder / "variables.index", folder / "variables.data"]
    paths[0].write_bytes(
        content + bytes([SNAPPY]) + b"crc!" + index + b"\0crc!" + footer + struct.pack("<Q", MAGIC)
    )
    paths[1].write_bytes(data)
    return paths


def test_variables_of_a_checkpoint(tmp_path: Path) -> None:
    wanted = {
        "bert/layer_0/kernel": torch.randn(3, 4),
        "bert/layer_0/bias": torch.randn(4),
        "bert/step": torch.tensor(5.0),
    }
    found = read_bundle(*write_bundle(tmp_path, wanted))
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert read_bundle(*write_bundle(tmp_path, wanted, dtype=9)) == {}


def test_damaged_checkpoints(tmp_path: Path) -> None:
    index, data = write_bundle(tmp_path, {"a": torch.randn(8)})
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(ValueError, match="a must have 8 numbers in .*, got fewer"):
        read_bundle(index, data)
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(ValueError, match="index must be a LevelDB table"):
        read_bundle(index, data)


@pytest.mark.parametrize(
    ("packed", "content"),
    [
        (b"\x03\x08abc", b"abc"),
        # Two letters, then a copy that overlaps what it writes: eight bytes from two before.
        (b"\x0a\x04ab\x11\x02", b"ababababab"),
        (b"\x07\x0cabcd\x0a\x04\x00", b"abcdabc"),
        (b"\x07\x0cabcd\x0b\x04\x00\x00\x00", b"abcdabc"),
    ],
)
def test_snappy(packed: bytes, content: bytes) -> None:
    assert unsnappy(packed) == content


@pytest.mark.parametrize("packed", [b"\x09\x04ab", b"\x0a\x04ab\x11\x03"])
def test_damaged_snappy(packed: bytes) -> None:
    with pytest.raises(ValueError, match="the block must"):
        unsnappy(packed)


@pytest.mark.network
@pytest.mark.slow
def test_published_model_and_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads 358 MB twice; a minute or two. Run with ``-m "network and slow" -k published``."""
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path))
    told: list[str] = []
    folder = bert_tiny.bert_tiny_folder(told.append)
    assert any("BERT-Tiny weights" in line for line in told)
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 4_385_920
    assert tokenizer("Hello worlds").input_ids == [101, 7592, 8484, 102]
    assert bert_tiny.bert_tiny_folder(told.append) == folder
    corpus = multiemo.load_multiemo(fetch.fetch_members(fetch.MULTIEMO, told.append))
    sizes = [len(part) for part in (corpus.train, corpus.dev, corpus.test)]
    assert sizes == [40220, 5746, 11492]
