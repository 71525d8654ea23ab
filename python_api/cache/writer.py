"""Writing a cache: examples collect in memory and go to disk a shard at a time."""

from __future__ import annotations

import dataclasses
import operator
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from kdkernels.api._files import TEMPORARY_PREFIX, locked, try_lock, write_file
from kdkernels.api.cache.codec import TopKCodec, estimate_bytes
from kdkernels.api.cache.manifest import (
    FILE,
    Manifest,
    check,
    content_hash,
    read_manifest,
    resolve_tokenizer,
)
from kdkernels.api.cache.shards import (
    NAME,
    ExampleId,
    Shard,
    read_shard,
    shard_files,
    shard_name,
    write_shard,
)

NAME_OF_CLASS = "TeacherCacheWriter"
LOCK = ".lock"
OF_MANIFEST = f"{TEMPORARY_PREFIX}manifest-"
LEFTOVER = re.compile(re.escape(TEMPORARY_PREFIX) + r"(?:manifest|rank(\d{5}))-")


class TeacherCacheWriter:
    """Stores a teacher's top-k, example by example; an interrupted writer goes on where it was.

    A shard is written under a temporary name and renamed when it is on the disk, so a kill loses no
    more than the examples since the last one. Opened on a folder that holds a cache, the writer
    adds to it: :meth:`done` says what need not be computed again. Several processes may write one
    cache; each makes files with its own rank in their names. Of an example that two of them wrote
    the first, by name of the shard, is the one that is read.

    Args:
        path: folder of the cache; made if need be.
        k: entries a row.
        vocab_size: number of classes of the teacher's logits.
        temperature: the log-probabilities are of ``logits / temperature``.
        shift: 1: row t is the prediction of token t + 1, as causal language models give it. 0: row
            t scores token t.
        bits: bits of a log-probability, in [4, 16]; see :class:`TopKCodec`.
        tokenizer: the tokenizer (with ``get_vocab()``), its vocabulary, or its
            :func:`tokenizer_hash`; ``None``: not recorded.
        teacher: name of the teacher; ``None``: not recorded.
        rank: number of this process; ``None``: the environment's ``RANK``, else 0.
        shard_rows: rows after which a shard is written.
        rows: rows the cache will have in the end, over all processes; with it the free disk
            space is checked before anything is written.

    Raises:
        ValueError: the folder holds a cache with another manifest, or a damaged shard; a value out
            of range; too little disk space; another process is the writer of this rank.
        NotImplementedError: kdkernels was installed without its compiled code.
        ImportError: safetensors or NumPy is not installed (extra ``cache``).

    Example:
        >>> import tempfile, torch
        >>> from kdkernels import TeacherCache, TeacherCacheWriter
        >>> folder = tempfile.mkdtemp()
        >>> tokens, teacher_logits = torch.tensor([5, 3, 8]), torch.randn(3, 100)
        >>> logprobs, ids = teacher_logits.log_softmax(-1).topk(4)
        >>> with TeacherCacheWriter(folder, k=4, vocab_size=100) as writer:
        ...     writer.add("first", tokens, ids, logprobs)
        >>> cache = TeacherCache(folder, vocab_size=100, temperature=1.0)
        >>> cached_ids, cached_logprobs = cache.get("first", tokens)
        >>> bool((cached_ids == ids).all()), cached_logprobs.shape
        (True, torch.Size([3, 4]))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        k: int,
        vocab_size: int,
        temperature: float = 1.0,
        shift: int = 1,
        bits: int = 8,
        tokenizer: Any = None,
        teacher: str | None = None,
        rank: int | None = None,
        shard_rows: int = 65536,
        rows: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._codec = TopKCodec(k, vocab_size, bits)
        hashed = None if tokenizer is None else resolve_tokenizer(tokenizer)
        self.manifest = Manifest(vocab_size, k, temperature, shift, bits, hashed, teacher)
        check(NAME_OF_CLASS, self.manifest)
        self.manifest = dataclasses.replace(self.manifest, temperature=float(temperature))
        self.rank = _rank(rank)
        if shard_rows < 1:
            raise ValueError(f"{NAME_OF_CLASS}: shard_rows must be at least 1, got {shard_rows}")
        self._shard_rows = shard_rows
        self._stored: dict[ExampleId, bytes] = {}
        self._waiting: dict[ExampleId, bytes] = {}
        self._packed: list[Any] = []
        self._rows = 0
        self._lock: IO[str] | None = None
        self._number = 0
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            # One process after the other, or two could make the manifest or clean up at once.
            with locked(self.path / LOCK):
                self._open(rows)
        except BaseException:
            self._unlock()
            raise

    def add(self, example_id: ExampleId, input_ids: Any, ids: Any, logprobs: Any) -> None:
        """Stores one example; one that is there already is left as it is.

        Args:
            example_id: its name in the data set, str or int.
            input_ids: ``[tokens]`` integers: what the teacher read.
            ids: ``[tokens, k]`` integers, -1 where there is no entry.
            logprobs: ``[tokens, k]`` floating-point, ``-inf`` where there is no entry.

        Raises:
            ValueError: shapes or values that do not fit, or other tokens than those that were
                stored for this id.
        """
        if self._lock is None:
            raise ValueError(f"{NAME_OF_CLASS}: the writer must be open, got a closed one")
        example_id = _plain(example_id)
        digest = content_hash(NAME_OF_CLASS, input_ids)
        known = self._stored.get(example_id) or self._waiting.get(example_id)
        if known is not None:
            if known != digest:
                raise ValueError(
                    f"{NAME_OF_CLASS}: input_ids must be those that were stored for example "
                    f"{example_id!r}, got other ones"
                )
            return
        wanted = [len(input_ids), self.manifest.k]
        for name, value in (("ids", ids), ("logprobs", logprobs)):
            shape = list(torch.as_tensor(value).shape)
            if shape != wanted:
                raise ValueError(
                    f"{NAME_OF_CLASS}: {name} must be [tokens, k], {wanted} for example "
                    f"{example_id!r}, got shape {shape}"
                )
        try:
            packed = self._codec.encode(ids, logprobs)
        except ValueError as error:
            message = str(error).replace("TopKCodec", NAME_OF_CLASS)
            raise ValueError(f"{message} of example {example_id!r}") from error
        self._waiting[example_id] = digest
        self._packed.append(packed)
        self._rows += len(packed)
        if self._rows >= self._shard_rows:
            self.flush()

    def done(self, example_id: ExampleId, input_ids: Any) -> bool:
        """Whether a finished shard of any process held this example when the writer was opened,
        or this writer has written it since.

        Args:
            example_id: its name in the data set.
            input_ids: ``[tokens]`` integers.
        """
        stored = self._stored.get(example_id)
        return stored is not None and stored == content_hash(NAME_OF_CLASS, input_ids)

    def flush(self) -> None:
        """Writes the examples that wait as a shard, however few they are."""
        if not self._waiting:
            return
        import numpy

        starts = [0]
        for packed in self._packed:
            starts.append(starts[-1] + len(packed))
        path = self.path / shard_name(self.rank, self._number)
        index = Shard(path, list(self._waiting), starts, list(self._waiting.values()))
        write_shard(path, self.manifest.fingerprint, index, numpy.concatenate(self._packed))
        self._number += 1
        self._stored |= self._waiting
        self._waiting, self._packed, self._rows = {}, [], 0

    def close(self) -> None:
        """Writes what waits and gives the rank free."""
        try:
            self.flush()
        finally:
            self._unlock()

    def __enter__(self) -> TeacherCacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Examples enter whole, so what waits is good whatever happened.
        self.close()

    def _open(self, rows: int | None) -> None:
        self._lock = try_lock(_rank_lock(self.path, self.rank))
        if self._lock is None:
            raise ValueError(
                f"{NAME_OF_CLASS}: rank must be of one process at a time, got {self.rank}, which "
                f"another one has in {self.path}"
            )
        self._clean()
        exists = (self.path / FILE).exists()
        if exists:
            found = read_manifest(NAME_OF_CLASS, self.path)
            found.require(NAME_OF_CLASS, self.path, dataclasses.asdict(self.manifest))
        stored = 0
        for path in shard_files(self.path):
            shard = read_shard(path, self.manifest.fingerprint, self._codec.row_bytes)
            stored += shard.starts[-1]
            for example, digest in zip(shard.examples, shard.hashes, strict=True):
                self._stored.setdefault(example, digest)
        if rows is not None:
            self._check_space(rows - stored)
        if not exists:
            text = self.manifest.to_json()
            write_file(self.path / FILE, lambda path: path.write_text(text), OF_MANIFEST)
        own = [match for path in shard_files(self.path) if (match := NAME.fullmatch(path.name))]
        numbers = [int(match[2]) for match in own if int(match[1]) == self.rank]
        self._number = max(numbers, default=-1) + 1

    def _check_space(self, rows: int) -> None:
        form = self.manifest
        needed = estimate_bytes(max(0, rows), form.k, form.vocab_size, form.bits)
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise ValueError(
                f"{NAME_OF_CLASS}: path must be on a disk with {needed / 1e9:.2f} GB free for "
                f"{rows:,} more rows, got {free / 1e9:.2f} GB for {self.path}"
            )

    def _clean(self) -> None:
        """Removes what dead writers had not finished."""
        for leftover in self.path.iterdir():
            match = LEFTOVER.match(leftover.name)
            if match is None:
                continue
            # Whoever makes a manifest holds the lock of the folder, as this process does now.
            if match[1] is None or int(match[1]) == self.rank:
                leftover.unlink()
                continue
            lock = try_lock(_rank_lock(self.path, int(match[1])))
            if lock is not None:
                leftover.unlink()
                lock.close()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _rank(rank: int | None) -> int:
    given = os.environ.get("RANK", "0") if rank is None else rank
    try:
        number = int(given)
    except ValueError:
        number = -1
    if not 0 <= number <= 99999:
        raise ValueError(f"{NAME_OF_CLASS}: rank must be in [0, 99999], got {given!r}")
    return number


def _plain(example_id: Any) -> ExampleId:
    """The id as Python's own str or int: NumPy's would not go into the index."""
    if isinstance(example_id, str):
        return str(example_id)
    if isinstance(example_id, bool) or not hasattr(example_id, "__index__"):
        raise TypeError(
            f"{NAME_OF_CLASS}: example_id must be a str or an int, got {type(example_id).__name__}"
        )
    return operator.index(example_id)


def _rank_lock(folder: Path, rank: int) -> Path:
    return folder / f"{LOCK}-rank{rank:05d}"
