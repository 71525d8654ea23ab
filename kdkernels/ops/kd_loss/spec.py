"""What a ``kd_loss`` call asks for, as the plain numbers that every kernel receives."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple


class Divergence(enum.IntEnum):
    """The teacher-student term ``D``; the numbers are shared with ``csrc/kd_loss/kd_loss.h``.

    Compare a spec's number with ``Divergence.X.value``: under ``torch.compile(dynamic=True)`` the
    comparison of a symbolic integer with the enum member itself is traced as false (torch 2.13).
    """

    NONE = 0
    FORWARD_KL = 1  # sum_t p_t (log p_t - log p_s)
    SOFT_CE = 2  # forward KL plus the teacher's entropy: - sum p_t log p_s
    REVERSE_KL = 3  # sum p_s (log p_s - log p_t)
    JSD = 4  # beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = (1 - beta) p_s + beta p_t
    TVD = 5  # 0.5 sum |p_s - p_t|
    SPIKE = 6  # forward KL from a virtual teacher: beta on the label, the rest spread evenly
    NEG_ENTROPY = 7  # sum p_s log p_s


class Tail(enum.IntEnum):
    """What stands for the teacher's mass outside of its listed classes, where it is sparse."""

    FULL = 0  # not sparse: a logit for every class
    BUCKET = 1  # one more class, in both models
    RENORM = 2  # nothing: both models are normalised over the listed classes
    NONE = 3  # nothing: the sum is cut off
    UNIFORM = 4  # spread evenly over the other live classes


# What the row kernels make of a spec with a tail: some classes are met one by one, the others as
# one lot, of whose gradient the second needs more than a sum. As in csrc/kd_loss/kd_loss.h.
LISTED, LISTED_ENTROPY = 8, 9


class Spec(NamedTuple):
    """The scalars of a call, in the order of the operator's schema.

    Per valid row, with ``z = softcap * tanh(scale * x / softcap)`` of each model's first
    ``classes`` columns, ``p_s = softmax(z_s / temperature)`` and ``p_t`` likewise::

        row = ce_weight * CE(z_s, label) + kd_weight * D(p_t, p_s) + z_loss * logsumexp(z_s)**2
    """

    divergence: int = Divergence.NONE
    beta: float = 0.5  # JSD: weight of the teacher; SPIKE: probability on the label
    temperature: float = 1.0
    ce_weight: float = 0.0
    kd_weight: float = 0.0  # a T^2 factor is already in it
    label_smoothing: float = 0.0  # share spread over all classes that are not -inf
    z_loss: float = 0.0
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    student_softcap: float = 0.0  # 0: none
    teacher_softcap: float = 0.0
    ignore_index: int = -100
    classes: int = -1  # columns from here on are padding: no mass, zero gradient; -1: no padding
    mean: bool = True  # divide by the number of valid rows (unless a denominator is given)
    want_ce: bool = False  # report CE even where its weight is 0
    tail: int = Tail.FULL  # of a sparse teacher (topk_kd_loss)

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spec:
        """The spec from the operator's list, in which every number may have become a float."""
        spec = cls(*numbers)  # type: ignore[arg-type]
        return spec._replace(
            divergence=int(spec.divergence),
            ignore_index=int(spec.ignore_index),
            classes=int(spec.classes),
            mean=bool(spec.mean),
            want_ce=bool(spec.want_ce),
            tail=int(spec.tail),
        )

    @property
    def needs_ce(self) -> bool:
        """Whether CE has to be computed."""
        return self.ce_weight != 0.0 or self.want_ce

    @property
    def needs_teacher(self) -> bool:
        """Whether D reads a teacher's logits."""
        return 1 <= self.divergence <= 5 and self.tail == 0

    @property
    def needs_divergence(self) -> bool:
        """Whether D has to be computed."""
        return self.divergence != Divergence.NONE.value

    @property
    def needs_labels(self) -> bool:
        """Whether the values of labels matter, beyond which rows they leave out."""
        return self.needs_ce or self.divergence == Divergence.SPIKE.value

    @property
    def needs_z(self) -> bool:
        """Whether the squared log-partition has to be computed."""
        return self.z_loss != 0.0
