"""A run with stochastic weight averaging: every arm and seed, the report."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from kdkernels.api.distill import fetch, lm_models, swa_report, swa_results, swa_train
from kdkernels.api.distill.data import Limits
from kdkernels.api.distill.glue import TASKS as GLUE
from kdkernels.api.distill.glue import find_files
from kdkernels.api.distill.lm_data import WIKITEXT2_NAME
from kdkernels.api.distill.own_data import load_own
from kdkernels.api.distill.pipeline import TEACHER_SEED
from kdkernels.api.distill.progress import Bar, Display
from kdkernels.api.distill.results import TEACHER, unit_name
from kdkernels.api.distill.store import RunFolder, write_file, write_folder
from kdkernels.api.distill.swa_config import ARMS, LABEL_ARMS, SwaConfig
from kdkernels.api.distill.swa_results import TITLES
from kdkernels.api.distill.task import Task, TaskOptions
from kdkernels.api.distill.tasks import (
    ClassificationTask,
    LanguageModelTask,
    conll2003_task,
    conll_task,
    glue_task,
    sentiment_task,
    shifts_task,
    squad_task,
    topic_task,
)
from kdkernels.api.distill.topics import SETS
from kdkernels.api.distill.train import Runtime
from kdkernels.api.distill.units import Unit, Units


def make_task(
    config: SwaConfig, runtime: Runtime, notify: fetch.Notify, whole: bool = False
) -> Task[Any]:
    """The task of a configuration; ``whole`` with all layers of the model, as a teacher has."""
    options = TaskOptions(
        model=_model_folder(config, notify),
        layers=None if whole else config.student_layers,
        runtime=runtime,
        dev=config.dev,
        max_length=config.max_length,
        train_embeddings=config.train_embeddings,
        notify=notify,
    )
    return _make(config, options)


def _model_folder(config: SwaConfig, notify: fetch.Notify) -> Path:
    if config.model is not None:
        return Path(config.model)
    if config.task == "lm":
        return lm_models.smollm2_folder(notify)
    return fetch.teacher_folder(notify)


def _make(config: SwaConfig, options: TaskOptions) -> Task[Any]:
    own = None if config.data is None else Path(config.data)
    if config.task == "lm":
        dev = None if config.eval_tokens is None else config.eval_tokens // 2
        text = WIKITEXT2_NAME if own is None else str(own)
        return LanguageModelTask(options, text, config.tokens, dev, config.eval_tokens)
    limited = replace(options, train=config.labels, test=config.test)
    if config.task == "ner":
        return conll2003_task(limited) if own is None else conll_task(limited, own)
    if config.task == "qa":
        return shifts_task(limited) if own is None else squad_task(limited, own)
    if config.task in GLUE:
        return glue_task(limited, config.task, own)
    if config.task in SETS:
        return topic_task(limited, config.task)
    if own is None:
        return sentiment_task(replace(options, test=config.test), config.labels, config.transfer)
    limits = Limits(config.labels, config.transfer, config.test, exact=not config.quick)
    return ClassificationTask(options, load_own(own, limits))


def data_files(task: str, data: Path) -> list[Path]:
    """The files that a task reads of the user's own data."""
    return find_files(task, data) if task in GLUE else [data]


def arms_of(config: SwaConfig, task: Task[Any]) -> tuple[str, ...]:
    """The arms that were asked for, or all that there are data for."""
    if config.arms:
        return tuple(arm for arm in ARMS if arm in config.arms)
    taught = isinstance(task, ClassificationTask) and bool(task.corpus.transfer)
    return ARMS if taught else LABEL_ARMS


class SwaPipeline:
    """Does the units of one run in order, skipping the complete ones."""

    def __init__(
        self,
        config: SwaConfig,
        folder: RunFolder,
        runtime: Runtime,
        display: Display,
        task: Task[Any],
    ) -> None:
        self.config = config
        self.folder = folder
        self.runtime = runtime
        self.display = display
        self.task = task
        self.arms = arms_of(config, task)
        self._units = Units(folder, display, self._summary)

    def run(self) -> None:
        """Does every unit that is not complete, then writes the report."""
        config, task = self.config, self.task
        self._check_data()
        self.display.note(task.source)
        units = []
        if set(self.arms) - set(LABEL_ARMS):
            units.append(Unit(TEACHER, TEACHER, self._teacher))
        for arm in self.arms:
            for seed in config.seeds:
                title = f"{TITLES[arm]}, seed {seed}"
                units.append(Unit(unit_name(arm, seed), title, self._student))
        units.append(Unit("student", "choose the model", self._keep_best))
        results = self._units.run(units)
        found = swa_results.gather(
            results, self.arms, config.seeds, task.metric, task.higher_is_better
        )
        swa_report.write(self.folder.path, config, found, task, self.runtime)
        swa_report.show(self.display.console, self.folder.path, found)

    def _summary(self, result: dict[str, Any]) -> str:
        if "kept" not in result:
            return ""
        return f"test {result['kept']['test'][self.task.metric]:6.2f}"

    def _check_data(self) -> None:
        """Raises when the examples are not those the run began with."""
        digest = hashlib.sha256(self.task.source.encode())
        if self.config.data is not None:  # what is downloaded is checked by its own sum
            for path in data_files(self.config.task, Path(self.config.data)):
                digest.update(path.read_bytes())
        self._units.check_data(digest.hexdigest(), self.config.data)

    def _teacher(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Fine-tunes the whole model, and keeps its logits of the transfer texts."""
        from safetensors.torch import save_file

        config = self.config
        task = make_task(config, self.runtime, self.display.note, whole=True)
        assert isinstance(task, ClassificationTask)
        trained = swa_train.fit(
            task,
            config,
            average=False,
            epochs=config.teacher_epochs,
            seed=TEACHER_SEED,
            on_event=self._listener(unit, bar),
            lr=config.teacher_lr,
        )
        result = self._result(task, trained)
        logits = {"transfer": task.transfer_logits(trained.model)}
        write_file(self._logits_file, lambda path: save_file(logits, path))
        return result

    @property
    def _logits_file(self) -> Path:
        return self.folder.state / "teacher-logits.safetensors"

    @cached_property
    def _distilled(self) -> Task[Any]:
        """The task of learning from the teacher."""
        from safetensors.torch import load_file

        assert isinstance(self.task, ClassificationTask)
        logits: Tensor = load_file(self._logits_file)["transfer"]
        return self.task.distilled(logits, self.config.temperature, self.config.alpha)

    def _student(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Trains and tests one model; keeps it if it is the best on dev so far."""
        arm, _, seed_text = unit.rpartition("-seed")
        config, taught = self.config, arm not in LABEL_ARMS
        task = self._distilled if taught else self.task
        trained = swa_train.fit(
            task,
            config,
            average=arm.endswith("swa"),
            epochs=config.transfer_epochs if taught else config.epochs,
            seed=int(seed_text),
            on_event=self._listener(unit, bar),
        )
        result = self._result(task, trained)
        if self._best([*self._done(), (unit, result)]) == unit:
            with trained.kept() as model:
                write_folder(self.folder.state / unit, lambda path: task.save(model, path))
        return result

    def _result(self, task: Task[Any], trained: swa_train.Trained) -> dict[str, Any]:
        """Figures of the weights themselves and of every average."""
        averages = {}
        for key in trained.averagers:
            with trained.averaged(key) as model:
                averages[key] = swa_train.figures(task, model)
        live = swa_train.figures(task, trained.model)
        return {
            "kept": next(iter(averages.values()), live),
            "live": live,
            "averages": averages,
            "models": {key: int(a.n_averaged) for key, a in trained.averagers.items()},
            "curve": trained.curve,
            "best_step": None if trained.best is None else trained.best[0],
            "parameters": sum(p.numel() for p in trained.model.parameters()),
            "steps": trained.fitted.steps,
            "examples": trained.fitted.examples,
            "train_seconds": trained.fitted.seconds,
        }

    def _listener(self, unit: str, bar: Bar) -> Any:
        """What takes the events of a training: the screen, and the run's log."""

        def on_event(event: dict[str, Any]) -> None:
            bar.event(event)
            if "loss" in event:
                kept = {key: event[key] for key in ("step", "loss", "lr")}
                self.folder.log(unit, event="step", **kept)
            if "dev" in event:
                self.folder.log(
                    unit, event="evaluation", step=event["step"], split="dev", figure=event["dev"]
                )

        return on_event

    def _done(self) -> list[tuple[str, dict[str, Any]]]:
        names = [unit_name(arm, seed) for arm in self.arms for seed in self.config.seeds]
        results = [(name, self.folder.result(name)) for name in names]
        return [(name, result) for name, result in results if result is not None]

    def _best(self, results: list[tuple[str, dict[str, Any]]]) -> str:
        """The unit with the best dev figure; of equal ones the first."""
        sign = 1 if self.task.higher_is_better else -1
        return max(results, key=lambda r: sign * r[1]["kept"]["dev"][self.task.metric])[0]

    def _keep_best(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Moves the model that did best on dev to ``student/``, drops the others."""
        done = self._done()
        best = self._best(done)
        source, target = self.folder.state / best, self.folder.path / "student"
        # A missing source: a killed process had moved it before it could say so.
        if source.exists():
            shutil.rmtree(target, ignore_errors=True)
            os.rename(source, target)
        for name, _ in done:
            shutil.rmtree(self.folder.state / name, ignore_errors=True)
        return {"best": best}
