"""Tasks over encoders by the names that commands know them by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kdkernels.api.distill.data import Limits
from kdkernels.api.distill.glue import TASKS as GLUE
from kdkernels.api.distill.glue import find_files
from kdkernels.api.distill.own_data import load_own
from kdkernels.api.distill.task import Task, TaskOptions
from kdkernels.api.distill.tasks.classification import (
    ClassificationTask,
    sentiment_task,
    topic_task,
)
from kdkernels.api.distill.tasks.glue import glue_task
from kdkernels.api.distill.tasks.qa import shifts_task, squad_task
from kdkernels.api.distill.tasks.tagging import conll2003_task, conll_task
from kdkernels.api.distill.topics import SETS


def encoder_task(
    name: str,
    options: TaskOptions,
    own: Path | None,
    transfer: int | None = None,
    exact: bool = True,
) -> Task[Any]:
    """The task of a name.

    Args:
        name: ``sentiment``, a set of topics, ``ner``, ``qa`` or a task of GLUE.
        options: Model and limits.
        own: The user's own data.
        transfer: Number of texts without labels, where there are such; None for all.
        exact: Whether limits that own texts do not reach are errors.
    """
    if name == "ner":
        return conll2003_task(options) if own is None else conll_task(options, own)
    if name == "qa":
        return shifts_task(options) if own is None else squad_task(options, own)
    if name in GLUE:
        return glue_task(options, name, own)
    if name in SETS:
        return topic_task(options, name)
    if own is None:
        return sentiment_task(replace(options, train=None), options.train, transfer)
    limits = Limits(options.train, transfer, options.test, exact=exact)
    return ClassificationTask(replace(options, train=None, test=None), load_own(own, limits))


def data_files(name: str, data: Path) -> list[Path]:
    """The files that a task reads of the user's own data."""
    return find_files(name, data) if name in GLUE else [data]
