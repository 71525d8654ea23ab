"""A callback that changes the level of a sparse teacher while its student trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from transformers import TrainerCallback

from kdkernels.api.methods.stark import SparseTeacher

__all__ = ["SparseTeacherCallback"]

NAME = "SparseTeacherCallback"
Schedule = Callable[[int], float] | Sequence[tuple[int, float]]


class SparseTeacherCallback(TrainerCallback):
    """Gives a sparse teacher its level for each optimizer step.

    The level is a function of ``global_step`` alone, so that a training that resumes goes on with
    the right one; nothing is saved.

    Args:
        sparse: whose model is the trainer's teacher.
        schedule: ``level = schedule(step)`` with the step from 0 on, or pairs ``(step, level)`` in
            rising order of steps, each level holding from its step on; before the first it is 0.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: pairs that do not rise.

    Example:
        A teacher that is cut further as the student learns::

            sparse = kdkernels.SparseTeacher(teacher, scores)
            callback = kdkernels.hf.SparseTeacherCallback(sparse, [(0, 0.2), (500, 0.4)])
            DistillTrainer(student, arguments, teacher=sparse.model, callbacks=[callback], ...)
    """

    def __init__(self, sparse: SparseTeacher, schedule: Schedule) -> None:
        if not isinstance(sparse, SparseTeacher):
            raise TypeError(f"{NAME}: sparse must be a SparseTeacher, got {type(sparse).__name__}")
        if not callable(schedule):
            steps = [step for step, _ in schedule]
            if not steps or any(a >= b for a, b in pairwise(steps)):
                raise ValueError(f"{NAME}: schedule must have rising steps, got {steps}")
        self._sparse, self._schedule = sparse, schedule
        self._level: float | None = None

    def level(self, step: int) -> float:
        """The level of a step."""
        if callable(self._schedule):
            return float(self._schedule(step))
        return next((level for start, level in reversed(self._schedule) if start <= step), 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first micro-batch of each step."""
        level = self.level(state.global_step)
        if level != self._level:  # cutting costs some time
            self._sparse.sparsify(level)
            self._level = level
