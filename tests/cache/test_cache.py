"""Writing and reading: by id and content, in batches, and only what fits the manifest."""

from __future__ import annotations

import doctest
import importlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cached import TOKENS, VOCAB, K, assert_stored, example, writer

from kdkernels import TeacherCache, TeacherCacheWriter
from kdkernels.api.cache import MissingExampleError, estimate_bytes, tokenizer_hash

VOCABULARY = {"a": 0, "b": 1, "c": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of ten examples in three shards."""
    with writer(tmp_path / "cache", tokenizer=VOCABULARY, teacher="big") as out:
        for number in range(10):
            out.add(*example(number))
    return tmp_path / "cache"


def test_every_example_comes_back(folder: Path) -> None:
    cache = TeacherCache(folder)
    assert len(cache) == 10 and cache.num_rows == 10 * TOKENS
    assert list(cache) == [f"example-{number}" for number in range(10)]
    assert len(list(folder.glob("*.safetensors"))) == 3
    for number in range(10):
        assert example(number)[0] in cache
        assert_stored(cache, number)
    assert "example-10" not in cache and 3 not in cache


def test_ids_may_be_numbers_and_keep_their_type(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.add(7, *example(0)[1:])
        out.add("7", *example(1)[1:])
        out.add(torch.tensor(8), *example(2)[1:])
    cache = TeacherCache(tmp_path)
    assert list(cache) == [7, "7", 8]
    assert cache.get(7, example(0)[1])[0][0, 0] == example(0)[2][0, 0]
    assert cache.get("7", example(1)[1].tolist())[0][0, 0] == example(1)[2][0, 0]


def test_batches_are_padded_or_packed(tmp_path: Path) -> None:
    (a, tokens_a, *rows_a), (b, tokens_b, *rows_b) = example(0), example(1)
    with writer(tmp_path) as out:
        out.add(a, tokens_a, *rows_a)
        out.add(b, tokens_b[:2], *(x[:2] for x in rows_b))
    cache = TeacherCache(tmp_path)
    asked = [(b, tokens_b[:2]), (a, tokens_a)]
    ids, logprobs = cache.rows(asked)
    assert ids.shape == logprobs.shape == (2, TOKENS, K)
    assert (ids[0, :2, 0] == rows_b[0][:2, 0]).all() and (ids[1, :, 0] == rows_a[0][:, 0]).all()
    assert (ids[0, 2:] == -1).all() and (logprobs[0, 2:] == -torch.inf).all()
    assert torch.equal(logprobs[1], cache.get(a, tokens_a)[1])
    assert cache.rows(asked, length=9)[0].shape == (2, 9, K)
    packed = cache.rows(asked, packed=True)
    assert torch.equal(packed[0], torch.cat([ids[0, :2], ids[1]]))
    assert torch.equal(packed[1], torch.cat([logprobs[0, :2], logprobs[1]]))
    assert cache.rows([])[0].shape == (0, 0, K)
    assert cache.rows([], packed=True)[0].shape == (0, K)
    with pytest.raises(ValueError, match="length must be at least 6, .* got 5"):
        cache.rows(asked, length=5)


def test_other_content_is_refused(folder: Path) -> None:
    cache = TeacherCache(folder)
    name, tokens, *_ = example(3)
    with pytest.raises(KeyError, match="^TeacherCache: example_id must be .*, got 'example-99'$"):
        cache.get("example-99", tokens)
    with pytest.raises(MissingExampleError):
        cache.rows([(name, tokens), ("example-99", tokens)])
    for other in (tokens[:-1], tokens + 1, tokens.flip(0)):
        with pytest.raises(ValueError, match="input_ids must be those the teacher read for exam"):
            cache.get(name, other)
    with (
        writer(folder, tokenizer=VOCABULARY, teacher="big") as out,
        pytest.raises(ValueError, match="input_ids must be those that were stored for example 'ex"),
    ):
        out.add(name, tokens + 1, *example(3)[2:])


def test_manifest_says_what_is_stored(folder: Path) -> None:
    stored = json.loads((folder / "manifest.json").read_text())
    assert stored == {
        "vocab_size": VOCAB, "k": K, "temperature": 1.0, "shift": 1, "bits": 8,
        "tokenizer_hash": tokenizer_hash(VOCABULARY), "teacher": "big", "format": 1,
    }  # fmt: skip
    fitting = {"tokenizer": VOCABULARY, "vocab_size": VOCAB, "temperature": 1, "k": K, "shift": 1}
    assert TeacherCache(folder, teacher="big", **fitting).manifest.teacher == "big"


@pytest.mark.parametrize("open_it", [TeacherCache, writer], ids=["reader", "writer"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vocab_size", 1024, f"vocab_size must be {VOCAB}, which is stored in .*, got 1024"),
        ("k", 4, f"k must be {K}, which is stored in .*, got 4"),
        ("temperature", 2.0, "temperature must be 1.0, which is stored in .*, got 2.0"),
        ("shift", 0, "shift must be 1, which is stored in .*, got 0"),
        ("teacher", "small", "teacher must be 'big', which is stored in .*, got 'small'"),
        ("tokenizer", {"a": 1, "b": 0}, "tokenizer_hash must be '[0-9a-f]+', .*, got '[0-9a-f]+'"),
    ],
)
def test_another_manifest_is_refused(
    folder: Path, open_it: Callable[..., Any], name: str, value: object, message: str
) -> None:
    own = {"tokenizer": VOCABULARY, "teacher": "big"} if open_it is writer else {}
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=f"^TeacherCache(Writer)?: {message}$"):
        open_it(folder, **{**own, name: value})
    assert sorted(folder.iterdir()) == before


def test_writer_adds_to_a_cache(folder: Path) -> None:
    with writer(folder, tokenizer=VOCABULARY, teacher="big") as out:
        assert out.done(*example(3)[:2]) and not out.done(*example(11)[:2])
        assert not out.done("example-3", example(4)[1])
        out.add(*example(3, seed=5))  # there already: nothing happens
        out.add(*example(11))
        out.add(*example(11, seed=5))
        assert not out.done(*example(11)[:2])  # not yet on the disk
        out.flush()
        assert out.done(*example(11)[:2])
    cache = TeacherCache(folder)
    assert len(cache) == 11 and cache.num_rows == 11 * TOKENS
    assert_stored(cache, 3)
    assert_stored(cache, 11)


def test_first_shard_in_sorted_order_wins(tmp_path: Path) -> None:
    for rank in (2, 1):
        with writer(tmp_path / str(rank), rank=rank) as out:
            out.add(*example(0, seed=rank))
    shutil.copy(next((tmp_path / "1").glob("rank*")), tmp_path / "2")
    assert_stored(TeacherCache(tmp_path / "2"), 0, seed=1)


def test_an_error_in_the_block_keeps_what_was_added(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writer(tmp_path) as out:
        out.add(*example(0))
        raise RuntimeError
    assert list(TeacherCache(tmp_path)) == ["example-0"]
    with pytest.raises(ValueError, match="the writer must be open, got a closed one"):
        out.add(*example(1))


def test_a_cache_goes_to_workers(folder: Path) -> None:
    cache = TeacherCache(folder)
    cache.get(*example(0)[:2])
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.get(*example(0)[:2])[1], cache.get(*example(0)[:2])[1])


def test_disk_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = estimate_bytes(10 * TOKENS, K, VOCAB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    message = "path must be on a disk with 0.00 GB free for 60 more rows, got 0.00 GB"
    with pytest.raises(ValueError, match=message):
        writer(tmp_path / "cache", rows=10 * TOKENS)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    with writer(tmp_path / "cache", rows=9 * TOKENS) as out:
        for number in range(4):
            out.add(*example(number))
    with writer(tmp_path / "cache", rows=13 * TOKENS):  # four examples of them are there
        pass


def test_estimate_is_what_is_written(tmp_path: Path) -> None:
    tokens = torch.arange(2000)
    logprobs, ids = torch.randn(2000, VOCAB).log_softmax(-1).topk(K)
    with writer(tmp_path, shard_rows=65536) as out:
        out.add("long", tokens, ids, logprobs)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert written == pytest.approx(estimate_bytes(2000, K, VOCAB), rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"example_id": 1.5}, "example_id must be a str or an int, got float"),
        ({"example_id": True}, "example_id must be a str or an int, got bool"),
        ({"input_ids": []}, r"input_ids must be \[tokens\], at least one, got shape \[0\]"),
        ({"input_ids": [[1, 2]]}, r"input_ids must be \[tokens\], at least one, got shape"),
        ({"input_ids": [0.5] * TOKENS}, "input_ids must be integers, got torch.float32"),
        ({"input_ids": [1, 2]}, r"ids must be \[tokens, k\], \[2, 8\] for example 'x', got shape"),
        ({"ids": torch.zeros(TOKENS, K).long()}, "ids must differ .* in row 0 of example 'x'"),
    ],
)
def test_add_refuses(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _, tokens, ids, logprobs = example(0)
    values = {"input_ids": tokens, "ids": ids, "logprobs": logprobs, "example_id": "x", **change}
    with (
        pytest.raises((ValueError, TypeError), match=f"^TeacherCacheWriter: {message}"),
        writer(tmp_path) as out,
    ):
        out.add(**values)
    assert len(TeacherCache(tmp_path)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"shift": 2}, "shift must be 0 or 1, got 2"),
        ({"rank": -1}, r"rank must be in \[0, 99999\], got -1"),
        ({"shard_rows": 0}, "shard_rows must be at least 1, got 0"),
        ({"teacher": 3}, "teacher must be a name, got int"),
        ({"k": 0}, "k must be in"),
    ],
)
def test_writer_refuses(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        writer(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_tokenizer_hash_is_of_tokens_and_ids() -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return dict(reversed(VOCABULARY.items()))

    assert tokenizer_hash(Tokenizer()) == tokenizer_hash(VOCABULARY)
    assert tokenizer_hash({**VOCABULARY, "c": 3}) != tokenizer_hash(VOCABULARY)
    assert tokenizer_hash({**VOCABULARY, "d": 3}) != tokenizer_hash(VOCABULARY)
    with pytest.raises(TypeError, match="tokenizer must have get_vocab.* got list"):
        tokenizer_hash(["a"])


def test_absent_safetensors_is_said_in_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"run `pip install 'kdkernels\[cache\]'`"):
        TeacherCache(folder)


def test_import_loads_neither_numpy_nor_safetensors() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import kdkernels.api.cache; "
        "print({'numpy', 'safetensors', 'rich', 'transformers'} & set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_examples_in_docstrings_run() -> None:
    for name in ("codec", "manifest", "reader", "writer"):
        module = importlib.import_module(f"kdkernels.api.cache.{name}")
        result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        assert result.failed == 0 and result.attempted, name
    assert TeacherCacheWriter.__module__ == "kdkernels.api.cache.writer"
