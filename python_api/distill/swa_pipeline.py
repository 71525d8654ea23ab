"""A run with stochastic weight averaging: every arm and seed, the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from kdkernels.api.distill import fetch, lm_models, swa_report, swa_train
from kdkernels.api.distill.arm_pipeline import ArmPipeline
from kdkernels.api.distill.arm_results import ArmResults
from kdkernels.api.distill.lm_data import WIKITEXT2_NAME
from kdkernels.api.distill.pipeline import TEACHER_SEED
from kdkernels.api.distill.progress import Bar, Display
from kdkernels.api.distill.store import RunFolder, write_file
from kdkernels.api.distill.swa_config import ARMS, LABEL_ARMS, SwaConfig
from kdkernels.api.distill.task import Task, TaskOptions
from kdkernels.api.distill.tasks import ClassificationTask, LanguageModelTask
from kdkernels.api.distill.tasks.choose import data_files, encoder_task
from kdkernels.api.distill.train import Runtime


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
    return encoder_task(config.task, limited, own, config.transfer, exact=not config.quick)


def arms_of(config: SwaConfig, task: Task[Any]) -> tuple[str, ...]:
    """The arms that were asked for, or all that there are data for."""
    if config.arms:
        return tuple(arm for arm in ARMS if arm in config.arms)
    taught = isinstance(task, ClassificationTask) and bool(task.corpus.transfer)
    return ARMS if taught else LABEL_ARMS


class SwaPipeline(ArmPipeline):
    """A run with weight averaging, or of fine-tuning alone."""

    label_arms = LABEL_ARMS

    def __init__(
        self,
        config: SwaConfig,
        folder: RunFolder,
        runtime: Runtime,
        display: Display,
        task: Task[Any],
    ) -> None:
        super().__init__(config, folder, runtime, display, task, arms_of(config, task))
        self.config = config

    def own_files(self) -> Sequence[Path]:
        """The files of the user's own data."""
        if self.config.data is None:
            return []
        return data_files(self.config.task, Path(self.config.data))

    def write(self, found: ArmResults) -> None:
        """Writes the report."""
        swa_report.write(self.folder.path, self.config, found, self.task, self.runtime)

    def train_teacher(self, unit: str, bar: Bar) -> dict[str, Any]:
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
            on_event=self.listener(unit, bar),
            lr=config.teacher_lr,
        )
        result = self.result(task, trained)
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

    def train_arm(self, arm: str, seed: int, unit: str, bar: Bar) -> swa_train.Trained:
        """Trains one model, from labels or from the teacher's logits."""
        config, taught = self.config, arm not in LABEL_ARMS
        return swa_train.fit(
            self._distilled if taught else self.task,
            config,
            average=arm.endswith("swa"),
            epochs=config.transfer_epochs if taught else config.epochs,
            seed=seed,
            on_event=self.listener(unit, bar),
        )
