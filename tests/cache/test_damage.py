"""A damaged file is named in one sentence, and never read as if it were whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.cached import TOKENS, example, writer
from typer.testing import CliRunner

from kdkernels import TeacherCache
from kdkernels.api.cli import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards."""
    with writer(tmp_path / "cache") as out:
        for number in range(8):
            out.add(*example(number))
    return tmp_path / "cache"


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_shard_is_refused_when_the_cache_is_opened(folder: Path, left: int) -> None:
    path = second_shard(folder)
    path.write_bytes(path.read_bytes()[:left])
    pattern = (
        f"TeacherCache: .*{path.name} must be a whole shard of this cache, got one that cannot"
    )
    with pytest.raises(ValueError, match=pattern):
        TeacherCache(folder)
    with pytest.raises(ValueError, match=pattern):
        writer(folder)


def test_every_flipped_byte_is_found(folder: Path) -> None:
    """At opening or by ``cache verify``, wherever the byte is."""
    path = second_shard(folder)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        flip(path, place)
        result = CliRunner().invoke(app, ["cache", "verify", str(folder)])
        assert result.exit_code == 1, place
        assert path.name in result.stderr
        path.write_bytes(whole)
    assert CliRunner().invoke(app, ["cache", "verify", str(folder)]).exit_code == 0


def test_damaged_rows_are_found_by_verify(folder: Path) -> None:
    """Opening does not read rows, so that it takes no longer for a large cache."""
    path = second_shard(folder)
    flip(path, path.stat().st_size - 20)  # rows come last in the file
    assert len(TeacherCache(folder)) == 8
    result = CliRunner().invoke(app, ["cache", "verify", str(folder)])
    assert result.exit_code == 1
    assert "got one with another checksum of its rows" in result.stderr
    assert "1 of 2 shards are damaged" in result.stderr


def test_shard_of_another_cache_is_refused(folder: Path, tmp_path: Path) -> None:
    with writer(tmp_path / "other", temperature=2.0, rank=5) as out:
        out.add(*example(30))
    shutil.copy(next((tmp_path / "other").glob("rank*")), folder)
    with pytest.raises(ValueError, match="rank00005-.* got one of a cache with another manifest"):
        TeacherCache(folder)


def test_other_files_are_left_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "other.safetensors").write_text("not a shard")
    (folder / ".tmp-of-someone-else").write_text("mine")
    writer(folder).close()
    assert len(TeacherCache(folder)) == 8
    assert (folder / ".tmp-of-someone-else").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json must be JSON, got"),
        ("[]", "manifest.json must have format 1, got None"),
        ('{"format": 2}', "manifest.json must have format 1, got 2"),
        ('{"format": 1, "k": 3}', "manifest.json must hold .*'bits'.*, got .*'k'"),
    ],
)
def test_damaged_manifest(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=f"TeacherCache: .*{message}"):
        TeacherCache(folder)


def test_manifest_with_a_value_of_another_type(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, "k": "8"}))
    with pytest.raises(ValueError, match="manifest.json must hold a valid k, got '8'"):
        TeacherCache(folder)


def test_no_cache(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="path must be a teacher cache, got .* without"):
            TeacherCache(folder)


def test_removing_a_damaged_shard_repairs_the_cache(folder: Path) -> None:
    second_shard(folder).unlink()
    with writer(folder) as out:
        missing = [n for n in range(8) if not out.done(*example(n)[:2])]
        assert missing == [4, 5, 6, 7]
        for number in missing:
            out.add(*example(number))
    cache = TeacherCache(folder)
    assert len(cache) == 8 and cache.num_rows == 8 * TOKENS
