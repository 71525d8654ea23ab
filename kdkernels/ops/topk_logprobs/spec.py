"""What a ``topk_logprobs`` call asks for, as the plain numbers that every kernel receives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Spec(NamedTuple):
    """The scalars of a call, in the order of the operator's schema.

    ``z = softcap * tanh(scale * x / softcap)`` of the first ``classes`` columns, and the
    distribution is ``softmax(z / temperature)``.
    """

    temperature: float = 1.0
    scale: float = 1.0  # positive: the order of z is that of x
    softcap: float = 0.0  # 0: none
    classes: int = -1  # columns from here on are padding; -1: no padding

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spec:
        """The spec from the operator's list, in which every number has become a float."""
        spec = cls(*numbers)  # type: ignore[arg-type]
        return spec._replace(classes=int(spec.classes))

    def classes_of(self, columns: int) -> int:
        """How many of the columns are classes."""
        return columns if self.classes < 0 else self.classes
