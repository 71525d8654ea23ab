"""One trial: a student, its loss, its figures and what it cost."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdkernels.api.distill import train
from kdkernels.api.distill.tables import versions
from kdkernels.api.distill.task import SPLITS, TaskOptions
from kdkernels.api.distill.train import Runtime
from kdkernels.api.study import teacher
from kdkernels.api.study.grid import Trial
from kdkernels.api.study.students import model_folder, new_model
from kdkernels.api.study.tasks import RegularisedTask, make_task
from kdkernels.api.study.teacher import LogitsCache, Taught

OnEvent = Callable[[dict[str, Any]], None]
# Linux: writing 5 there makes the peak of a process's memory start anew.
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Trainer:
    """Trains trials one after another; texts are tokenised once for each task and model.

    Args:
        folder: Where teachers' logits are kept.
        runtime: Device and precision.
        self_taught: Whether some trial learns from a trained copy of its student: baselines then
            leave their logits behind.
        notify: Receives one line per thing worth telling (download, licence).
    """

    def __init__(
        self, folder: Path, runtime: Runtime, self_taught: bool, notify: Callable[[str], None]
    ) -> None:
        self._cache = LogitsCache(folder)
        self._runtime = runtime
        self._self_taught = self_taught
        self._notify = notify
        self._tasks: dict[Any, RegularisedTask] = {}

    def run(self, trial: Trial, on_event: OnEvent) -> dict[str, Any]:
        """Trains and measures one trial.

        Args:
            trial: The trial.
            on_event: As in :func:`~kdkernels.api.distill.train.fit`; of the teacher's steps too.

        Returns:
            ``metric``, ``higher_is_better``, ``figures`` by split, ``loss`` of the last step,
            ``steps``, ``examples``, ``seconds`` of training, ``steps_per_second``, ``memory_mb``,
            ``parameters``, ``trained`` parameters, and ``teacher``: its facts, or None.
        """
        if trial.method == "ft" and self._self_taught:
            # Who needs these logits meanwhile waits for them.
            with self._cache.held(teacher.self_key(trial)):
                result, task, model = self._fit(trial, None, on_event)
                taught = teacher.predicted(task, model, result["seconds"])
                self._cache.put(teacher.self_key(trial), taught)
            return result
        return self._fit(trial, self._teacher(trial, on_event), on_event)[0]

    def task(self, trial: Trial, of_teacher: bool = False) -> RegularisedTask:
        """The task of a trial, with the student's model or with the teacher's."""
        whose = trial.teacher if of_teacher else trial.student
        assert whose is not None
        known = (trial.task, whose.model, whose.layers, trial.train_embeddings, of_teacher)
        if known not in self._tasks:
            where = f"{'teachers' if of_teacher else 'students'}.{whose.name}.model"
            options = TaskOptions(
                model=model_folder(whose.model, where, self._notify),
                layers=whose.layers,
                runtime=self._runtime,
                train_embeddings=trial.train_embeddings,
                notify=self._notify,
            )
            self._tasks[known] = make_task(trial.task, options)
        return self._tasks[known]

    def _teacher(self, trial: Trial, on_event: OnEvent) -> Taught | None:
        """What a trial learns from beside its labels."""
        if trial.loss.teacher == "teacher":
            return self._cache.get(
                teacher.teacher_key(trial),
                lambda: teacher.train_teacher(self.task(trial, True), trial, on_event),
            )
        if trial.loss.teacher == "self":
            return self._cache.get(
                teacher.self_key(trial), lambda: self._self_teacher(trial, on_event)
            )
        return None

    def _self_teacher(self, trial: Trial, on_event: OnEvent) -> Taught:
        result, task, model = self._fit(trial.baseline(), None, on_event)
        return teacher.predicted(task, model, result["seconds"])

    def _fit(
        self, trial: Trial, taught: Taught | None, on_event: OnEvent
    ) -> tuple[dict[str, Any], RegularisedTask, Any]:
        base = self.task(trial)
        task = base.regularised(trial.loss, None if taught is None else taught.logits)
        gc.collect()  # models are in cycles: the last trial's would count as this one's memory
        reset_peak(self._runtime.device)
        model = new_model(
            base, trial.initialisation, trial.seed, trial.dropout, trial.train_embeddings
        )
        losses: list[float] = []

        def listen(event: dict[str, Any]) -> None:
            if "loss" in event:
                losses.append(event["loss"])
            on_event(event)

        loop: train.Loop[Any] = train.Loop(
            lambda step: task.loss(model, step), lambda: 0.0, "dev", task.size, listen
        )
        recipe = train.Recipe(trial.epochs, trial.lr, trial.batch_size, trial.seed, evaluations=0)
        steps = task.schedule(trial.epochs, trial.batch_size, trial.seed)
        fitted = train.run(model, steps, loop, recipe)
        weights = [(p.numel(), p.requires_grad) for p in model.parameters()]
        result = {
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "loss": losses[-1],
            "steps": fitted.steps,
            "examples": fitted.examples,
            "seconds": fitted.seconds,
            "steps_per_second": fitted.steps / fitted.seconds,
            "memory_mb": peak_mb(self._runtime.device),
            "figures": {split: task.evaluate(model, split) for split in SPLITS},
            "parameters": sum(count for count, _ in weights),
            "trained": sum(count for count, trained in weights if trained),
            "teacher": None if taught is None else taught.facts,
            "machine": versions(self._runtime),
            "source": base.source,
            "licences": list(getattr(base, "licences", ())),
        }
        return result, base, model


def reset_peak(device: torch.device) -> None:
    """Makes the peak of memory start anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        try:
            CLEAR_REFS.write_text("5")
        except OSError:  # a container may forbid it: the peak is then that of the whole process
            return


def peak_mb(device: torch.device) -> float | None:
    """Peak memory since :func:`reset_peak`: of the GPU's tensors, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if not STATUS.exists():
        return None
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6
