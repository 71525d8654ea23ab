"""The processes of a group in one: what each says is heard by all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops._shared.vocab_rows import Chunk, Shard


class Conversation:
    """What was said: by exchange and process."""

    def __init__(self) -> None:
        self.said: dict[tuple[int, int], Tensor] = {}

    def exchanges(self) -> int:
        """How many there are, once a process has spoken."""
        return len({exchange for exchange, _ in self.said})


class LocalShard(Shard):
    """Hears of the others what they said the last time; until then itself."""

    exchange = 0

    def gather(self, numbers: Tensor) -> Tensor:
        said, at = self.group.said, self.exchange
        said[at, self.rank] = numbers.clone()
        self.exchange += 1
        return torch.stack([said.get((at, other), numbers) for other in range(self.world)])


def chunks_of(
    sizes: list[int], backend: str, rows: int, make: Callable[[Shard], Chunk]
) -> list[Chunk]:
    """One chunk a process, after all have said what they had to say.

    ``make`` gives a process's chunk. It runs once more than there are exchanges: what is said in
    one depends on what was heard in those before.
    """
    conversation: Any = Conversation()
    runs, total = 0, sum(sizes)
    while runs <= conversation.exchanges():
        runs += 1
        chunks, start = [], 0
        for rank, size in enumerate(sizes):
            shard = LocalShard(
                conversation, rank, len(sizes), start, size, total, max(rows, 1), backend
            )
            chunks.append(make(shard))
            start += size
    return chunks
