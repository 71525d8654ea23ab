"""Memory and speed of the distillation losses: from hidden states, and eager on full logits."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.lm_train import head_precision
from kdkernels.api.distill.train import Runtime

REPEATS = 3
# Fewer rows than a GPU's step: eager code has one tensor of 100 MB a model at 512 x 49,152.
ROWS = 512
LIVE, CACHED = "live teacher", "cached top-k"
HIDDEN, EAGER = "from hidden states", "eager, full logits"
# Relative difference of the losses of the two routes that is more than rounding.
TOLERANCE = {True: 2e-2, False: 1e-3}

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """What the losses are measured on.

    Attributes:
        rows: Tokens.
        vocab: Classes.
        width: Width of the hidden states of both models.
        top_k: Classes that a cached teacher names.
        temperature: Temperature of the divergence.
        alpha: Weight of the divergence.
        train_head: Whether the head gets a gradient.
    """

    rows: int
    vocab: int
    width: int
    top_k: int
    temperature: float
    alpha: float
    train_head: bool


def routes(shape: Shape, runtime: Runtime) -> list[dict[str, Any]]:
    """Measures one forward and backward pass of every loss, heads included, models excluded.

    Returns:
        By loss and route the peak memory above the inputs in MB (None where the system does not
        tell) and the tokens per second, median of turns.

    Raises:
        DistillError: The routes disagree; a wrong loss is not timed.
    """
    memory = _peaks(shape, runtime)
    losses = make_losses(shape, runtime)
    _agree(losses, runtime)
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in losses}
    for _ in range(REPEATS):
        for name, loss in losses.items():
            seconds[name].append(_seconds(loss, runtime))
    found = []
    for name in losses:
        bytes_above = memory[name]
        found.append(
            {
                "loss": name[0],
                "route": name[1],
                "rows": shape.rows,
                "peak_mb": None if bytes_above is None else bytes_above / 1e6,
                "tokens_per_second": shape.rows / statistics.median(seconds[name]),
            }
        )
    return found


def _names() -> list[tuple[str, str]]:
    return [(loss, route) for loss in (LIVE, CACHED) for route in (HIDDEN, EAGER)]


def make_losses(shape: Shape, runtime: Runtime) -> Mapping[tuple[str, str], Loss]:
    """The losses on random hidden states and heads, by loss and route."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(runtime.device)

    hidden = normal(shape.rows, shape.width).requires_grad_()
    head = normal(shape.vocab, shape.width, scale=shape.width**-0.5)
    head.requires_grad_(shape.train_head)
    teacher_hidden = normal(shape.rows, shape.width)
    teacher_head = normal(shape.vocab, shape.width, scale=shape.width**-0.5)
    labels = torch.randint(shape.vocab, (shape.rows,), generator=generator).to(runtime.device)
    weights: dict[str, Any] = {
        "temperature": shape.temperature,
        "ce_weight": 1 - shape.alpha,
        "kd_weight": shape.alpha,
    }
    top = kdkernels.topk_logprobs(
        teacher_hidden, shape.top_k, weight=teacher_head, temperature=shape.temperature
    )

    def live() -> Tensor:
        loss: Tensor = kdkernels.linear_kd_loss(
            hidden, head, teacher_hidden, teacher_head, labels, **weights
        )
        return loss

    def cached() -> Tensor:
        loss: Tensor = kdkernels.linear_topk_kd_loss(
            hidden, head, top.ids, top.logprobs, labels, **weights
        )
        return loss

    def eager_live() -> Tensor:
        student = F.linear(hidden, head).float()
        teacher = F.linear(teacher_hidden, teacher_head).float()
        log_student = F.log_softmax(student / shape.temperature, -1)
        log_teacher = F.log_softmax(teacher / shape.temperature, -1)
        kd = F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
        return _weighted(kd, student)

    def eager_cached() -> Tensor:
        student = F.linear(hidden, head).float()
        logs = F.log_softmax(student / shape.temperature, -1).gather(-1, top.ids)
        kd = (top.logprobs.exp() * (top.logprobs - logs)).sum(-1)
        rest_teacher = (1 - top.logprobs.exp().sum(-1)).clamp(min=1e-7)
        rest_student = (1 - logs.exp().sum(-1)).clamp(min=1e-7)
        kd = kd + rest_teacher * (rest_teacher.log() - rest_student.log())
        return _weighted(kd.mean(), student)

    def _weighted(kd: Tensor, student: Tensor) -> Tensor:
        loss = shape.alpha * shape.temperature**2 * kd
        if shape.alpha < 1:
            loss = loss + (1 - shape.alpha) * F.cross_entropy(student, labels)
        return loss

    found = dict(zip(_names(), (live, eager_live, cached, eager_cached), strict=True))
    return {name: _in_precision(loss, runtime) for name, loss in found.items()}


def _in_precision(loss: Loss, runtime: Runtime) -> Loss:
    def call() -> Tensor:
        with head_precision(runtime):
            return loss()

    return call


def _agree(losses: Mapping[tuple[str, str], Loss], runtime: Runtime) -> None:
    """Raises unless the two routes of each loss give the same."""
    for kind in (LIVE, CACHED):
        ours, eager = (losses[kind, route]().item() for route in (HIDDEN, EAGER))
        if abs(ours - eager) > TOLERANCE[runtime.device.type != "cpu"] * abs(eager):
            raise DistillError(
                f"the loss with a {kind} must be the same from hidden states as from full logits, "
                f"got {ours:.6f} and {eager:.6f}"
            )


def _seconds(loss: Loss, runtime: Runtime) -> float:
    """Time of one forward and backward pass."""
    gc.collect()
    _synchronize(runtime)
    started = time.perf_counter()
    loss().backward()
    _synchronize(runtime)
    return time.perf_counter() - started


def _synchronize(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()


def _peaks(shape: Shape, runtime: Runtime) -> dict[tuple[str, str], int | None]:
    """Bytes above the inputs by loss and route; None where the system does not tell."""
    names = _names()
    if runtime.device.type == "cuda":
        return {name: _peak_here((shape, runtime, name)) for name in names}
    request = {"shape": dataclasses.asdict(shape), "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "kdkernels.api.distill.lm_measure", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return dict.fromkeys(names)
    return dict(zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True))


def _peak_here(given: tuple[Shape, Runtime, tuple[str, str]]) -> int:
    from kdkernels.bench.memory import peak

    shape, runtime, name = given
    # Libraries and code are loaded on a small input.
    small = dataclasses.replace(shape, rows=2, vocab=64, top_k=2)
    make_losses(small, runtime)[name]().backward()
    loss = make_losses(shape, runtime)[name]
    gc.collect()
    return peak(lambda: loss().backward(), runtime.device.type)


def _main(request: dict[str, Any]) -> None:
    """Prints the peak of each loss, each in a process where nothing was allocated before.

    They are forked from this one, which has imported everything and computed nothing: threads of
    a thread pool would not survive a fork.
    """
    shape, runtime = Shape(**request["shape"]), Runtime(torch.device("cpu"), bf16=False)
    context = multiprocessing.get_context("fork")
    with context.Pool(
        1, torch.set_num_threads, (request["threads"],), maxtasksperchild=1
    ) as workers:
        tasks = [(shape, runtime, name) for name in _names()]
        print(json.dumps(workers.map(_peak_here, tasks, chunksize=1)))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
