"""One training of a run of causal distillation, with interchanges or without."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kdkernels.api.distill import arm_train, train
from kdkernels.api.distill.arm_train import Listener
from kdkernels.api.distill.diito_config import WEIGHTS, DiitoConfig
from kdkernels.api.distill.swa_train import Trained
from kdkernels.api.distill.task import PairedTask, Task
from kdkernels.api.distill.train import Recipe
from kdkernels.api.methods.diito import DEFAULTS, DIITO

# Batches by which the pace of two arms is compared; they take turns.
PACE_STEPS = 12


def fit_teacher(task: Task[Any], config: DiitoConfig, seed: int, on_event: Listener) -> Trained:
    """Trains the whole model on the task itself."""
    model = task.new_model(seed)
    steps = task.schedule(config.teacher_epochs, config.batch_size, seed)
    loss = partial(task.loss, model)
    return arm_train.fit(
        task, model, steps, loss, _recipe(config, config.teacher_lr, seed), on_event
    )


def fit_student(
    task: PairedTask[Any],
    model: Any,
    teacher: Any,
    config: DiitoConfig,
    interchanges: bool,
    seed: int,
    on_event: Listener,
    longer: float = 1.0,
) -> Trained:
    """Trains a student of a teacher in place.

    Args:
        task: What to learn from.
        model: The student before training.
        teacher: It is left as it is.
        config: Weights, rates and what is exchanged.
        interchanges: Whether this is DIITO, or its baseline: the terms that need no interchange.
        seed: Of the order and of what is exchanged.
        on_event: As in :func:`~kdkernels.api.distill.train.fit`.
        longer: How many times as many steps as the configuration's epochs have.
    """
    loss = step_loss(task, model, teacher, config, interchanges, seed, return_parts=True)
    epochs = math.ceil(config.epochs * longer)
    steps = task.schedule(epochs, config.batch_size, seed)
    steps = steps[: round(longer * len(steps) * config.epochs / epochs)]
    return arm_train.fit(task, model, steps, loss, _recipe(config, config.lr, seed), on_event)


def step_loss(
    task: PairedTask[Any],
    model: Any,
    teacher: Any,
    config: DiitoConfig,
    interchanges: bool,
    seed: int,
    return_parts: bool = False,
) -> Callable[[Any], Any]:
    """The loss of a step, with a gradient; its parts where they are wanted."""
    runtime = task.options.runtime
    weights: dict[str, Any] = weights_of(config, interchanges)
    diito = DIITO(
        model,
        teacher,
        config.aligned(teacher.config.num_hidden_layers),
        form="masked_lm" if config.masked_lm else "task",
        temperature=config.temperature,
        share=config.share,
        max_length=config.max_span,
        positions=config.positions,
        index_mode=config.index_mode,
        seed=seed,
        **weights,
    )

    def loss_of(step: Any) -> Any:  # a Tensor, or DIITOParts
        base, source = task.pair(step)
        with runtime.autocast(), runtime.training_attention():
            return diito(base, source, return_parts=return_parts)

    return loss_of


def weights_of(config: DiitoConfig, interchanges: bool) -> dict[str, float]:
    """The weights of an arm.

    The baseline has no counterfactual terms. A masked language model's other terms then share
    their weight, as published (a third each instead of a quarter); a task's stay as they are.
    """
    defaults = DEFAULTS["masked_lm" if config.masked_lm else "task"]
    found = {key: getattr(config, key) for key in WEIGHTS}
    weights = {key: defaults.get(key, 0.0) if v is None else v for key, v in found.items()}
    if interchanges:
        return weights
    whole = sum(weights.values()) if config.masked_lm else 1.0
    for key in ("cf_weight", "cf_cosine_weight"):
        weights[key] = 0.0
    rest = sum(weights.values()) if config.masked_lm else 1.0
    return {key: value * whole / rest for key, value in weights.items()}


def pace(
    task: PairedTask[Any], new_model: Callable[[], Any], teacher: Any, config: DiitoConfig
) -> dict[str, float]:
    """Seconds a step takes with interchanges and without, and how many times as long the former.

    Both train a model of their own on the same batches, in turn, so that whatever else the machine
    does hits both.
    """
    steps = task.schedule(1, config.batch_size, 0)[:PACE_STEPS]
    arms = {}
    for name, interchanges in (("diito", True), ("kd", False)):
        model = new_model().train()
        loss = step_loss(task, model, teacher, config, interchanges, 0)
        weights = [p for p in model.parameters() if p.requires_grad]
        arms[name] = (loss, weights, train.make_optimizer(weights, config.lr))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for step in steps:
        for name, (loss, weights, optimizer) in arms.items():
            started = time.perf_counter()
            loss(step).backward()
            torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if task.options.runtime.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    pairs = zip(seconds["diito"], seconds["kd"], strict=True)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return found | {"ratio": statistics.median(a / b for a, b in pairs)}


def _recipe(config: DiitoConfig, lr: float, seed: int) -> Recipe:
    return Recipe(
        epochs=config.epochs,
        lr=lr,
        batch_size=config.batch_size,
        seed=seed,
        evaluations=config.evaluations,
        weight_decay=config.weight_decay,
        betas=(0.9, config.beta2),
        eps=config.eps,
        warmup=config.warmup,
        max_grad_norm=config.max_grad_norm,
        accumulate=config.accumulate,
    )
