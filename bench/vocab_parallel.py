"""What losses over shards of the vocabulary cost beside those of whole rows.

    python bench/vocab_parallel.py [--threads 1] [--runs 7]

In a group of one process nothing is exchanged: what differs from ``kd_loss`` and ``linear_kd_loss``
is that logits are read twice. Forward and backward of forward KL at T = 2 and cross-entropy,
alternating in one run; medians, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

import kdkernels

CASES = ((512, 32000), (128, 128256))
WIDTH = 768


def seconds(call: Callable[[], Tensor]) -> float:
    """Of a forward and a backward pass."""
    begin = time.perf_counter()
    call().backward()
    return time.perf_counter() - begin


def pairs(rows: int, vocab: int) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """By name: a loss over shards, and the fused one."""
    p, labels = kdkernels.parallel, torch.randint(vocab, (rows,))
    logits = torch.randn(rows, vocab, requires_grad=True), torch.randn(rows, vocab)
    hidden, heads = torch.randn(2, rows, WIDTH), 0.05 * torch.randn(2, vocab, WIDTH)
    student = hidden[0].requires_grad_(), heads[0].requires_grad_()
    given = *student, hidden[1].detach(), heads[1].detach(), labels
    return {
        "logits": (
            lambda: p.vocab_parallel_kd_loss(*logits, labels, temperature=2.0),
            lambda: kdkernels.kd_loss(*logits, labels, temperature=2.0),
        ),
        "heads": (
            lambda: p.vocab_parallel_linear_kd_loss(*given, temperature=2.0),
            lambda: kdkernels.linear_kd_loss(*given, temperature=2.0),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.NamedTemporaryFile() as store:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.FileStore(store.name, 1), rank=0, world_size=1
        )
    for rows, vocab in CASES:
        for name, (sharded, fused) in pairs(rows, vocab).items():
            seconds(sharded), seconds(fused)
            times = [(seconds(sharded), seconds(fused)) for _ in range(args.runs)]
            ours, theirs = (statistics.median(x) for x in zip(*times, strict=True))
            ratio = statistics.median(a / b for a, b in times)
            print(f"{name} {rows} x {vocab}: {ours:.3f} s, fused {theirs:.3f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
