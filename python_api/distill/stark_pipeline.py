"""A run of sparse teachers: scores, teachers at every level, students of each, the report."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from kdkernels.api.distill import arm_train, fetch, models, stark_report, swa_train
from kdkernels.api.distill.arm_pipeline import ArmPipeline
from kdkernels.api.distill.arm_results import ArmResults
from kdkernels.api.distill.models import Heading
from kdkernels.api.distill.pipeline import TEACHER_SEED
from kdkernels.api.distill.progress import Bar, Display
from kdkernels.api.distill.results import TEACHER
from kdkernels.api.distill.stark_config import PLAIN, Cut, StarkConfig
from kdkernels.api.distill.store import RunFolder, write_file, write_folder
from kdkernels.api.distill.swa_train import Trained
from kdkernels.api.distill.task import Task, TaskOptions
from kdkernels.api.distill.tasks.choose import data_files, encoder_task
from kdkernels.api.distill.train import Recipe, Runtime
from kdkernels.api.distill.units import Unit
from kdkernels.api.methods.stark import SparseTeacher
from kdkernels.api.methods.structure import KINDS
from kdkernels.api.methods.teacher_scores import TeacherScores

SCORES, SPEED = "scores", "speed"
# Batches by which teachers are timed, and how often each goes over them, all in turn.
SPEED_BATCHES, SPEED_ROUNDS = 6, 5

Self = TypeVar("Self", bound="TaughtTask")


class TaughtTask(Task[Any], Protocol):
    """A task over an encoder that a student learns from a teacher's logits.

    Attributes:
        options: What it was made with.
        heading: What its models have on top.
        tokenizer: Its models' tokenizer.
    """

    options: TaskOptions
    heading: Heading
    tokenizer: Any

    def parts(self: Self, share: float) -> tuple[Self, Self]:
        """The same task on the first training examples, and on the last ``share`` of them."""

    def on_dev(self: Self) -> Self:
        """The same task with the dev examples as training examples."""

    def pair(self, step: Any) -> tuple[dict[str, Tensor], None]:
        """What a model takes of a batch, with ``labels`` and ``lengths``."""

    def ready(self, model: Any) -> Any:
        """A model as it is trained."""

    def transfer_logits(self, model: Any) -> Tensor:
        """A teacher's fp32 outputs for what a student learns from."""

    def distilled(
        self: Self, teacher_logits_transfer: Tensor, temperature: float, alpha: float
    ) -> Self:
        """The same task, learning from a teacher's outputs."""


def make_task(config: StarkConfig, runtime: Runtime, notify: fetch.Notify) -> TaughtTask:
    """The task of a configuration."""
    options = TaskOptions(
        model=fetch.teacher_folder(notify) if config.model is None else Path(config.model),
        layers=None,
        runtime=runtime,
        train=config.labels,
        dev=config.dev,
        test=config.test,
        max_length=config.max_length,
        train_embeddings=config.train_embeddings,
        notify=notify,
    )
    own = None if config.data is None else Path(config.data)
    task = encoder_task(config.task, options, own, config.transfer, exact=not config.quick)
    return cast(TaughtTask, task)


class StarkPipeline(ArmPipeline):
    """A run that compares students of teachers that are cut, and of the dense one."""

    def __init__(
        self,
        config: StarkConfig,
        folder: RunFolder,
        runtime: Runtime,
        display: Display,
        task: TaughtTask,
    ) -> None:
        self.cuts = {cut.name: cut for cut in config.cuts}
        if config.faithful:
            self.taught, self.scored = task, task.on_dev()
        else:
            self.taught, self.scored = task.parts(config.held_out)
        super().__init__(config, folder, runtime, display, self.taught, list(self.cuts))
        self.config = config
        self._pruned: SparseTeacher | None = None

    def own_files(self) -> Sequence[Path]:
        """The files of the user's own data."""
        if self.config.data is None:
            return []
        return data_files(self.config.task, Path(self.config.data))

    def preparing(self) -> list[Unit]:
        """The trial student and the scores; one pass of each teacher over the texts."""
        taught = [cut for cut in self.cuts.values() if cut.kind != "random"]
        plain, *others = (
            Unit(_unit(cut), f"teacher of {cut.name}", partial(self._teach, cut)) for cut in taught
        )
        scores = Unit(SCORES, "trial student, scores", self._scores_unit)
        speed = Unit(SPEED, "time the teachers", lambda unit, bar: self._speed())
        return [plain, scores, *others, speed]

    def write(self, found: ArmResults) -> None:
        """Writes the report."""
        self._report(found).write(self.folder.path)

    def show(self, found: ArmResults) -> None:
        """Prints tables and verdict."""
        self._report(found).show(self.display.console, self.folder.path)

    def save(self, model: Any, folder: Path) -> None:
        """Writes a student; a pruned one's layers may differ in width."""
        if self._pruned is None or self._pruned.model is not model:
            self.task.save(model, folder)
        else:
            self._pruned.save_pretrained(folder)
            self.taught.tokenizer.save_pretrained(folder)

    def train_teacher(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Trains the whole model on the task, or takes it as it is."""
        task, config = self.taught, self.config
        model = task.new_model(TEACHER_SEED)
        trained = Trained(model)
        if config.teacher_epochs:
            steps = task.schedule(config.teacher_epochs, config.batch_size, TEACHER_SEED)
            recipe = self._recipe(config.teacher_epochs, config.teacher_lr, TEACHER_SEED)
            loss = partial(task.loss, model)
            trained = arm_train.fit(task, model, steps, loss, recipe, self.listener(unit, bar))
        result = self.result(task, trained)
        write_folder(self._teacher_folder, lambda path: task.save(model, path))
        return result

    def train_arm(self, arm: str, seed: int, unit: str, bar: Bar) -> Trained:
        """Trains one student, from where every student begins."""
        cut = self.cuts[arm]
        logits = self._random_logits(cut, seed) if cut.kind == "random" else self._read(cut)
        return self._fit(logits, seed, unit, bar)

    def _fit(self, logits: Tensor, seed: int, unit: str, bar: Bar) -> Trained:
        config = self.config
        task = self.taught.distilled(logits, config.temperature, config.alpha)
        model = self._new_student()
        steps = task.schedule(config.epochs, config.batch_size, seed)
        recipe = self._recipe(config.epochs, config.lr, seed)
        loss = partial(task.loss, model)
        return arm_train.fit(task, model, steps, loss, recipe, self.listener(unit, bar))

    def _recipe(self, epochs: int, lr: float, seed: int) -> Recipe:
        config = self.config
        return Recipe(epochs, lr, config.batch_size, seed, evaluations=config.evaluations)

    def _scores_unit(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Distils the trial student from the dense teacher; scores the teacher by both."""
        config = self.config
        trained = self._fit(self._read(Cut(PLAIN)), config.seeds[0], unit, bar)
        scores = SparseTeacher.score(
            self._teacher,
            self._score_batches(),
            student=trained.model,
            per=config.per,
            lam=config.lams[0],
            temperature=config.temperature,
        )
        scores.save(self._scores_file)
        return self.result(self.taught, trained)

    def _score_batches(self) -> Iterator[dict[str, Tensor]]:
        for step in self.scored.schedule(1, self.config.batch_size, TEACHER_SEED):
            batch, _ = self.scored.pair(step)
            del batch["lengths"]
            yield batch

    @property
    def _scores_file(self) -> Path:
        return self.folder.state / "scores.pt"

    @property
    def _teacher_folder(self) -> Path:
        return self.folder.path / TEACHER

    @cached_property
    def _teacher(self) -> Any:
        """The trained teacher; it stays dense."""
        model = models.load_headed(
            self._teacher_folder, self.taught.heading, TEACHER, seed=TEACHER_SEED
        )
        model.requires_grad_(False)
        return model.to(self.runtime.device).eval()

    @cached_property
    def _scores(self) -> TeacherScores:
        return TeacherScores.load(self._scores_file)

    def _sparse(self, cut: Cut, seed: int = 0) -> SparseTeacher:
        """A teacher of its own that is cut."""
        scores = self._random_scores(seed) if cut.lam is None else self._scores.at(cut.lam)
        sparse = SparseTeacher(copy.deepcopy(self._teacher), scores)
        sparse.sparsify(cut.level)
        sparse.densify()
        return sparse

    def _random_scores(self, seed: int) -> TeacherScores:
        """Every seed's students have teachers that are cut in another way."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            kind: [
                torch.rand(len(e), generator=generator) for e in self._scores.expressiveness[kind]
            ]
            for kind in KINDS
        }
        return TeacherScores(drawn, lam=1.0)

    def _random_logits(self, cut: Cut, seed: int) -> Tensor:
        return self.taught.transfer_logits(self._sparse(cut, seed).model)

    def _new_student(self) -> Any:
        """The student before training: every one begins with the same weights of the teacher."""
        config = self.config
        if config.student_kind == "dropped":
            model = models.cut_model(self._teacher, config.student_layers)
        else:
            self._pruned = self._prune()
            model = self._pruned.model
        return self.taught.ready(model.requires_grad_(True))

    @cached_property
    def _own_scores(self) -> TeacherScores:
        """The teacher's by its own loss, which no student is needed for."""
        return SparseTeacher.score(
            self._teacher, self._score_batches(), per=self.config.per, lam=1.0
        )

    def _prune(self) -> SparseTeacher:
        pruned = SparseTeacher(copy.deepcopy(self._teacher), self._own_scores)
        pruned.sparsify(self.config.student_level)
        pruned.densify()
        return pruned

    def _teach(self, cut: Cut, unit: str, bar: Bar) -> dict[str, Any]:
        """A teacher's own figures and size, and its logits for all students."""
        from safetensors.torch import save_file

        sparse = None if cut.kind == PLAIN else self._sparse(cut)
        model = self._teacher if sparse is None else sparse.model
        logits = {"transfer": self.taught.transfer_logits(model)}
        write_file(self._logits_file(cut), lambda path: save_file(logits, path))
        known = self._units.result(TEACHER) if sparse is None else None
        return {
            "kept": known["kept"] if known else swa_train.figures(self.taught, model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "widths": None if sparse is None else sparse.widths,
        }

    def _logits_file(self, cut: Cut) -> Path:
        return self.folder.state / f"{_unit(cut)}.safetensors"

    def _read(self, cut: Cut) -> Tensor:
        from safetensors.torch import load_file

        return load_file(self._logits_file(cut))["transfer"]

    @torch.inference_mode()
    def _speed(self) -> dict[str, Any]:
        """Seconds that the teachers of the first lam take for the same batches, in turn.

        All go over them one after the other, so that whatever else the machine does hits all.
        """
        main = [cut for cut in self.cuts.values() if cut.lam == self.config.lams[0]]
        teachers = {PLAIN: self._teacher, **{cut.name: self._sparse(cut).model for cut in main}}
        steps = self.scored.schedule(1, self.config.batch_size, TEACHER_SEED)[:SPEED_BATCHES]
        batches = []
        for step in steps:
            batch, _ = self.scored.pair(step)
            batches.append({k: x for k, x in batch.items() if k not in ("labels", "lengths")})
        seconds: dict[str, list[float]] = {name: [] for name in teachers}
        for number in range(SPEED_ROUNDS + 1):
            for name, model in teachers.items():
                started = time.perf_counter()
                for batch in batches:
                    with self.runtime.autocast():
                        model(**batch)
                if self.runtime.device.type == "cuda":
                    torch.cuda.synchronize()
                if number:  # the first one warms up
                    seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = {
            name: statistics.median(a / b for a, b in zip(seconds[PLAIN], values, strict=True))
            for name, values in seconds.items()
        }
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        return {"median": medians, "faster": ratios, "tokens": tokens}

    def _report(self, found: ArmResults) -> stark_report.Report:
        teachers = {
            name: self._units.result(_unit(cut))
            for name, cut in self.cuts.items()
            if cut.kind != "random"
        }
        return stark_report.Report(
            self.config,
            found,
            self.cuts,
            teachers,
            self._units.result(SPEED),
            self.task,
            self.runtime,
        )


def _unit(cut: Cut) -> str:
    """Name of the unit of a cut teacher."""
    return f"{TEACHER}-{cut.name}"
