"""Teachers' logits: computed once for each teacher and task, kept exactly, shared by all trials."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kdkernels.api._files import locked, write_file
from kdkernels.api.distill import train
from kdkernels.api.distill.pipeline import TEACHER_SEED
from kdkernels.api.study.grid import Trial, digest, task_settings, teacher_settings
from kdkernels.api.study.tasks import RegularisedTask


@dataclass(frozen=True)
class Taught:
    """A teacher's logits with what they cost.

    Attributes:
        logits: fp32 ``[training examples, classes]``.
        facts: ``examples``, ``fit_seconds``, ``pass_seconds``, and its figures on dev and test.
    """

    logits: Tensor
    facts: dict[str, Any]


class LogitsCache:
    """Logits in a folder, one file for each teacher; safe between processes.

    A file appears whole or not at all, and under a lock: two that need the same logits at a time
    compute them once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str, compute: Callable[[], Taught]) -> Taught:
        """The logits of a key, computed where there are none yet."""
        with self.held(key):
            found = self.find(key)
            if found is None:
                self.put(key, compute())
                found = self.find(key)
        assert found is not None
        return found

    @contextmanager
    def held(self, key: str) -> Iterator[None]:
        """The lock of a key for the duration of the block; it goes with the process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with locked(self._folder / f".{key}.lock"):
            yield

    def find(self, key: str) -> Taught | None:
        """The logits of a key, None where there are none."""
        from safetensors import safe_open

        path = self._path(key)
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
            return Taught(file.get_tensor("logits"), facts)

    def put(self, key: str, taught: Taught) -> None:
        """Keeps the logits of a key."""
        from safetensors.torch import save_file

        tensors, facts = {"logits": taught.logits}, {"facts": json.dumps(taught.facts)}
        write_file(self._path(key), lambda path: save_file(tensors, path, facts))

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"


def teacher_key(trial: Trial) -> str:
    """The key of the teacher's logits of a trial's task."""
    assert trial.teacher is not None
    values = {"teacher": teacher_settings(trial.teacher), "task": task_settings(trial.task)}
    return "teacher-" + digest({**values, "precision": trial.precision})


def self_key(trial: Trial) -> str:
    """The key of the logits that a trial's own baseline gives."""
    return "self-" + digest(trial.baseline().settings)


def train_teacher(
    task: RegularisedTask, trial: Trial, on_event: Callable[[dict[str, Any]], None]
) -> Taught:
    """Fine-tunes the teacher of a trial on its labels and predicts its training examples.

    Args:
        task: The trial's task with the teacher's model.
        trial: The trial.
        on_event: As in :func:`~kdkernels.api.distill.train.fit`.
    """
    teacher = trial.teacher
    assert teacher is not None
    model = task.new_model(TEACHER_SEED)
    recipe = train.Recipe(
        teacher.epochs, teacher.lr, teacher.batch_size, TEACHER_SEED, evaluations=0
    )
    steps = task.schedule(teacher.epochs, teacher.batch_size, TEACHER_SEED)
    loop: train.Loop[Any] = train.Loop(
        lambda step: task.loss(model, step), lambda: 0.0, "dev", task.size, on_event
    )
    fitted = train.run(model, steps, loop, recipe)
    return predicted(task, model, fitted.seconds)


def predicted(task: RegularisedTask, model: Any, fit_seconds: float) -> Taught:
    """The logits of a trained model, and its figures."""
    started = time.perf_counter()
    logits = task.train_logits(model)
    facts = {
        "examples": len(logits),
        "fit_seconds": fit_seconds,
        "pass_seconds": time.perf_counter() - started,
        "figures": {split: task.evaluate(model, split) for split in ("dev", "test")},
    }
    return Taught(logits, facts)
