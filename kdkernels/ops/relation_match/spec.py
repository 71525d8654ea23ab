"""What a ``relation_match`` call asks for, as the plain numbers that every backend receives."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """How two rows of scores are compared."""

    KL = 0  # KL(softmax(teacher) || softmax(student))
    MSE = 1  # mean of the squared differences over valid keys


class Spec(NamedTuple):
    """The scalars of a call, in the order of the operator's schema."""

    kind: int = Kind.KL
    student_scale: float = 1.0  # scores = scale * <query, key>
    teacher_scale: float = 1.0
    causal: bool = False  # a query sees the keys up to its own place
    mean: bool = False  # divide by the number of valid rows, where there is no denominator

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spec:
        """The spec from the operator's list, in which every number has become a float."""
        kind, student_scale, teacher_scale, causal, mean = numbers
        return cls(int(kind), student_scale, teacher_scale, bool(causal), bool(mean))
