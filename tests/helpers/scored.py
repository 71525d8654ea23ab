"""Prints by how many MB a process grows over ``instance_scores`` of N examples of width 768."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import kdkernels

BATCH, SEQ, WIDTH, VOCAB = 256, 8, 768, 2000


def resident() -> float:
    """MB of memory that the process has now."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


class Peak:
    """The most memory over a block, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.most, self._done = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, resident())


def loader(count: int) -> Iterator[dict[str, Tensor]]:
    """Made batch by batch, as a data set on disk is read."""
    torch.manual_seed(0)
    for begin in range(0, count, BATCH):
        ids = torch.randint(3, VOCAB, (min(BATCH, count - begin), SEQ))
        ids[:, 0], ids[:, -1] = 1, 2
        numbers = torch.arange(begin, begin + len(ids))
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "domains": numbers % 4,
            "labels": numbers // 4 % 2,
        }


def model() -> nn.Module:
    """One layer of BERT-base with a narrow feed-forward part: wide states in little time."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=64,
    )
    made: nn.Module = BertModel(config, add_pooling_layer=False)
    return made


def main(count: int) -> None:
    """Prints MB above the model, and the number of scores."""
    encoder = model()
    options = {"n_domains": 4, "n_classes": 2}
    before = resident()
    with Peak() as peak:
        scores = kdkernels.instance_scores(encoder, loader(count), special_ids=(0, 1, 2), **options)
    assert scores.isfinite().all()
    print(peak.most - before, len(scores))


if __name__ == "__main__":
    main(int(sys.argv[1]))
