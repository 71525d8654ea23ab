"""The training and evaluation loops: ordinary PyTorch around ``kdkernels.kd_loss``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kdkernels
from kdkernels.api.distill.text import collate, inference_batches, training_batches

# In one trial a small model read 530 texts a second in batches of 32, 449 of 64, 251 of 128.
INFERENCE_BATCH = 32
LOG_EVERY = 20
WEIGHT_DECAY = 0.01
WARMUP_FRACTION = 0.06
MAX_GRAD_NORM = 1.0
# Of what losses return: the sum, what is no loss, and what no run uses.
NO_PARTS = frozenset({"loss", "n_valid", "extra"})

Step = TypeVar("Step")


@dataclass(frozen=True)
class Runtime:
    """Where and in which precision models run."""

    device: torch.device
    bf16: bool

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context of every forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def training_attention(self) -> AbstractContextManager[Any]:
        """The attention kernels to train with.

        For short texts on a CPU the backward pass of the flash kernel took a third of a step;
        plain matrix products trained 593 texts a second instead of 436 (one trial).
        """
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()


@dataclass(frozen=True)
class TrainSet:
    """Tokenised texts with what there is to learn from: labels, teacher logits, or both.

    Attributes:
        ids: Token ids of each text.
        labels: int64 ``[texts]``, or None.
        teacher: fp32 teacher logits ``[texts, classes]``, or None.
    """

    ids: Sequence[Sequence[int]]
    labels: Tensor | None = None
    teacher: Tensor | None = None


@dataclass(frozen=True)
class EvalSet:
    """Tokenised texts with their labels, int64 ``[texts]``."""

    ids: Sequence[Sequence[int]]
    labels: Tensor


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of one fit; without ``evaluations`` there is no curve.

    ``accumulate`` steps of the task make one of the optimizer.
    """

    epochs: int
    lr: float
    batch_size: int
    seed: int
    temperature: float = 1.0
    alpha: float = 1.0
    evaluations: int = 3
    weight_decay: float = WEIGHT_DECAY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = WARMUP_FRACTION
    max_grad_norm: float = MAX_GRAD_NORM
    accumulate: int = 1


@dataclass
class FitResult:
    """What one fit reports.

    Attributes:
        seconds: Time in training steps, without evaluations.
        examples: Texts (blocks of a language model) trained on, counted once per epoch.
        curve: ``(step, figure)`` at each evaluation on the dev texts.
    """

    seconds: float = 0.0
    examples: int = 0
    steps: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)


def objective(
    logits: Tensor, teacher: Tensor | None, labels: Tensor | None, recipe: Recipe
) -> Tensor:
    """The loss of one batch, by what the batch offers.

    Labels alone give cross-entropy, teacher logits alone ``alpha`` times the temperature-scaled
    KL divergence, both give ``(1 - alpha) * CE + alpha * T^2 * KL``.

    Args:
        logits: ``[batch, classes]``.
        teacher: fp32 ``[batch, classes]`` or None.
        labels: int64 ``[batch]`` or None.
        recipe: Supplies ``temperature`` and ``alpha``.

    Returns:
        The mean loss, a scalar.
    """
    return objective_parts(logits, teacher, labels, recipe).loss


def objective_parts(
    logits: Tensor, teacher: Tensor | None, labels: Tensor | None, recipe: Recipe
) -> kdkernels.KDParts:
    """The same, with its parts."""
    if teacher is None:
        return kdkernels.kd_loss(logits, None, labels, return_parts=True)
    return kdkernels.kd_loss(
        logits,
        teacher,
        labels,
        temperature=recipe.temperature,
        ce_weight=0.0 if labels is None else 1.0 - recipe.alpha,
        kd_weight=recipe.alpha,
        return_parts=True,
    )


def count_tokens(step: tuple[TrainSet, list[int]]) -> int:
    """The tokens of a batch, without padding."""
    texts, rows = step
    return sum(len(texts.ids[row]) for row in rows)


def schedule(sets: Sequence[TrainSet], recipe: Recipe) -> list[tuple[TrainSet, list[int]]]:
    """All batches of all epochs; a batch comes from one set, the sets are mixed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    steps: list[tuple[TrainSet, list[int]]] = []
    for _ in range(recipe.epochs):
        epoch = []
        for train_set in sets:
            lengths = [len(ids) for ids in train_set.ids]
            for rows in training_batches(lengths, recipe.batch_size, generator):
                epoch.append((train_set, rows))
        steps += [epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist()]
    return steps


class Schedule(Protocol):
    """What is called after every step of an optimizer: a learning-rate schedule, and more."""

    def step(self) -> object:
        """Goes on to the next step."""


def linear_decay(
    optimizer: torch.optim.Optimizer, steps: int, warmup_fraction: float = WARMUP_FRACTION
) -> Schedule:
    """A short warm-up, then a linear decay to zero at the last of ``steps``."""
    warmup = max(1, int(warmup_fraction * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)),
    )


def make_optimizer(
    weights: Sequence[torch.nn.Parameter],
    lr: float,
    weight_decay: float = WEIGHT_DECAY,
    **adam: Any,
) -> torch.optim.Optimizer:
    """AdamW as every run trains with it; ``adam`` are further arguments of it."""
    return torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay, fused=True, **adam)


def fit(
    model: Any,
    sets: Sequence[TrainSet],
    dev: EvalSet,
    recipe: Recipe,
    runtime: Runtime,
    pad_id: int,
    on_event: Callable[[dict[str, Any]], None],
) -> FitResult:
    """Trains a classifier in place.

    Args:
        model: A transformers sequence classifier.
        sets: What to train on.
        dev: Held-out texts evaluated on during training; they choose nothing here.
        recipe: Hyperparameters.
        runtime: Device and precision.
        pad_id: Padding token of the model's tokenizer.
        on_event: Called after every step (``step``, ``steps``), with ``loss``, its
            ``parts``, ``lr`` and ``tokens_per_s`` on logged steps and ``dev_accuracy`` at
            evaluations.

    Returns:
        Timing and the dev curve.
    """
    model.to(runtime.device)

    def loss_of(step: tuple[TrainSet, list[int]]) -> kdkernels.KDParts:
        return objective_parts(*batch_outputs(model, *step, runtime, pad_id), recipe)

    def evaluate() -> float:
        return accuracy(predict(model, dev.ids, runtime, pad_id), dev.labels)

    loop = Loop(
        loss_of, evaluate, "dev_accuracy", lambda step: len(step[1]), on_event, tokens=count_tokens
    )
    return run(model, schedule(sets, recipe), loop, recipe)


@dataclass(frozen=True)
class Loop(Generic[Step]):
    """What the training loop calls.

    Attributes:
        loss: The loss of a step, with a gradient; or what ``return_parts=True`` gives of one, or
            :class:`Parted`.
        evaluate: The figure of the curve.
        metric: Its name in events.
        size: How many examples a step has.
        on_event: As in :func:`fit`.
        schedule: Makes what follows the optimizer, given it and the number of steps.
        stop: Whether to stop early, asked after each evaluation.
        tokens: How many tokens a step has, where that is known.
    """

    loss: Callable[[Step], Any]
    evaluate: Callable[[], float]
    metric: str
    size: Callable[[Step], int]
    on_event: Callable[[dict[str, Any]], None]
    schedule: Callable[[torch.optim.Optimizer, int], Schedule] = linear_decay
    stop: Callable[[], bool] = lambda: False
    tokens: Callable[[Step], int] | None = None


class Parted(NamedTuple):
    """A loss with a gradient, and by name the detached losses that it is made of."""

    loss: Tensor
    parts: Mapping[str, Tensor]


@dataclass
class _Meter:
    """What a logged step reports: the loss, its parts, and the speed since the last one.

    Everything stays on the device until then: a step that is not logged does not wait for it.
    """

    device: torch.device
    loss: Tensor = field(init=False)
    parts: dict[str, Tensor] = field(init=False)
    tokens: int = 0
    since: float = 0.0

    def begin(self) -> None:
        """A step of the optimizer begins."""
        self.loss, self.parts = torch.zeros((), device=self.device), {}

    def add(self, found: Any, count: int) -> Tensor:
        """Takes one of ``count`` losses of the step; returns the term to differentiate."""
        term: Tensor = (found if isinstance(found, Tensor) else found.loss) / count
        self.loss += term.detach()
        for name, value in _named(found).items():
            if name not in NO_PARTS and isinstance(value, Tensor):
                value = value.detach() / count
                self.parts[name] = self.parts[name] + value if name in self.parts else value
        return term

    def report(self) -> dict[str, Any]:
        """The loss and its parts but those that are 0, which waits for the device."""
        event: dict[str, Any] = {"loss": self.loss.item()}
        if self.parts:
            parts = {name: value.item() for name, value in self.parts.items()}
            event["parts"] = {name: value for name, value in parts.items() if value}
        return event

    def speed(self, seconds: float) -> dict[str, float]:
        """Tokens a second since the last time; nothing where tokens are not counted."""
        tokens, passed = self.tokens, seconds - self.since
        self.tokens, self.since = 0, seconds
        return {"tokens_per_s": tokens / passed} if tokens and passed > 0 else {}


def _named(found: Any) -> Mapping[str, Any]:
    """The parts of what a loss returned."""
    if isinstance(found, Tensor):
        return {}
    return found.parts if isinstance(found, Parted) else dict(found._asdict())


def run(model: Any, steps: Sequence[Step], loop: Loop[Step], recipe: Recipe) -> FitResult:
    """Trains a model in place, whatever the objective: one optimizer step for each of ``steps``.

    Args:
        model: Any module; parameters that require no gradient stay as they are.
        steps: What ``loop`` takes, in the order of training.
        loop: The objective.
        recipe: Hyperparameters.

    Returns:
        Timing and the curve.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(
        weights, recipe.lr, recipe.weight_decay, betas=recipe.betas, eps=recipe.eps
    )
    each = recipe.accumulate
    parts = [steps[first : first + each] for first in range(0, len(steps), each)]
    schedule = loop.schedule(optimizer, len(parts))
    evaluations = recipe.evaluations
    evaluate_every = max(1, -(-len(parts) // evaluations)) if evaluations else len(parts) + 1
    result, meter = FitResult(), _Meter(weights[0].device)
    torch.manual_seed(recipe.seed)  # dropout; here, because loading a model draws numbers too
    for number, part in enumerate(parts, start=1):
        started = time.perf_counter()
        model.train()
        meter.begin()
        for step in part:
            meter.add(loop.loss(step), len(part)).backward()
            meter.tokens += loop.tokens(step) if loop.tokens is not None else 0
        torch.nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lr = optimizer.param_groups[0]["lr"]
        schedule.step()
        event: dict[str, Any] = {"step": number, "steps": len(parts)}
        if number % LOG_EVERY == 0 or number == len(parts):
            event |= {**meter.report(), "lr": lr}
        result.seconds += time.perf_counter() - started
        if "loss" in event:
            event |= meter.speed(result.seconds)
        result.examples += sum(map(loop.size, part))
        result.steps = number
        if number % evaluate_every == 0 or (evaluations and number == len(parts)):
            event[loop.metric] = loop.evaluate()
            result.curve.append((number, event[loop.metric]))
        loop.on_event(event)
        if loop.metric in event and loop.stop():
            break
    return result


def batch_loss(
    model: Any,
    train_set: TrainSet,
    rows: list[int],
    recipe: Recipe,
    runtime: Runtime,
    pad_id: int,
) -> Tensor:
    """The loss of one batch of texts."""
    return objective(*batch_outputs(model, train_set, rows, runtime, pad_id), recipe)


def batch_outputs(
    model: Any, train_set: TrainSet, rows: list[int], runtime: Runtime, pad_id: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What there is of one batch of texts: the model's fp32 logits, the teacher's, the labels."""
    batch = collate(train_set.ids, rows, pad_id, runtime.device)
    labels = None if train_set.labels is None else train_set.labels[rows].to(runtime.device)
    teacher = None if train_set.teacher is None else train_set.teacher[rows].to(runtime.device)
    with runtime.autocast(), runtime.training_attention():
        logits = model(**batch).logits
    return logits.float(), teacher, labels


@torch.inference_mode()
def predict(
    model: Any,
    ids: Sequence[Sequence[int]],
    runtime: Runtime,
    pad_id: int,
    on_batch: Callable[[int], None] | None = None,
    types: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Computes the logits of tokenised texts.

    Args:
        model: A transformers sequence classifier; left in evaluation mode.
        ids: Token ids of each text.
        runtime: Device and precision.
        pad_id: Padding token of the model's tokenizer.
        on_batch: Called with the number of texts of each finished batch.
        types: Which text each token is of, where there are several.

    Returns:
        fp32 logits ``[texts, classes]`` on the CPU, in the order of ``ids``.
    """
    model.to(runtime.device).eval()
    logits = torch.empty(len(ids), model.config.num_labels)
    for rows in inference_batches([len(row) for row in ids], INFERENCE_BATCH):
        with runtime.autocast():
            out = model(**collate(ids, rows, pad_id, runtime.device, types)).logits
        logits[rows] = out.float().cpu()
        if on_batch is not None:
            on_batch(len(rows))
    return logits.clone()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is at the label, in percent."""
    return 100.0 * (logits.argmax(-1) == labels).float().mean().item()
