"""What a label regulariser adds to a whole training step of the smallest real student, BERT-Tiny.

    python bench/regularisers.py [--threads 1] [--steps 300]

Steps of all methods alternate on one model and the same batches, so that whatever else the machine
does meets all of them alike; medians of steps, and of the ratio to plain ``F.cross_entropy`` on the
same batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels.api.distill import train
from kdkernels.api.distill.runner import choose_runtime, quiet_transformers
from kdkernels.api.methods.label_regularisation import METHODS, LabelRegulariser
from kdkernels.api.study.config import make_config
from kdkernels.api.study.grid import trials_of
from kdkernels.api.study.students import new_model
from kdkernels.api.study.train import Trainer

STUDY: dict[str, Any] = {
    "name": "loss",
    "tasks": {"multiemo": {"labels": 2000, "dev": 100, "test": 100, "max_length": 64}},
    "students": {"bert-tiny": {"model": "bert-tiny"}},
    "methods": ["ft"],
    "lr": 4e-4,
}
PLAIN = "F.cross_entropy"
WARM_UP = 20
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def losses() -> dict[str, Loss]:
    """Every method at its defaults, and torch's cross-entropy."""

    def called(regulariser: LabelRegulariser) -> Loss:
        if regulariser.needs_teacher:
            return regulariser
        return lambda logits, labels, teacher: regulariser(logits, labels)

    plain: dict[str, Loss] = {
        PLAIN: lambda logits, labels, teacher: F.cross_entropy(logits, labels)
    }
    return plain | {method: called(LabelRegulariser(method)) for method in METHODS}


def main() -> None:
    """Times the steps and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300, help="timed steps of each method")
    options = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(options.threads)
    config = make_config(STUDY)
    runtime = choose_runtime(config)
    trial = trials_of(config)[0]
    task: Any = Trainer(Path(), runtime, False, print).task(trial)
    model = new_model(task, "pretrained", 0, False, False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = train.make_optimizer(weights, 1e-6)
    teacher = torch.randn(len(task._train.ids), len(task.corpus.label_names))
    steps = task.schedule(1 + (options.steps + WARM_UP) // 60, 32, 0)
    found: dict[str, list[float]] = {name: [] for name in losses()}
    ordered = list(losses().items())
    for number, (texts, rows) in enumerate(steps[: options.steps + WARM_UP]):
        for name, loss in ordered[number % len(ordered) :] + ordered[: number % len(ordered)]:
            started = time.perf_counter()
            logits, _, labels = train.batch_outputs(
                model, texts, rows, runtime, task.tokenizer.pad_token_id
            )
            assert labels is not None
            loss(logits, labels, teacher[rows]).backward()
            torch.nn.utils.clip_grad_norm_(weights, train.MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if number >= WARM_UP:
                found[name].append(time.perf_counter() - started)
    plain = found[PLAIN]
    precision = "bf16" if runtime.bf16 else "fp32"
    print(f"{options.steps} steps of each, {options.threads} threads, {precision}")
    for name, seconds in found.items():
        ratio = statistics.median(s / p for s, p in zip(seconds, plain, strict=True))
        print(f"{name:<20} {1e3 * statistics.median(seconds):7.2f} ms a step  {ratio:6.3f}")


if __name__ == "__main__":
    main()
