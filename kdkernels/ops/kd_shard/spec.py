"""The rows of the tensors in which processes say what they found of a row of logits.

As in ``csrc/kd_shard/kd_shard.h``. Logits are those after scale and soft-cap, ``T`` is the
temperature (1 where there is no divergence), and "live" classes are those whose student logit is
not ``-inf``. Where no class of a model is live its largest logit is the lowest float.
"""

from __future__ import annotations

import enum

# Places of labels that are not those of a class here.
ELSEWHERE, IGNORED = -1, -2


class Found(enum.IntEnum):
    """Of the classes that are here, with ``d = z - (largest z here)`` of each model."""

    STUDENT_TOP = 0  # the largest logit
    STUDENT_SUM = 1  # sum exp(d / T)
    TEACHER_TOP = 2
    TEACHER_SUM = 3
    # Forward KL: sum exp(d_t / T) (d_t - d_s). Soft CE: sum exp(d_t / T) (-d_s).
    # Reverse KL: sum exp(d_s / T) (d_s - d_t). Others: 0.
    GAP = 4
    STUDENT_SUM_1 = 5  # sum exp(d); where nothing needs it, it may be STUDENT_SUM
    LIVE = 6  # live classes, where the loss smooths labels
    LOGITS = 7  # sum of d over them
    LABEL = 8  # the label's logit; 0 where it is not here


class Merged(enum.IntEnum):
    """Of all classes, with ``d = z - (largest z of all)`` of each model."""

    STUDENT_TOP = 0
    STUDENT_SUM = 1
    TEACHER_TOP = 2
    TEACHER_SUM = 3
    # What the gradient is relative to. Reverse KL: sum p_s (d_s - d_t) / T. JSD: sum p_s log(p_s /
    # m), TVD: sum p_s sign(p_s - p_t), from the second step. Others: not read.
    MEAN = 4
    STUDENT_SUM_1 = 5
    LIVE = 6
    WEIGHT = 7  # what the row's loss is multiplied by
