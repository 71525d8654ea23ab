"""A run of causal distillation: the teacher, every arm and seed, the report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from kdkernels.api.distill import diito_report, diito_train, fetch, mlm_data, models
from kdkernels.api.distill.arm_pipeline import ArmPipeline
from kdkernels.api.distill.arm_results import ArmResults
from kdkernels.api.distill.diito_config import ARMS, DiitoConfig
from kdkernels.api.distill.lm_data import WIKITEXT2_NAME
from kdkernels.api.distill.pipeline import TEACHER_SEED
from kdkernels.api.distill.progress import Bar, Display
from kdkernels.api.distill.results import TEACHER
from kdkernels.api.distill.store import RunFolder, write_folder
from kdkernels.api.distill.swa_train import Trained
from kdkernels.api.distill.task import PairedTask, TaskOptions
from kdkernels.api.distill.tasks import MaskedLmTask
from kdkernels.api.distill.tasks.choose import data_files, encoder_task
from kdkernels.api.distill.train import Runtime
from kdkernels.api.distill.units import Unit

PACE = "pace"


def make_task(
    config: DiitoConfig, runtime: Runtime, notify: fetch.Notify, whole: bool = False
) -> Any:
    """The task of a configuration; ``whole`` with the teacher's layers and examples."""
    options = TaskOptions(
        model=fetch.teacher_folder(notify) if config.model is None else Path(config.model),
        layers=None if whole else config.student_layers,
        runtime=runtime,
        train=config.teacher_labels if whole else config.labels,
        dev=config.dev,
        test=config.test,
        max_length=config.max_length,
        train_embeddings=config.train_embeddings,
        notify=notify,
    )
    own = None if config.data is None else Path(config.data)
    if config.masked_lm:
        return MaskedLmTask(options, WIKITEXT2_NAME if own is None else str(own))
    return encoder_task(config.task, options, own, exact=not config.quick)


class DiitoPipeline(ArmPipeline):
    """A run that compares distillation with interchanges and without."""

    def __init__(
        self,
        config: DiitoConfig,
        folder: RunFolder,
        runtime: Runtime,
        display: Display,
        task: PairedTask[Any],
    ) -> None:
        arms = [arm for arm in ARMS if arm in config.arms]
        super().__init__(config, folder, runtime, display, task, arms)
        self.config, self.paired = config, task

    def own_files(self) -> Sequence[Path]:
        """The files of the user's own data."""
        if self.config.data is None:
            return []
        path = Path(self.config.data)
        masked_lm = self.config.masked_lm
        return mlm_data.data_files(path) if masked_lm else data_files(self.config.task, path)

    def preparing(self) -> list[Unit]:
        """How much longer a step with interchanges takes."""
        if "kd-time" not in self.arms:
            return []
        return [Unit(PACE, "pace of a step", lambda unit, bar: self._pace())]

    def write(self, found: ArmResults) -> None:
        """Writes the report."""
        pace = self.folder.result(PACE)
        diito_report.write(self.folder.path, self.config, found, self.task, self.runtime, pace)

    def train_teacher(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Trains the whole model on the task, or takes it as it is."""
        task = make_task(self.config, self.runtime, self.display.note, whole=True)
        if self.config.teacher_epochs:
            trained = diito_train.fit_teacher(
                task, self.config, TEACHER_SEED, self.listener(unit, bar)
            )
        else:
            trained = Trained(task.new_model(TEACHER_SEED))
        result = self.result(task, trained)
        write_folder(self._teacher_folder, lambda path: task.save(trained.model, path))
        return result

    def train_arm(self, arm: str, seed: int, unit: str, bar: Bar) -> Trained:
        """Trains one student."""
        longer = self._units.result(PACE)["ratio"] if arm == "kd-time" else 1.0
        return diito_train.fit_student(
            self.paired,
            self._student_model(seed),
            self._teacher,
            self.config,
            interchanges=arm == "diito",
            seed=seed,
            on_event=self.listener(unit, bar),
            longer=longer,
        )

    def _pace(self) -> dict[str, Any]:
        return dict(
            diito_train.pace(
                self.paired, lambda: self._student_model(0), self._teacher, self.config
            )
        )

    @property
    def _teacher_folder(self) -> Path:
        return self.folder.path / TEACHER

    @cached_property
    def _teacher(self) -> Any:
        """The trained teacher."""
        model = models.load_headed(
            self._teacher_folder, self.paired.heading, TEACHER, seed=TEACHER_SEED
        )
        model.requires_grad_(False)
        return model.to(self.runtime.device).eval()

    def _student_model(self, seed: int) -> Any:
        """A student before training.

        Of a masked language model the teacher's layers, embeddings and head; of a classifier the
        layers of the model that was given, with a head of their own where that has none: those of a
        teacher that has been fine-tuned here would know its labels.
        """
        if not self.config.masked_lm:
            return self.paired.new_model(seed)
        model = models.cut_model(self._teacher, self.config.student_layers)
        return self.paired.ready(model.requires_grad_(True))
