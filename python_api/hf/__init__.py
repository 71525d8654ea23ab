"""For the Trainer of Hugging Face transformers, which must be installed: ``kdkernels.hf``.

``mixin`` is the trainer, ``options`` what can be set, ``teacher`` the models and caches that it
learns from, ``losses`` the loss of a batch, ``head`` the linear layer that a language model ends
in, ``hidden`` the term on hidden states, ``metrics`` what is logged, ``label_loss`` losses without
a teacher; ``averaging`` and ``sparse`` are callbacks.
"""

from kdkernels.api.hf.averaging import AveragingCallback
from kdkernels.api.hf.head import Head
from kdkernels.api.hf.label_loss import label_loss_func
from kdkernels.api.hf.mixin import DistillMixin, DistillTrainer, last_checkpoint
from kdkernels.api.hf.options import DistillArguments, DistillOptions
from kdkernels.api.hf.sparse import SparseTeacherCallback
from kdkernels.api.hf.teacher import CachedTeacher, Signals, Teacher, prepare_teacher

__all__ = [
    "AveragingCallback",
    "CachedTeacher",
    "DistillArguments",
    "DistillMixin",
    "DistillOptions",
    "DistillTrainer",
    "Head",
    "Signals",
    "SparseTeacherCallback",
    "Teacher",
    "label_loss_func",
    "last_checkpoint",
    "prepare_teacher",
]
