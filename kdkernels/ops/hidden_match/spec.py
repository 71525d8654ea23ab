"""What a ``hidden_match`` call asks for, as the plain numbers that every kernel receives."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """How two rows are compared. The numbers are those of the kernels."""

    MSE = 0
    SMOOTH_L1 = 1
    COSINE = 2
    PKD = 3


class Spec(NamedTuple):
    """The scalars of a call, in the order of the operator's schema."""

    kind: int = Kind.MSE
    beta: float = 1.0  # where smooth_l1 turns from a square to a line; 0: a line everywhere
    mean: bool = False  # divide by the number of valid rows, where there is no denominator

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spec:
        """The spec from the operator's list, in which every number has become a float."""
        kind, beta, mean = numbers
        return cls(int(kind), beta, bool(mean))
