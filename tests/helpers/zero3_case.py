"""A process of a training whose teacher DeepSpeed's ZeRO-3 has divided; see ``tests/hf``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch

from helpers.trained import close, distilled, lm, losses, weights

SETTINGS = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def main(folder: Path) -> None:
    """Two trainings that differ in nothing but where the teacher's weights lie."""
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    whole = distilled(folder / f"whole{rank}", lm(), lm(3, 32, seed=5))
    whole.train()
    engine, *_ = deepspeed.initialize(model=lm(3, 32, seed=5), config=SETTINGS)
    head = engine.module.get_output_embeddings().weight
    assert hasattr(head, "ds_id") and head.numel() == 0
    divided = distilled(folder / f"divided{rank}", lm(), engine.module)
    divided.train()
    assert losses(divided) == losses(whole)
    close(weights(divided.model), weights(whole.model), tolerance=1e-6)
    assert head.numel() == 0  # let go of after each step
    torch.distributed.barrier()
    os._exit(0)  # gloo's teardown may hang on a busy machine


if __name__ == "__main__":
    main(Path(sys.argv[1]))
