"""``kd_loss`` on rows of which each process of a group has some of the classes.

The steps on logits are those of ``kd_shard``. Between them the processes exchange what they found
of a row: the largest logit of each model, sums of exponentials relative to it, the sum of
exponentials times the difference of the models, the label's logit. They are gathered at once and
merged by every process in the same way, so all have the same loss to the bit; see
``kdkernels/ops/kd_shard/README.md``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.ops import kd_shard
from kdkernels.ops.kd_loss.spec import Divergence, Spec
from kdkernels.ops.kd_shard.spec import ELSEWHERE, IGNORED, Found, Merged

_KLS = (Divergence.FORWARD_KL.value, Divergence.SOFT_CE.value, Divergence.REVERSE_KL.value)


def _all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    # Newer releases of torch have renamed it, and warn of the old name.
    distributed: Any = torch.distributed
    name = "all_gather_single"
    gather = getattr(distributed, name, None) or distributed.all_gather_into_tensor
    gather(out, x, group=group)


class Shard(NamedTuple):
    """The classes of this process: ``size`` from ``start`` on, of ``classes`` in all (no padding).

    Every process of the group has the same rows, cut into the same chunks.
    """

    group: Any
    rank: int
    world: int
    start: int
    size: int
    classes: int
    chunk_rows: int
    backend: str  # of the steps on logits

    def gather(self, numbers: Tensor) -> Tensor:
        """``[numbers, rows]`` of every process, ``[world, numbers, rows]``."""
        if self.world == 1:
            return numbers[None]
        found = numbers.new_empty((self.world, *numbers.shape))
        _all_gather(found.view(-1), numbers.reshape(-1), group=self.group)
        return found

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(x, group=self.group)
        return x


class Chunk:
    """A chunk of rows: their losses, and the gradient of the logits that are here."""

    def __init__(
        self,
        shard: Shard,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        row_weights: Tensor | None,
        denominator: Tensor | None,
        spec: Spec,
    ) -> None:
        self.shard, self.spec = shard, kd_shard.shard_spec(spec)
        self.student, self.teacher = student, teacher if spec.needs_teacher else None
        self.temperature = spec.temperature if spec.needs_divergence else 1.0
        self.dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        self.valid = student.new_ones((student.shape[0],), dtype=torch.bool)
        self.places: Tensor | None = None
        if labels is not None:
            self.valid = labels != spec.ignore_index
            self.places = self._places(labels)
        found = kd_shard.found(student, self.teacher, self.places, self.spec, shard.backend)
        self.merged = found.new_zeros((len(Merged), student.shape[0]), dtype=torch.float64)
        self._merge(self._exchange(found))
        self.rows, self.terms = self._losses()
        # where, not a product: the weight of a row that does not count may be NaN.
        one = torch.ones_like(self.rows) if row_weights is None else row_weights.to(self.rows)
        self.weight = torch.where(self.valid, one, 0.0)
        if spec.needs_labels and labels is not None:
            known = (labels >= 0) & (labels < shard.classes)
            self.weight = self.weight.masked_fill(self.valid & ~known, torch.nan)
        self.scale = self.rows.new_ones(())
        if denominator is not None:
            divisor = denominator.to(self.rows)
            self.scale = 1.0 / torch.where(divisor == 0, 1.0, divisor)
        self.merged[Merged.WEIGHT] = self.weight * self.scale

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, parts and rows, as of ``kd_loss``."""
        rows = self.weight * self.rows
        parts = [(self.weight * term).sum() * self.scale for term in self.terms]
        parts.append(self.valid.sum().to(rows))
        found = rows.sum() * self.scale, torch.stack(parts), rows
        return found[0].to(self.dtype), found[1].to(self.dtype), found[2].to(self.dtype)

    def gradient(self) -> Tensor:
        """That of the loss for the logits that are here."""
        return kd_shard.gradient(*self._step())

    def gradient_(self, grad: Tensor) -> None:
        """Writes it, over these logits if need be."""
        kd_shard.gradient_(*self._step(), grad)

    def _step(self) -> tuple[Tensor, Any, Tensor | None, Tensor, Spec, str]:
        """What the steps after the first take."""
        merged = self.merged.to(self.dtype)
        return self.student, self.teacher, self.places, merged, self.spec, self.shard.backend

    def _places(self, labels: Tensor) -> Tensor:
        """Where labels are among the classes here."""
        place = labels - self.shard.start
        here = (place >= 0) & (place < self.student.shape[1])
        return torch.where(self.valid, torch.where(here, place, ELSEWHERE), IGNORED)

    def _exchange(self, found: Tensor) -> dict[Found, Tensor]:
        """``[world, rows]`` of what the loss is made of, in float64: it is next to nothing."""
        spec = self.spec
        names = [Found.STUDENT_TOP, Found.STUDENT_SUM]
        if self.temperature != 1.0 and (spec.needs_ce or spec.needs_z):
            names.append(Found.STUDENT_SUM_1)
        if spec.needs_ce:
            names.append(Found.LABEL)
            if spec.label_smoothing != 0.0:
                names += [Found.LIVE, Found.LOGITS]
        if self.teacher is not None:
            names += [Found.TEACHER_TOP, Found.TEACHER_SUM]
            if spec.divergence in _KLS:
                names.append(Found.GAP)
        gathered = self.shard.gather(torch.stack([found[name] for name in names])).double()
        return {name: gathered[:, i] for i, name in enumerate(names)}

    def _merge(self, found: dict[Found, Tensor]) -> None:
        """The numbers of all processes, relative to the largest logits of all."""
        temperature, merged = self.temperature, self.merged
        top, offsets = _largest(found[Found.STUDENT_TOP])
        of_s = (offsets / temperature).exp()
        sum_s = sum_1 = (found[Found.STUDENT_SUM] * of_s).sum(0)
        if Found.STUDENT_SUM_1 in found:
            sum_1 = (found[Found.STUDENT_SUM_1] * offsets.exp()).sum(0)
        merged[Merged.STUDENT_TOP], merged[Merged.STUDENT_SUM] = top, sum_s
        merged[Merged.STUDENT_SUM_1] = sum_1
        if Found.LABEL in found:
            self.label = found[Found.LABEL].sum(0) - top
        if Found.LIVE in found:
            merged[Merged.LIVE] = found[Found.LIVE].sum(0)
            self.logits = (found[Found.LOGITS] + found[Found.LIVE] * offsets).sum(0)
        if self.teacher is None:
            return
        top_t, offsets_t = _largest(found[Found.TEACHER_TOP])
        of_t = (offsets_t / temperature).exp()
        sum_t = (found[Found.TEACHER_SUM] * of_t).sum(0)
        merged[Merged.TEACHER_TOP], merged[Merged.TEACHER_SUM] = top_t, sum_t
        if Found.GAP not in found:
            return
        gap = found[Found.GAP]
        if self.spec.divergence == Divergence.REVERSE_KL.value:
            gap = (gap + found[Found.STUDENT_SUM] * (offsets - offsets_t)) * of_s
            self.gap = merged[Merged.MEAN] = gap.sum(0) / sum_s / temperature
            return
        between = -offsets
        if self.spec.divergence == Divergence.FORWARD_KL.value:
            between = offsets_t - offsets
        self.gap = ((gap + found[Found.TEACHER_SUM] * between) * of_t).sum(0) / sum_t / temperature

    def _losses(self) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """``[rows]``: the loss, and CE, D and the squared log-partition that it is made of."""
        spec, merged = self.spec, self.merged
        log_1 = merged[Merged.STUDENT_SUM_1].log()
        zero = torch.zeros_like(log_1)
        ce = divergence = squared = zero
        if spec.needs_ce:
            ce = log_1 - self.label
            if spec.label_smoothing != 0.0:
                uniform = log_1 - self.logits / merged[Merged.LIVE]
                ce = (1.0 - spec.label_smoothing) * ce + spec.label_smoothing * uniform
            ce = torch.where(self.valid, ce, 0.0)
        if spec.needs_divergence:
            divergence = torch.where(self.valid, self._divergence(), 0.0)
        if spec.needs_z:
            squared = torch.where(self.valid, (merged[Merged.STUDENT_TOP] + log_1).square(), 0.0)
        total = zero
        for factor, term in (
            (spec.ce_weight, ce),
            (spec.kd_weight, divergence),
            (spec.z_loss, squared),
        ):
            if factor != 0.0:  # an infinite term without a weight is no NaN
                total = total + factor * term
        return total, (ce, divergence, squared)

    def _divergence(self) -> Tensor:
        kind = self.spec.divergence
        if kind not in _KLS:
            # These need the probabilities before they can be summed: a second exchange.
            numbers = self.shard.gather(kd_shard.middle(*self._step())).double().sum(0)
            value, self.merged[Merged.MEAN] = numbers.unbind()
            return value
        log_s = self.merged[Merged.STUDENT_SUM].log()
        if kind == Divergence.SOFT_CE.value:
            return self.gap + log_s
        between = log_s - self.merged[Merged.TEACHER_SUM].log()
        return self.gap + between if kind == Divergence.FORWARD_KL.value else self.gap - between


def _largest(tops: Tensor) -> tuple[Tensor, Tensor]:
    """``[rows]``, the largest logit of all, and ``[world, rows]``, from it to that of each."""
    top = tops.amax(0)
    return top, tops - top
