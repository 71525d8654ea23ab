"""Time and memory of recipes: whole training steps and losses alone, fused against eager.

Both get the same states, queries and keys: what differs is the losses.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.api.distill import models, recipes_eager, recipes_fused, train
from kdkernels.api.distill.config import DistillConfig
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.recipe_train import Batch, StepLoss, make_recipe
from kdkernels.api.distill.recipes import ARMS, Losses, Options, Shape, SoftLabels, States
from kdkernels.api.distill.text import collate
from kdkernels.api.distill.train import Recipe, Runtime, TrainSet

FUSED, EAGER = "fused", "eager"
VARIANTS: dict[str, Losses] = {FUSED: recipes_fused, EAGER: recipes_eager}
BATCHES = 8
ROUNDS = 3
# The demo's texts have some 20 tokens; these are a layer of BERT-base at lengths of other tasks.
WIDTH, HEADS = 768, 12
REAL, QUICK = ((16, 128), (16, 512)), ((2, 16),)
# Of a loss alone: pairs of runs, and seconds after which there are no more.
LEAST, MOST, ENOUGH = 5, 100, 3.0
M_MMAP_THRESHOLD, MAPPED = -3, 65536  # of glibc's mallopt
# Relative differences, in float32, that are more than rounding.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3

Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """What a process needs to make the models and the recipe again.

    Attributes:
        arm: Name of the recipe.
        options: Its options.
        classes: Names of the classes.
        teacher: Folder of the fine-tuned teacher.
        source: Folder of what the student is cut from, or of the student.
        layers: Layers to cut out; None for all.
        lr: Learning rate.
    """

    arm: str
    options: Options
    classes: list[str]
    teacher: Path
    source: Path
    layers: tuple[int, ...] | None
    lr: float

    def to_json(self) -> dict[str, Any]:
        """Without objects."""
        return {
            **dataclasses.asdict(self),
            "teacher": str(self.teacher),
            "source": str(self.source),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Setting:
        """Reads what :meth:`to_json` wrote."""
        given = dict(values)
        given["options"] = Options(**given["options"])
        given["teacher"], given["source"] = Path(given["teacher"]), Path(given["source"])
        given["layers"] = None if given["layers"] is None else tuple(given["layers"])
        return cls(**given)

    def load(self, runtime: Runtime) -> tuple[Any, Any]:
        """Student and teacher, as for training."""
        teacher = models.load_classifier(self.teacher, self.classes, "teacher", 0).model
        student = models.load_classifier(self.source, self.classes, "student", 0).model
        if self.layers is not None:
            student = models.cut_model(student, self.layers)
        if not self.options.train_embeddings:
            models.freeze_embeddings(student)
        models.disable_dropout(student)
        teacher.to(runtime.device).eval().requires_grad_(False)
        return student.to(runtime.device), teacher

    def recipe(self, student: Any, teacher: Any) -> SoftLabels:
        """The recipe for two models."""
        return make_recipe(ARMS[self.arm], student, teacher, self.options, 0)


def sample(ids: Sequence[Sequence[int]], config: DistillConfig, pad_id: int) -> list[Batch]:
    """The first batches of the training with seed 0."""
    steps = train.schedule([TrainSet(ids)], Recipe(1, config.lr, config.batch_size, seed=0))
    return [collate(ids, rows, pad_id, torch.device("cpu")) for _, rows in steps[:BATCHES]]


class Step:
    """A whole training step: both models, losses, backward pass, optimizer."""

    def __init__(
        self, setting: Setting, student: Any, teacher: Any, runtime: Runtime, losses: Losses
    ) -> None:
        """Args: the models are on the runtime's device; the student is trained."""
        recipe = setting.recipe(student, teacher)
        self.loss = StepLoss(recipe, 0, student, teacher, runtime, losses)
        self._trained = nn.ModuleList([student, recipe.projections]).train()
        self._weights = [p for p in self._trained.parameters() if p.requires_grad]
        self._optimizer = train.make_optimizer(self._weights, setting.lr)

    def __call__(self, batch: Batch) -> None:
        """Trains on a batch."""
        self.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self._weights, train.MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def measure(
    setting: Setting,
    student: Any,
    teacher: Any,
    batches: Sequence[Batch],
    runtime: Runtime,
    quick: bool = False,
) -> dict[str, Any]:
    """Measures an arm.

    Returns:
        ``step``: milliseconds (median over real batches) and peak memory in MB above the models of
        the first stage's training step, by ``fused`` and ``eager``. ``losses``: the same of the
        losses alone, forward and backward, on states of a real batch and on random ones of
        BERT-base's width. Memory is None where the system does not tell.

    Raises:
        DistillError: The two disagree; a wrong loss is not timed.
    """
    batches = [_to(batch, runtime) for batch in batches]
    middle = sorted(batches, key=lambda batch: batch["input_ids"].shape[1])[len(batches) // 2]
    check_equal(setting, student, teacher, middle, runtime)
    sizes = QUICK if quick else REAL
    peaks = _peaks(setting, middle, sizes, runtime)
    step = _step_times(setting, student, teacher, batches, runtime)
    found: dict[str, Any] = {"step": {"ms": step, "mb": peaks.pop(0)}, "losses": []}
    shapes = _shapes(student, teacher)
    real = _losses_of(setting, student, teacher, middle, runtime)
    rows, tokens = middle["input_ids"].shape
    cases = [((rows, tokens, shapes[0].width), real)]
    for size in sizes:
        cases.append(((*size, WIDTH), _random_losses(setting, shapes, size, runtime)))
    for (rows, tokens, width), calls in cases:
        shape = {"rows": rows, "tokens": tokens, "width": width}
        found["losses"].append({**shape, "ms": _alternate(calls, runtime), "mb": peaks.pop(0)})
    return found


def _to(batch: Batch, runtime: Runtime) -> Batch:
    return {name: tensor.to(runtime.device) for name, tensor in batch.items()}


def check_equal(
    setting: Setting, student: Any, teacher: Any, batch: Batch, runtime: Runtime
) -> None:
    """Raises unless the eager losses and gradients are the fused ones, in float32."""
    exact = Runtime(runtime.device, bf16=False)
    recipe = setting.recipe(student, teacher)
    mask = batch["attention_mask"].bool()
    found = {}
    for name, losses in VARIANTS.items():
        step = StepLoss(recipe, 0, student, teacher, exact, losses)
        mine, taught = step.states(batch)
        mine, leaves = _leaves(mine)
        loss = step.of(mine, taught, mask)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        found[name] = loss.item(), [g for g in gradients if g is not None]
    (fused, ours), (eager, theirs) = found[FUSED], found[EAGER]
    good = abs(fused - eager) <= LOSS_TOLERANCE * abs(eager) and len(ours) == len(theirs)
    for gradient, other in zip(ours, theirs, strict=False):
        good = good and bool((gradient - other).norm() <= GRADIENT_TOLERANCE * other.norm())
    if not good:
        raise DistillError(
            f"the fused loss of {setting.arm} must equal the eager one, got {fused:.6f} and "
            f"{eager:.6f}, or other gradients"
        )


def _leaves(states: States) -> tuple[States, list[Tensor]]:
    """The same states without what made them, to be given gradients."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    hidden = {layer: leaf(x) for layer, x in states.hidden.items()}
    attention = {layer: tuple(map(leaf, xs)) for layer, xs in states.attention.items()}
    return States(leaf(states.logits), hidden, attention), leaves


def _losses_of(
    setting: Setting, student: Any, teacher: Any, batch: Batch, runtime: Runtime
) -> dict[str, Call]:
    """The losses alone on the states of a batch, forward and backward, by variant."""
    step = StepLoss(setting.recipe(student, teacher), 0, student, teacher, runtime)
    mine, taught = step.states(batch)
    return _calls(step.recipe, mine, taught, batch["attention_mask"].bool(), runtime)


def _calls(
    recipe: SoftLabels, student: States, teacher: States, mask: Tensor, runtime: Runtime
) -> dict[str, Call]:
    student, leaves = _leaves(student)
    trained = [*leaves, *recipe.projections.parameters()]

    def call(losses: Losses) -> None:
        for tensor in trained:
            tensor.grad = None
        with runtime.autocast():
            loss = recipe.loss(0, student, teacher, mask, losses)
        loss.backward()

    return {name: partial(call, losses) for name, losses in VARIANTS.items()}


def _shapes(student: Any, teacher: Any) -> tuple[Shape, Shape]:
    return Shape.of(student.config), Shape.of(teacher.config)


def _random_losses(
    setting: Setting, shapes: tuple[Shape, Shape], size: tuple[int, int], runtime: Runtime
) -> dict[str, Call]:
    """The losses alone on random states of BERT-base's width, no padding."""
    wide = [Shape(shape.layers, WIDTH, HEADS) for shape in shapes]
    recipe = ARMS[setting.arm](wide[0], wide[1], setting.options)
    recipe.projections.to(runtime.device)
    generator = torch.Generator().manual_seed(0)
    # What autocast leaves: layers end in a float32 normalisation, projections are matrix products.
    low = torch.bfloat16 if runtime.bf16 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(runtime.device, dtype)

    def states(place: int) -> States:
        hidden = {pair[place]: normal(*size, WIDTH) for pair in recipe.hidden}
        attention = {
            pair[place]: tuple(normal(*size, WIDTH, dtype=low) for _ in recipe.kinds)
            for pair in recipe.attention
        }
        return States(normal(size[0], len(setting.classes)), hidden, attention)

    mask = torch.ones(*size, dtype=torch.bool, device=runtime.device)
    return _calls(recipe, states(0), states(1), mask, runtime)


# ---- time ----------------------------------------------------------------------------------------


def _seconds(call: Call, runtime: Runtime) -> float:
    _synchronize(runtime)
    started = time.perf_counter()
    call()
    _synchronize(runtime)
    return time.perf_counter() - started


def _synchronize(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()


def _step_times(
    setting: Setting, student: Any, teacher: Any, batches: Sequence[Batch], runtime: Runtime
) -> dict[str, float]:
    """Median milliseconds of a step by variant; they alternate, and so does who begins."""
    steps = {
        name: Step(setting, student, teacher, runtime, losses) for name, losses in VARIANTS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(1 + ROUNDS):
        for place, batch in enumerate(batches):
            names = list(steps) if (turn + place) % 2 else list(reversed(steps))
            for name in names:
                seconds = _seconds(partial(steps[name], batch), runtime)
                if turn > 0:
                    times[name].append(seconds)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def _alternate(calls: Mapping[str, Call], runtime: Runtime) -> dict[str, float]:
    """Median milliseconds of calls that alternate, after one of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = 0.0
    for turn in range(1 + MOST):
        for name, call in calls.items():
            times[name].append(_seconds(call, runtime))
        if turn == 0:
            started = time.perf_counter()
        elif turn >= LEAST and time.perf_counter() - started > ENOUGH:
            break
    return {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}


# ---- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One peak to find: of a step, of the losses of a batch, or of random states of a size."""

    setting: Setting
    batch: Batch
    runtime: Runtime
    what: str
    size: tuple[int, int]
    variant: str


def _tasks(
    setting: Setting, batch: Batch, sizes: Sequence[tuple[int, int]], runtime: Runtime
) -> list[list[_Task]]:
    cases = [("step", (0, 0)), ("losses", (0, 0)), *(("random", size) for size in sizes)]
    return [
        [_Task(setting, batch, runtime, what, size, variant) for variant in VARIANTS]
        for what, size in cases
    ]


def _peaks(
    setting: Setting, batch: Batch, sizes: Sequence[tuple[int, int]], runtime: Runtime
) -> list[dict[str, float | None]]:
    """MB above the models and inputs by variant: of the step, the losses, those of each size."""
    if runtime.device.type == "cuda":
        tasks = _tasks(setting, batch, sizes, runtime)
        return _megabytes([[_peak_here(task) for task in pair] for pair in tasks])
    request = {
        "setting": setting.to_json(),
        "batch": {name: tensor.tolist() for name, tensor in batch.items()},
        "sizes": list(sizes),
        "bf16": runtime.bf16,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "kdkernels.api.distill.recipe_measure"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return [dict.fromkeys(VARIANTS) for _ in range(2 + len(sizes))]
    return _megabytes(json.loads(done.stdout.splitlines()[-1]))


def _megabytes(rows: Sequence[Sequence[int]]) -> list[dict[str, float | None]]:
    return [{n: b / 1e6 for n, b in zip(VARIANTS, pair, strict=True)} for pair in rows]


def _peak_here(task: _Task) -> int:
    from kdkernels.bench.memory import peak

    if task.runtime.device.type == "cpu":
        # Large blocks are mapped, and unmapped when freed: a peak does not hide in what the
        # allocator has kept for reuse.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED)
    call = _prepared(task)
    gc.collect()
    if task.runtime.device.type == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
    return peak(call, task.runtime.device.type)


def _prepared(task: _Task) -> Call:
    """The call to look at; libraries and code were loaded on a small one."""
    setting, runtime = task.setting, task.runtime
    losses = VARIANTS[task.variant]
    small = {name: tensor[:2, :4] for name, tensor in task.batch.items()}
    student, teacher = setting.load(runtime)
    if task.what == "step":
        step = Step(setting, student, teacher, runtime, losses)
        step(small)  # makes the optimizer's state, too
        return lambda: step(task.batch)
    if task.what == "losses":
        _losses_of(setting, student, teacher, small, runtime)[task.variant]()
        return _losses_of(setting, student, teacher, task.batch, runtime)[task.variant]
    shapes = _shapes(student, teacher)
    _random_losses(setting, shapes, (2, 4), runtime)[task.variant]()
    return _random_losses(setting, shapes, task.size, runtime)[task.variant]


def _main(request: dict[str, Any]) -> None:
    """Prints the peaks, each found in a process where nothing was allocated before.

    They are forked from this one, which has imported everything and computed nothing: threads of
    a thread pool would not survive a fork.
    """
    setting = Setting.from_json(request["setting"])
    # Imports, 7 seconds of them, once for all.
    importlib.import_module("kdkernels.bench.memory")
    models.vocabulary(setting.teacher)
    for folder in {setting.teacher, setting.source}:
        models.empty_classifier(folder, "teacher")
    batch = {name: torch.tensor(rows) for name, rows in request["batch"].items()}
    runtime = Runtime(torch.device("cpu"), bf16=request["bf16"])
    tasks = _tasks(setting, batch, [(b, t) for b, t in request["sizes"]], runtime)
    context = multiprocessing.get_context("fork")
    with context.Pool(
        1, torch.set_num_threads, (request["threads"],), maxtasksperchild=1
    ) as workers:
        print(json.dumps([workers.map(_peak_here, pair, chunksize=1) for pair in tasks]))


if __name__ == "__main__":
    _main(json.loads(sys.stdin.read()))
