"""Timing side by side: fused loss against eager, student against teacher."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.train import Recipe, Runtime, objective, predict

REPEATS = 200
WARMUP = 20
INFERENCE_TEXTS = 512
INFERENCE_REPEATS = 5

Loss = Callable[[Tensor], Tensor]


def _eager_cross_entropy(labels: Tensor) -> Loss:
    """Cross-entropy as PyTorch has it."""
    return lambda logits: F.cross_entropy(logits, labels)


def _eager_divergence(teacher: Tensor, temperature: float) -> Loss:
    """The distillation loss as it is usually written in PyTorch."""

    def divergence(logits: Tensor) -> Tensor:
        student = F.log_softmax(logits / temperature, -1)
        target = F.log_softmax(teacher / temperature, -1)
        return temperature**2 * F.kl_div(student, target, log_target=True, reduction="batchmean")

    return divergence


def _seconds(loss: Loss, logits: Tensor) -> float:
    """Time of one forward and backward pass."""
    logits.grad = None
    if logits.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    loss(logits).backward()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def loss_times(
    batch_size: int, classes: int, temperature: float, runtime: Runtime
) -> dict[str, dict[str, float]]:
    """Times the loss at the shape of a training step.

    Args:
        batch_size: Rows of the logits.
        classes: Columns of the logits.
        temperature: Temperature of the distillation loss.
        runtime: Device.

    Returns:
        For ``labels`` (cross-entropy) and ``logits`` (divergence) the median time in microseconds
        of forward and backward, ``fused`` and ``eager``. The two alternate, so that whatever else
        the machine does hits both.

    Raises:
        DistillError: The two disagree; a wrong loss is not timed.
    """
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(batch_size, classes, generator=generator)
    teacher = torch.randn(batch_size, classes, generator=generator).to(runtime.device)
    labels = torch.randint(classes, (batch_size,), generator=generator).to(runtime.device)
    logits = student.to(runtime.device).requires_grad_()
    recipe = Recipe(epochs=1, lr=1e-4, batch_size=batch_size, seed=0, temperature=temperature)
    variants: dict[str, tuple[Loss, Loss]] = {
        "labels": (
            lambda rows: objective(rows, None, labels, recipe),
            _eager_cross_entropy(labels),
        ),
        "logits": (
            lambda rows: objective(rows, teacher, None, recipe),
            _eager_divergence(teacher, temperature),
        ),
    }
    # One thread: so few logits need no more, and waking the others (OMP_WAIT_POLICY=PASSIVE) made
    # eager code look nine times slower than it is.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _medians(name, *pair, logits) for name, pair in variants.items()}
    finally:
        torch.set_num_threads(threads)


def _medians(name: str, fused: Loss, eager: Loss, logits: Tensor) -> dict[str, float]:
    """Median microseconds of both, alternating."""
    if not torch.allclose(fused(logits), eager(logits), rtol=1e-4, atol=1e-5):
        raise DistillError(
            f"the fused loss on {name} must equal the eager one, "
            f"got {fused(logits).item():.6f} and {eager(logits).item():.6f}"
        )
    times: dict[str, list[float]] = {"fused": [], "eager": []}
    for repeat in range(WARMUP + REPEATS):
        for variant, loss in (("fused", fused), ("eager", eager)):
            seconds = _seconds(loss, logits)
            if repeat >= WARMUP:
                times[variant].append(seconds)
    return {variant: 1e6 * statistics.median(values) for variant, values in times.items()}


def inference_rates(
    models: Mapping[str, tuple[Any, Sequence[Sequence[int]], int]], runtime: Runtime
) -> dict[str, float]:
    """Times models in turns, so that whatever else the machine does hits all of them.

    Args:
        models: By name the model, tokenised texts, and the padding token.
        runtime: Device and precision.

    Returns:
        By name the median number of texts per second.
    """
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(INFERENCE_REPEATS):
        for name, (model, ids, pad) in models.items():
            sample = ids[:INFERENCE_TEXTS]
            started = time.perf_counter()
            predict(model, sample, runtime, pad)
            rates[name].append(len(sample) / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


def throughput() -> Sequence[Mapping[str, Any]]:
    """Times ``kd_loss`` against eager PyTorch and torch.compile at language-model vocabularies.

    Returns:
        One mapping per row, from column titles to values, in the order to show them.
    """
    from kdkernels.bench.run import throughput_table

    # Few samples; the demo is to end within ten minutes.
    return list(throughput_table(seconds=30.0))
