"""The files of a cache: rows of whole examples, an index of them, and checksums of both."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdkernels.api._files import TEMPORARY_PREFIX, write_file

# An example is found again by the type of its id as well: 7 is not "7".
ExampleId = str | int

NAME = re.compile(r"rank(\d{5})-(\d{6})\.safetensors")
INDEX = ("examples", "starts", "hashes")
HASH_BYTES = 16
METADATA = "kdkernels"


@dataclass(frozen=True)
class Shard:
    """The index of one file.

    Attributes:
        path: The file.
        examples: Ids, in the order of their rows.
        starts: First row of each example, and the number of rows at the end.
        hashes: Content hash of each example.
    """

    path: Path
    examples: list[ExampleId]
    starts: list[int]
    hashes: list[bytes]


def shard_name(rank: int, number: int) -> str:
    """File name of the ``number``-th shard of a process."""
    return f"rank{rank:05d}-{number:06d}.safetensors"


def temporary_prefix(rank: int) -> str:
    """Beginning of the names that a process gives to what it has not finished."""
    return f"{TEMPORARY_PREFIX}rank{rank:05d}-"


def shard_files(folder: Path) -> list[Path]:
    """Finished shards of all processes, sorted by name."""
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def write_shard(path: Path, fingerprint: str, shard: Shard, rows: Any) -> None:
    """Writes a shard whole or not at all.

    Args:
        path: The file to make.
        fingerprint: That of the manifest.
        shard: The index.
        rows: Packed rows, a NumPy array of uint8.
    """
    import numpy

    _, save_file = safetensors()
    tensors = {
        "examples": numpy.frombuffer(json.dumps(shard.examples).encode(), numpy.uint8),
        "starts": numpy.array(shard.starts, numpy.int64),
        "hashes": numpy.frombuffer(b"".join(shard.hashes), numpy.uint8).reshape(-1, HASH_BYTES),
        "rows": rows,
    }
    facts = {
        "manifest": fingerprint,
        "index_sha256": _sha256(*(tensors[name] for name in INDEX)),
        "rows_sha256": _sha256(rows),
    }
    # One entry: safetensors writes several in any order, and equal rows should make equal files.
    metadata = {METADATA: json.dumps(facts)}
    rank = int(path.name[4:9])
    write_file(
        path, lambda temporary: save_file(tensors, temporary, metadata), temporary_prefix(rank)
    )


def open_shard(path: Path) -> Any:
    """The file, mapped into memory: rows are read from the disk when they are asked for.

    Raises:
        ValueError: It was cut short, or is no safetensors file.
    """
    safe_open, _ = safetensors()
    from safetensors import SafetensorError

    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise damaged(path, f"one that cannot be read ({error})") from error


def read_shard(path: Path, fingerprint: str, row_bytes: int) -> Shard:
    """The index of a shard, checked; its rows are not read.

    Raises:
        ValueError: The file was cut short, its index is damaged, or it is of another cache.
    """
    file = open_shard(path)
    facts = _facts(file)
    if set(file.keys()) != {*INDEX, "rows"}:
        raise damaged(path, f"one that holds {sorted(file.keys())}")
    if facts.get("manifest") != fingerprint:
        raise damaged(path, "one of a cache with another manifest")
    examples, starts, hashes = (file.get_tensor(name) for name in INDEX)
    if _sha256(examples, starts, hashes) != facts.get("index_sha256"):
        raise damaged(path, "one with another checksum of its index")
    shard = Shard(
        path,
        json.loads(examples.tobytes()),
        starts.tolist(),
        [row.tobytes() for row in hashes],
    )
    shape = list(file.get_slice("rows").get_shape())
    if shape != [shard.starts[-1], row_bytes]:
        raise damaged(path, f"rows of shape {shape} instead of {[shard.starts[-1], row_bytes]}")
    return shard


def verify_shard(path: Path, fingerprint: str, row_bytes: int) -> Shard:
    """Like :func:`read_shard`, and reads all rows to compare their checksum."""
    shard = read_shard(path, fingerprint, row_bytes)
    file = open_shard(path)
    if _sha256(file.get_tensor("rows")) != _facts(file).get("rows_sha256"):
        raise damaged(path, "one with another checksum of its rows")
    return shard


def damaged(path: Path, fact: str) -> ValueError:
    """The error about a file that must not be read."""
    return ValueError(
        f"TeacherCache: {path} must be a whole shard of this cache, got {fact}; "
        "remove it and write its examples again"
    )


def safetensors() -> tuple[Any, Any]:
    """``safe_open`` and ``save_file``.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        from safetensors import safe_open
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(
            "TeacherCache: the packages safetensors and numpy must be installed, got no "
            f"{error.name}; run `pip install 'kdkernels[cache]'`"
        ) from error
    return safe_open, save_file


def _facts(file: Any) -> dict[str, Any]:
    """What a shard says about itself; nothing where that is damaged, which then fits nothing."""
    try:
        facts = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _sha256(*arrays: Any) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(array.data)
    return total.hexdigest()
