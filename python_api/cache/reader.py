"""Reading a cache: examples by id, checked against their content."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kdkernels.api.cache.codec import TopKCodec
from kdkernels.api.cache.manifest import content_hash, read_manifest, resolve_tokenizer
from kdkernels.api.cache.shards import (
    ExampleId,
    Shard,
    damaged,
    open_shard,
    read_shard,
    shard_files,
)

NAME_OF_CLASS = "TeacherCache"


class MissingExampleError(KeyError):
    """An example is not in the cache."""

    def __str__(self) -> str:  # KeyError's own puts the sentence into quotes
        return str(self.args[0])


class TeacherCache:
    """The stored top-k of a teacher, as :class:`TeacherCacheWriter` wrote it.

    Only the index is held in memory (about 300 bytes an example); rows are read from the mapped
    files when they are asked for. It can be handed to the workers of a DataLoader.

    Args:
        path: folder of the cache.
        tokenizer: the tokenizer to be used (with ``get_vocab()``), its vocabulary, or its
            :func:`tokenizer_hash`. Like the following ones: ``None`` is not compared.
        vocab_size: number of classes of the student's logits.
        k: entries a row.
        temperature: temperature of the distillation loss.
        shift: 1: row t is the prediction of token t + 1. 0: row t scores token t.
        teacher: name of the teacher.

    Attributes:
        manifest: What the rows are, a :class:`~kdkernels.api.cache.Manifest`.
        num_rows: Rows of all shards.

    Raises:
        FileNotFoundError: the folder holds no cache.
        ValueError: a given value differs from the stored one, or a shard is damaged; the message
            names it.
        NotImplementedError: kdkernels was installed without its compiled code.
        ImportError: safetensors or NumPy is not installed (extra ``cache``).

    Example:
        >>> import tempfile, torch
        >>> from kdkernels import TeacherCache, TeacherCacheWriter
        >>> folder, tokens = tempfile.mkdtemp(), torch.tensor([5, 3])
        >>> ids, logprobs = torch.tensor([[1, 4], [0, 2]]), torch.tensor([[0.75, 0.25]] * 2).log()
        >>> with TeacherCacheWriter(folder, k=2, vocab_size=10, temperature=2.0) as writer:
        ...     writer.add(0, tokens, ids, logprobs)
        >>> cache = TeacherCache(folder, temperature=2.0)
        >>> 0 in cache, len(cache), list(cache)
        (True, 1, [0])
        >>> TeacherCache(folder, temperature=1.0)
        Traceback (most recent call last):
        ValueError: TeacherCache: temperature must be 2.0, which is stored in ..., got 1.0
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        vocab_size: int | None = None,
        k: int | None = None,
        temperature: float | None = None,
        shift: int | None = None,
        teacher: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(NAME_OF_CLASS, self.path)
        wanted = {
            "tokenizer_hash": None if tokenizer is None else resolve_tokenizer(tokenizer),
            "vocab_size": vocab_size,
            "k": k,
            "temperature": temperature,
            "shift": shift,
            "teacher": teacher,
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        self.manifest.require(NAME_OF_CLASS, self.path, given)
        form = self.manifest
        self._codec = TopKCodec(form.k, form.vocab_size, form.bits)
        self.num_rows = 0
        self._shards: list[Shard] = []
        self._index: dict[ExampleId, tuple[int, int]] = {}  # id -> shard, place in it
        for number, file in enumerate(shard_files(self.path)):
            shard = read_shard(file, form.fingerprint, self._codec.row_bytes)
            self._shards.append(shard)
            self.num_rows += shard.starts[-1]
            for place, example in enumerate(shard.examples):
                self._index.setdefault(example, (number, place))
        self._rows: dict[int, Any] = {}  # shard -> its mapped rows
        self._contents: dict[bytes, ExampleId] = {}  # content hash -> id; made when asked for

    def get(self, example_id: ExampleId, input_ids: Any) -> tuple[Tensor, Tensor]:
        """What the teacher said about one example.

        Args:
            example_id: its name in the data set.
            input_ids: ``[tokens]`` integers, as they were stored.

        Returns:
            ``ids`` ``[tokens, k]`` int64 and ``logprobs`` ``[tokens, k]`` float32, the largest
            first; entries that are not there have id -1 and ``-inf``.

        Raises:
            MissingExampleError: there is no such example (a ``KeyError``).
            ValueError: it was stored with other tokens, or its rows are damaged.
        """
        number, packed = self._packed(example_id, input_ids)
        return self._decode(packed, self._shards[number].path)

    def find(self, input_ids: Any) -> ExampleId:
        """The id of an example of these tokens; of several that are equal, any one.

        Args:
            input_ids: ``[tokens]`` integers.

        Raises:
            MissingExampleError: there is no such example (a ``KeyError``).
        """
        if len(self._contents) == 0:
            self._contents = {
                self._shards[number].hashes[place]: example
                for example, (number, place) in self._index.items()
            }
        content = content_hash(NAME_OF_CLASS, input_ids)
        if content not in self._contents:
            raise MissingExampleError(
                f"{NAME_OF_CLASS}: input_ids must be the tokens of one of the {len(self)} examples "
                f"of {self.path}, got {len(input_ids)} other tokens (another tokenizer, cut or "
                "data set?)"
            )
        return self._contents[content]

    def rows(
        self,
        examples: Sequence[tuple[ExampleId, Any]],
        *,
        length: int | None = None,
        packed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """What the teacher said about a batch of examples.

        Args:
            examples: pairs ``(example_id, input_ids)``.
            length: rows of each example in the result; ``None``: those of the longest one.
            packed: one example after the other, without padding.

        Returns:
            ``ids`` ``[examples, length, k]`` int64 and ``logprobs`` of that shape, float32; rows
            behind the end of an example have ids -1 and ``-inf``. With ``packed``: ``[tokens, k]``.

        Raises:
            MissingExampleError: an example is not there.
            ValueError: as for :meth:`get`, or an example longer than ``length``.
        """
        import numpy

        found = [self._packed(example, tokens)[1] for example, tokens in examples]
        if packed:
            if length is not None:
                raise ValueError(f"{NAME_OF_CLASS}: length must not be given with packed=True")
            empty = numpy.zeros((0, self._codec.row_bytes), numpy.uint8)
            return self._decode(numpy.concatenate([empty, *found]), self.path)
        longest = max((len(rows) for rows in found), default=0)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(
                f"{NAME_OF_CLASS}: length must be at least {longest}, which the longest example "
                f"has, got {length}"
            )
        batch = numpy.zeros((len(found), length, self._codec.row_bytes), numpy.uint8)
        for place, rows in enumerate(found):
            batch[place, : len(rows)] = rows
        flat = batch.reshape(len(found) * length, self._codec.row_bytes)
        ids, logprobs = self._decode(flat, self.path)
        shape = (len(found), length, self.manifest.k)
        return ids.view(shape), logprobs.view(shape)

    def __contains__(self, example_id: object) -> bool:
        return example_id in self._index

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[ExampleId]:
        return iter(self._index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": {}}  # a mapped file cannot be sent to another process

    def _packed(self, example_id: ExampleId, input_ids: Any) -> tuple[int, Any]:
        """Shard and packed rows of an example."""
        if example_id not in self._index:
            raise MissingExampleError(
                f"{NAME_OF_CLASS}: example_id must be one of the {len(self)} examples of "
                f"{self.path}, got {example_id!r}"
            )
        number, place = self._index[example_id]
        shard = self._shards[number]
        if content_hash(NAME_OF_CLASS, input_ids) != shard.hashes[place]:
            raise ValueError(
                f"{NAME_OF_CLASS}: input_ids must be those the teacher read for example "
                f"{example_id!r}, got other ones (another tokenizer, cut or data set?)"
            )
        if number not in self._rows:
            self._rows[number] = open_shard(shard.path).get_slice("rows")
        return number, self._rows[number][shard.starts[place] : shard.starts[place + 1]]

    def _decode(self, packed: Any, path: Path) -> tuple[Tensor, Tensor]:
        try:
            return self._codec.decode(packed)
        except ValueError as error:
            raise damaged(path, "one with damaged rows") from error
