"""A causal language model over a text, into a cache: what ``kdkernels cache build`` does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from kdkernels.api._files import locked
from kdkernels.api.cache.codec import estimate_bytes
from kdkernels.api.cache.writer import TeacherCacheWriter
from kdkernels.api.distill import lm_data, lm_models
from kdkernels.api.distill.errors import DistillError, require
from kdkernels.api.distill.progress import Bar, Display
from kdkernels.api.distill.runner import quiet_transformers
from kdkernels.api.functional import topk_logprobs


@dataclass(frozen=True)
class BuildOptions:
    """What ``kdkernels cache build`` was asked for.

    Attributes:
        model: Name or transformers folder of the teacher.
        data: Name or file of the text.
        out: Folder of the cache.
        k: Entries a row.
        temperature: The log-probabilities are of ``logits / temperature``.
        bits: Bits of a log-probability.
        split: Part of the data.
        seq_len: Tokens of an example.
        max_tokens: How much of the data; None for all.
        batch_size: Examples at a time.
        shard_rows: Rows of a shard.
        device: cpu, cuda or auto.
    """

    model: str
    data: str
    out: str
    k: int = 64
    temperature: float = 1.0
    bits: int = 8
    split: str = "train"
    seq_len: int = 256
    max_tokens: int | None = None
    batch_size: int = 4
    shard_rows: int = 65536
    device: str = "auto"


def build(options: BuildOptions, console: Console) -> None:
    """Writes what is missing of a cache; under torchrun, this process's share of it.

    Raises:
        DistillError: A model or a text that is not there.
        ValueError: An option out of range, or a cache of another kind in the folder.
    """
    rank, world = (int(os.environ.get(key) or value) for key, value in _TORCHRUN.items())
    # One process speaks for all.
    console = console if rank == 0 else Console(quiet=True)
    require(options.batch_size >= 1, "batch-size", "be at least 1", options.batch_size)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    device = _device(options.device)
    quiet_transformers()

    def notify(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    # Downloads are for one process; the other ones then find them.
    with locked(folder / ".loading") if world > 1 else nullcontext():
        model, tokenizer = lm_models.load_causal_lm(options.model, notify)
        blocks = lm_data.lm_blocks(
            options.data, tokenizer, options.split, options.seq_len, options.max_tokens, notify
        )
    model.to(device)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    rows = len(blocks) * options.seq_len
    size = estimate_bytes(rows, options.k, vocab_size, options.bits)
    notify(
        f"{len(blocks):,} examples, {rows:,} rows of {options.k} of {vocab_size:,} classes: "
        f"about {size / 1e6:,.1f} MB, {size / rows / options.k:.2f} bytes an entry"
    )
    with TeacherCacheWriter(
        folder,
        k=options.k,
        vocab_size=vocab_size,
        temperature=options.temperature,
        shift=1,
        bits=options.bits,
        tokenizer=tokenizer,
        teacher=Path(options.model).resolve().name,
        shard_rows=options.shard_rows,
        rows=rows,
    ) as writer:
        share = blocks[rank::world]
        missing = [block for block in share if not writer.done(*block)]
        if len(missing) < len(share):
            notify(f"{len(share) - len(missing):,} of {len(share):,} examples are there already")
        start = time.perf_counter()
        with _bar(console, len(missing)) as bar:
            _run(model, missing, options, device, writer, bar)
        seconds = time.perf_counter() - start
    rate = len(missing) * options.seq_len / max(seconds, 1e-9)
    notify(f"wrote {len(missing):,} examples to {folder}, {rate:,.0f} tokens a second")


_TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1}


@contextmanager
def _bar(console: Console, count: int) -> Iterator[Bar]:
    display = Display(console)
    with display.live(), display.unit("teacher") as bar:
        bar.total(count)
        yield bar


def _run(
    model: Any,
    blocks: list[lm_data.Block],
    options: BuildOptions,
    device: torch.device,
    writer: TeacherCacheWriter,
    bar: Bar,
) -> None:
    by_head = _by_head(model)
    for start in range(0, len(blocks), options.batch_size):
        batch = blocks[start : start + options.batch_size]
        tokens = torch.stack([block for _, block in batch])
        ids, logprobs = topk_rows(model, tokens.to(device), options.k, options.temperature, by_head)
        for (name, block), chosen, values in zip(batch, ids.cpu(), logprobs.cpu(), strict=True):
            writer.add(name, block, chosen, values)
        bar.advance(len(batch))


@torch.inference_mode()
def topk_rows(
    model: Any, tokens: Tensor, k: int, temperature: float, by_head: bool
) -> tuple[Tensor, Tensor]:
    """The k most probable next tokens after each token, and how probable they are.

    Args:
        model: A transformers causal language model.
        tokens: int64 ``[batch, tokens]``, without padding.
        k: How many.
        temperature: Their log-probabilities are of ``logits / temperature``.
        by_head: Whether the logits are the head of the last hidden states and nothing else: then
            they exist for a chunk of rows at a time only.

    Returns:
        ``ids`` int64 and ``logprobs`` float32, both ``[batch, tokens, k]``.
    """
    if by_head:
        head = lm_models.head_of(model)
        hidden = lm_models.last_hidden(model, tokens)
        top = topk_logprobs(hidden, k, weight=head.weight, bias=head.bias, temperature=temperature)
    else:
        logits = model(input_ids=tokens, use_cache=False).logits
        top = topk_logprobs(logits, k, temperature=temperature)
    return top.ids, top.logprobs


def _by_head(model: Any) -> bool:
    """False for models that cap or scale their logits."""
    try:
        lm_models.check_head(model, "model")
    except DistillError:
        return False
    return True


def _device(name: str) -> torch.device:
    require(name in ("auto", "cpu", "cuda"), "device", "be auto, cpu or cuda", repr(name))
    present = torch.cuda.is_available()
    require(present or name != "cuda", "device", "be one that is here", "cuda, but no CUDA device")
    if name == "cpu" or not present:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
