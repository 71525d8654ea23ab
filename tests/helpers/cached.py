"""Examples for teacher caches, and a process that writes them; run as a script by its tests."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import torch
from torch import Tensor

from kdkernels import TeacherCache, TeacherCacheWriter
from kdkernels.api import _files

K, VOCAB, TOKENS = 8, 1000, 6


def example(number: int, seed: int = 0) -> tuple[str, Tensor, Tensor, Tensor]:
    """Id, tokens, top-k ids and log-probabilities; always the same for one number."""
    generator = torch.Generator().manual_seed(1000 * seed + number)
    tokens = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(number))
    logits = 3 * torch.randn(TOKENS, VOCAB, generator=generator)
    logprobs, ids = logits.log_softmax(-1).topk(K)
    return f"example-{number}", tokens, ids, logprobs


def assert_stored(cache: TeacherCache, number: int, seed: int = 0) -> None:
    """The cache gives back an example: its ids, and log-probabilities within a step."""
    name, tokens, ids, logprobs = example(number, seed)
    got_ids, got = cache.get(name, tokens)
    order, got_order = ids.argsort(-1), got_ids.argsort(-1)  # close entries may change places
    assert torch.equal(got_ids.gather(-1, got_order), ids.gather(-1, order))
    assert (got.gather(-1, got_order) - logprobs.gather(-1, order)).abs().max() < 0.02
    assert (got.exp().sum(-1) - logprobs.exp().sum(-1)).abs().max() < 1e-5


def writer(folder: Path, **options: object) -> TeacherCacheWriter:
    """A writer whose shards hold four examples."""
    values = {"k": K, "vocab_size": VOCAB, "shard_rows": 4 * TOKENS, **options}
    return TeacherCacheWriter(folder, **values)  # type: ignore[arg-type]


def kill_in_shard(number: int) -> None:
    """Ends this process by SIGKILL when half of its ``number``-th shard is on the disk."""
    whole = _files.sync
    shards = iter(range(number + 1))

    def sync(path: Path) -> None:
        if path.suffix == ".safetensors" and next(shards) == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        whole(path)

    _files.sync = sync


def main() -> None:
    """Writes this process's share of the examples that are not there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=18)
    parser.add_argument("--kill-in-shard", type=int)
    parser.add_argument("--both", action="store_true", help="every process writes example 0 first")
    options = parser.parse_args()
    if options.kill_in_shard is not None:
        kill_in_shard(options.kill_in_shard)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with writer(options.folder) as out:
        if options.both:
            # No process may begin when the other has finished.
            torch.distributed.init_process_group("gloo")
            torch.distributed.barrier()
            out.add(*example(0, seed=rank))
        for number in range(rank, options.examples, world):
            found = example(number)
            if not out.done(*found[:2]):
                print("computes", number, flush=True)
                out.add(*found)
    if options.both:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
