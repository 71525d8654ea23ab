"""From the name of a task to a task: the one place where a name becomes data."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from kdkernels.api.distill import fetch
from kdkernels.api.distill.data import Limits
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.glue import TASKS as GLUE
from kdkernels.api.distill.multiemo import load_multiemo
from kdkernels.api.distill.own_data import load_own
from kdkernels.api.distill.task import Task, TaskOptions
from kdkernels.api.distill.tasks import ClassificationTask, sentiment_task, topic_task
from kdkernels.api.distill.tasks.glue import glue_task
from kdkernels.api.distill.topics import SETS

if TYPE_CHECKING:
    from kdkernels.api.study.config import TaskSpec

OWN = "own"


class RegularisedTask(Task[Any], Protocol):
    """A task whose labels can be regularised; a study needs nothing more of one."""

    def regularised(self, loss: Any, teacher_logits: Tensor | None = None) -> Task[Any]:
        """The same task, learning by a :class:`~kdkernels.LabelRegulariser`.

        Args:
            loss: The regulariser.
            teacher_logits: What :meth:`train_logits` gave of a teacher, where it needs one.
        """

    def train_logits(self, model: Any) -> Tensor:
        """A model's fp32 logits of the training examples, ``[examples, classes]``."""

    def used_tokens(self) -> Tensor:
        """The token ids that occur in the task, sorted, int64; the padding token too."""


def _sentiment(spec: TaskSpec, options: TaskOptions) -> RegularisedTask:
    # A share of the texts is without labels there, for teachers: a study needs none of these.
    return sentiment_task(replace(options, train=None), spec.labels, transfer=1)


def _topics(spec: TaskSpec, options: TaskOptions) -> RegularisedTask:
    return topic_task(options, spec.kind)


def _multiemo(spec: TaskSpec, options: TaskOptions) -> RegularisedTask:
    corpus = load_multiemo(fetch.fetch_members(fetch.MULTIEMO, options.notify))
    return ClassificationTask(options, corpus, [fetch.MULTIEMO.archive.licence])


def _glue(spec: TaskSpec, options: TaskOptions) -> RegularisedTask:
    assert spec.data is not None
    return glue_task(options, spec.kind, Path(spec.data))


def _own(spec: TaskSpec, options: TaskOptions) -> RegularisedTask:
    assert spec.data is not None
    return ClassificationTask(options, load_own(Path(spec.data), Limits()))


Maker = Callable[["TaskSpec", TaskOptions], RegularisedTask]
# Those that are downloaded; others are read from files.
BUILT_IN = ("sentiment", *SETS, "multiemo")
MAKERS: Mapping[str, Maker] = {
    "sentiment": _sentiment,
    **dict.fromkeys(SETS, _topics),
    "multiemo": _multiemo,
    **dict.fromkeys((name for name, task in GLUE.items() if task.classes), _glue),
    OWN: _own,
}


def check_name(kind: str, where: str) -> None:
    """Raises ``DistillError`` for a task that there is not."""
    if kind not in MAKERS:
        near = difflib.get_close_matches(kind, MAKERS, n=1, cutoff=0.0)[0]
        raise DistillError(
            f"{where} must be one of {', '.join(MAKERS)} ({near} is the nearest one), got {kind!r}"
        )


def make_task(spec: TaskSpec, options: TaskOptions) -> RegularisedTask:
    """The task of a name.

    Args:
        spec: Its part of the configuration.
        options: The model it is for.
    """
    limited = replace(
        options, train=spec.labels, dev=spec.dev, test=spec.test, max_length=spec.max_length
    )
    return MAKERS[spec.kind](spec, limited)
