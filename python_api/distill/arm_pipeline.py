"""A run that compares arms over seeds: its units, their results, the model that is kept."""

from __future__ import annotations

import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from kdkernels.api.distill import arm_report, arm_results, log, swa_train
from kdkernels.api.distill.arm_results import ArmResults, title_of
from kdkernels.api.distill.config import RunConfig
from kdkernels.api.distill.progress import Bar, Display
from kdkernels.api.distill.results import TEACHER, unit_name
from kdkernels.api.distill.store import RunFolder, write_folder
from kdkernels.api.distill.task import Task
from kdkernels.api.distill.train import Runtime
from kdkernels.api.distill.units import Unit, Units


class ArmPipeline(ABC):
    """Does the units of one run in order, skipping the complete ones.

    Attributes:
        label_arms: Arms that need no teacher.
    """

    label_arms: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        runtime: Runtime,
        display: Display,
        task: Task[Any],
        arms: Sequence[str],
    ) -> None:
        self.folder = folder
        self.runtime = runtime
        self.display = display
        self.task = task
        self.arms = arms
        self._run_config = config
        self._units = Units(folder, display, self._summary)

    @abstractmethod
    def train_teacher(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Makes the teacher of the arms that have one; returns :meth:`result` of it."""

    @abstractmethod
    def train_arm(self, arm: str, seed: int, unit: str, bar: Bar) -> swa_train.Trained:
        """Trains one model."""

    @abstractmethod
    def write(self, found: ArmResults) -> None:
        """Writes the report."""

    def own_files(self) -> Sequence[Path]:
        """The files of the user's own data."""
        return []

    def preparing(self) -> list[Unit]:
        """Units between the teacher and the arms."""
        return []

    def run(self) -> None:
        """Does every unit that is not complete, then writes the report."""
        seeds, task = self._run_config.seeds, self.task
        self._check_data()
        self.display.note(task.source)
        units = []
        if set(self.arms) - set(self.label_arms):
            units.append(Unit(TEACHER, TEACHER, self.train_teacher))
        units += self.preparing()
        for arm in self.arms:
            for seed in seeds:
                title = f"{title_of(arm)}, seed {seed}"
                units.append(Unit(unit_name(arm, seed), title, self._student))
        units.append(Unit("student", "choose the model", self._keep_best))
        results = self._units.run(units)
        found = arm_results.gather(results, self.arms, seeds, task.metric, task.higher_is_better)
        self.write(found)
        self.show(found)

    def show(self, found: ArmResults) -> None:
        """Prints what was found."""
        arm_report.show(self.display.console, self.folder.path, found)

    def save(self, model: Any, folder: Path) -> None:
        """Writes the model of an arm into an existing folder."""
        self.task.save(model, folder)

    def _summary(self, result: dict[str, Any]) -> str:
        if "kept" not in result:
            return ""
        return f"test {result['kept']['test'][self.task.metric]:6.2f}"

    def _check_data(self) -> None:
        """Raises when the examples are not those the run began with."""
        digest = hashlib.sha256(self.task.source.encode())
        for path in self.own_files():  # what is downloaded is checked by its own sum
            digest.update(path.read_bytes())
        self._units.check_data(digest.hexdigest(), self._run_config.data)

    def _student(self, unit: str, bar: Bar) -> dict[str, Any]:
        """Trains and tests one model; keeps it if it is the best on dev so far."""
        arm, _, seed = unit.rpartition("-seed")
        trained = self.train_arm(arm, int(seed), unit, bar)
        result = self.result(self.task, trained)
        if self._best([*self._done(), (unit, result)]) == unit:
            with trained.kept() as model:
                write_folder(self.folder.state / unit, lambda path: self.save(model, path))
        return result

    def result(self, task: Task[Any], trained: swa_train.Trained) -> dict[str, Any]:
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

    def listener(self, unit: str, bar: Bar) -> Any:
        """What takes the events of a training: the screen, and the run's log."""
        return log.listener(self.folder, unit, bar, "figure")

    def _done(self) -> list[tuple[str, dict[str, Any]]]:
        names = [unit_name(arm, seed) for arm in self.arms for seed in self._run_config.seeds]
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
