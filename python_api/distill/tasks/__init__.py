"""The tasks that methods train on, one module each; all of them are a ``distill.task.Task``."""

from kdkernels.api.distill.tasks.classification import (
    ClassificationTask,
    sentiment_task,
    topic_task,
)
from kdkernels.api.distill.tasks.glue import GlueTask, glue_task
from kdkernels.api.distill.tasks.language_model import LanguageModelTask
from kdkernels.api.distill.tasks.masked_lm import MaskedLmTask
from kdkernels.api.distill.tasks.qa import QaTask, shifts_task, squad_task
from kdkernels.api.distill.tasks.tagging import TaggingTask, conll2003_task, conll_task

__all__ = [
    "ClassificationTask",
    "GlueTask",
    "LanguageModelTask",
    "MaskedLmTask",
    "QaTask",
    "TaggingTask",
    "conll2003_task",
    "conll_task",
    "glue_task",
    "sentiment_task",
    "shifts_task",
    "squad_task",
    "topic_task",
]
