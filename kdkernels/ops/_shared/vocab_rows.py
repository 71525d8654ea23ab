"""``kd_loss`` on rows of which each process of a group has some of the classes.

Each process reads its own logits. What it found of a row is a few numbers: the largest logit of
each model, sums of exponentials relative to it, the sum of exponentials times the difference of the
models, the label's logit. They are gathered at once and merged by every process in the same way, so
all have the same loss to the bit; see ``kdkernels/ops/kd_loss/README.md``. Plain PyTorch: no kernel
takes normalisers that come from elsewhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.ops.kd_loss.spec import Divergence, Spec

_INF = torch.inf


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


class _Model:
    """Logits of a chunk of rows on this shard; the tensor given is overwritten."""

    def __init__(self, z: Tensor, temperature: float) -> None:
        rows, size = z.shape
        self.top = z.amax(1) if size else z.new_full((rows,), -_INF)
        # A shard of masked classes alone has no largest logit, and nothing to be relative to it.
        self.reference = self.top.masked_fill(self.top == -_INF, 0.0)
        self.d = z.sub_(self.reference[:, None])
        self.e = self.d.exp() if temperature == 1.0 else (self.d / temperature).exp_()


class _Merged(NamedTuple):
    """What the processes know together of the rows of one model."""

    top: Tensor  # [rows], the largest logit
    offsets: Tensor  # [world, rows], from it to the largest of each shard


def _merged(tops: Tensor) -> _Merged:
    top = tops.amax(0)
    return _Merged(top, torch.where(tops == -_INF, 0.0, tops - top))


def _expectation(e: Tensor, values: Tensor) -> Tensor:
    """``[rows]``: a class without mass adds nothing, whatever its value (which is overwritten)."""
    return values.masked_fill_(e == 0, 0.0).mul_(e).sum(1)


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
        self.shard, self.spec, self.labels = shard, spec, labels
        valid = None if labels is None else labels != spec.ignore_index
        z = _capped(student, valid, spec.student_scale, spec.student_softcap)
        rows = z.shape[0]
        self.valid = z.new_ones((rows,), dtype=torch.bool) if valid is None else valid
        self.place, self.here = self._label(z)
        self._numbers: dict[str, Tensor] = {}
        if spec.needs_ce:
            found = z.gather(1, self.place[:, None])[:, 0] if z.shape[1] else z.new_zeros((rows,))
            self._numbers["label"] = torch.where(self.here, found, 0.0)
        self.slope = None
        if spec.student_softcap != 0.0:  # not to be had again from differences: it cancels
            ratio = (z / spec.student_softcap).square_()
            self.slope = (1.0 - ratio).masked_fill_(ratio == _INF, 0.0)
        self.student = _Model(z, spec.temperature)
        self.teacher = None
        if spec.needs_divergence:
            assert teacher is not None
            t = _capped(teacher, valid, spec.teacher_scale, spec.teacher_softcap)
            self.teacher = _Model(t, spec.temperature)
        self.e1 = self.student.e
        if spec.temperature != 1.0 and (spec.needs_ce or spec.needs_z):
            self.e1 = self.student.d.exp()
        self._collect()
        self._merge()
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

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, parts and rows, as of ``kd_loss``."""
        rows = self.weight * self.rows
        parts = [(self.weight * term).sum() * self.scale for term in self.terms]
        parts.append(self.valid.sum().to(rows))
        dtype = self.student.d.dtype
        found = rows.sum() * self.scale, torch.stack(parts), rows
        return found[0].to(dtype), found[1].to(dtype), found[2].to(dtype)

    def gradient(self) -> Tensor:
        """Of the loss, for the logits that are here."""
        spec, student = self.spec, self.student
        weight = self.weight * self.scale
        grad = None
        if spec.needs_divergence and spec.kd_weight != 0.0:
            grad = self._of_divergence()
            grad *= self._column(weight * (spec.kd_weight / spec.temperature))
        if spec.ce_weight != 0.0 or spec.needs_z:
            factor = weight.new_full(weight.shape, spec.ce_weight)
            if spec.needs_z:
                factor = factor + 2.0 * spec.z_loss * (self.of_student.top + self.log_1)
            own = self._own(self.of_student, 1.0, self.log_1)
            mass = self.e1 * self._column(factor * weight * own)
            grad = mass if grad is None else grad.add_(mass)
        if grad is None:
            return torch.zeros_like(student.d)
        if spec.ce_weight != 0.0:
            share = spec.label_smoothing * spec.ce_weight
            if share != 0.0:
                grad.sub_((student.d > -_INF) * self._column(weight * share / self.live))
            if grad.shape[1]:
                share = spec.ce_weight * (1.0 - spec.label_smoothing)
                hot = torch.where(self.here, -weight * share, 0.0)
                grad.scatter_add_(1, self.place[:, None], self._column(hot))
        if spec.student_scale != 1.0:
            grad *= spec.student_scale
        if self.slope is not None:
            grad *= self.slope
        return grad

    def _column(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.student.d.dtype)[:, None]

    def _own(self, model: _Merged, temperature: float, log_sum: Tensor) -> Tensor:
        """``[rows]``: what makes probabilities of the exponentials of this shard."""
        return (model.offsets[self.shard.rank] / temperature - log_sum).exp()

    def _label(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The label's place among the logits that are here, and whether it is one of them."""
        if self.labels is None:
            nowhere = torch.zeros_like(self.valid)
            return nowhere.long(), nowhere
        place = self.labels - self.shard.start
        here = self.valid & (place >= 0) & (place < z.shape[1])
        return torch.where(here, place, 0), here

    def _collect(self) -> None:
        """What this process can say of the rows."""
        spec, s, t, numbers = self.spec, self.student, self.teacher, self._numbers
        numbers["student_top"] = s.top
        numbers["student_sum"] = s.e.sum(1)
        if self.e1 is not s.e:
            numbers["student_sum_1"] = self.e1.sum(1)
        if spec.needs_ce and spec.label_smoothing != 0.0:
            live = s.d > -_INF
            numbers["live"] = live.sum(1).to(s.d.dtype)
            numbers["logits"] = torch.where(live, s.d, 0.0).sum(1)
        if t is None:
            return
        numbers["teacher_top"] = t.top
        numbers["teacher_sum"] = t.e.sum(1)
        if spec.divergence == Divergence.FORWARD_KL.value:
            numbers["gap"] = _expectation(t.e, t.d - s.d)
        elif spec.divergence == Divergence.SOFT_CE.value:
            numbers["gap"] = _expectation(t.e, -s.d)
        elif spec.divergence == Divergence.REVERSE_KL.value:
            numbers["gap"] = _expectation(s.e, s.d - t.d)

    def _merge(self) -> None:
        """The numbers of all processes, relative to the largest logits of all."""
        spec, names = self.spec, list(self._numbers)
        # float64, which is next to nothing for some numbers a row.
        gathered = self.shard.gather(torch.stack(list(self._numbers.values()))).double()
        found = {name: gathered[:, i] for i, name in enumerate(names)}
        temperature = spec.temperature
        self.of_student = s = _merged(found["student_top"])
        of_s = (s.offsets / temperature).exp()
        sum_s = (found["student_sum"] * of_s).sum(0)
        self.log_s = self.log_1 = sum_s.log()
        if "student_sum_1" in found:
            self.log_1 = (found["student_sum_1"] * s.offsets.exp()).sum(0).log()
        if "label" in found:
            self.label = found["label"].sum(0) - s.top
        if "live" in found:
            self.live = found["live"].sum(0)
            self.logits = (found["logits"] + found["live"] * s.offsets).sum(0)
        if "teacher_top" not in found:
            return
        self.of_teacher = t = _merged(found["teacher_top"])
        of_t = (t.offsets / temperature).exp()
        sum_t = (found["teacher_sum"] * of_t).sum(0)
        self.log_t = sum_t.log()
        if "gap" not in found:
            return
        if spec.divergence == Divergence.REVERSE_KL.value:
            shift = found["student_sum"] * (s.offsets - t.offsets)
            gap = ((found["gap"] + shift) * of_s).sum(0) / sum_s
        else:
            between = t.offsets - s.offsets
            if spec.divergence == Divergence.SOFT_CE.value:
                between = -s.offsets
            gap = ((found["gap"] + found["teacher_sum"] * between) * of_t).sum(0) / sum_t
        self.gap = gap / temperature

    def _losses(self) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """``[rows]``: the loss, and CE, D and the squared log-partition that it is made of."""
        spec = self.spec
        zero = torch.zeros_like(self.log_s)
        ce = divergence = squared = zero
        if spec.needs_ce:
            ce = self.log_1 - self.label
            if spec.label_smoothing != 0.0:
                uniform = self.log_1 - self.logits / self.live
                ce = (1.0 - spec.label_smoothing) * ce + spec.label_smoothing * uniform
            ce = torch.where(self.valid, ce, 0.0)
        if spec.needs_divergence:
            divergence = self._divergence()
        if spec.needs_z:
            squared = (self.of_student.top + self.log_1).square()
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
        if kind == Divergence.FORWARD_KL.value:
            return self.gap - self.log_t + self.log_s
        if kind == Divergence.SOFT_CE.value:
            return self.gap + self.log_s
        if kind == Divergence.REVERSE_KL.value:
            return self.gap - self.log_s + self.log_t
        # These need the probabilities before they can be summed: a second exchange.
        value, self.inner, self.outer = self._of_probabilities()
        numbers = self.shard.gather(torch.stack([value, self.inner])).double().sum(0)
        value, self.inner = numbers.unbind()
        return value

    def _probabilities(self) -> tuple[Tensor, Tensor]:
        """Of both models, for the classes that are here."""
        assert self.teacher is not None
        temperature = self.spec.temperature
        of_s = self._own(self.of_student, temperature, self.log_s)
        of_t = self._own(self.of_teacher, temperature, self.log_t)
        return self.student.e * self._column(of_s), self.teacher.e * self._column(of_t)

    def _of_probabilities(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of JSD and TVD, this shard's part of the value and of ``sum p_s g``, and ``g`` itself:
        the gradient is in proportion to ``p_s (g - sum p_s g)``.
        """
        p_s, p_t = self._probabilities()
        if self.spec.divergence == Divergence.TVD.value:
            gap = p_s - p_t
            g = gap.sign()
            return 0.5 * gap.abs_().sum(1), (p_s * g).sum(1), g
        beta = self.spec.beta
        log_m = (p_s + beta * (p_t - p_s)).clamp_(min=torch.finfo(p_s.dtype).tiny).log_()
        of_t = _expectation(p_t, p_t.log() - log_m)
        g = (p_s.log() - log_m).masked_fill_(p_s == 0, 0.0)
        of_s = (p_s * g).sum(1)
        return beta * of_t + (1.0 - beta) * of_s, of_s, g

    def _of_divergence(self) -> Tensor:
        """The gradient of D by ``z / T``."""
        kind, temperature = self.spec.divergence, self.spec.temperature
        p_s, p_t = self._probabilities()
        if kind in (Divergence.FORWARD_KL.value, Divergence.SOFT_CE.value):
            return p_s.sub_(p_t)
        if kind == Divergence.REVERSE_KL.value:
            assert self.teacher is not None
            rank = self.shard.rank
            shift = (self.of_student.offsets - self.of_teacher.offsets)[rank] / temperature
            d = (self.student.d - self.teacher.d).div_(temperature)
            d += self._column(shift - self.gap)  # of both the log-sums cancel
            return d.masked_fill_(p_s == 0, 0.0).mul_(p_s)
        factor = 0.5 if kind == Divergence.TVD.value else 1.0 - self.spec.beta
        return p_s.mul_(self.outer.sub(self._column(self.inner))).mul_(factor)


def _capped(z: Tensor, valid: Tensor | None, scale: float, softcap: float) -> Tensor:
    """In place; a row that does not count may hold anything, also NaN."""
    if valid is not None:
        z.masked_fill_(~valid[:, None], 0.0)
    if scale != 1.0:
        z *= scale
    if softcap != 0.0:
        masked = z == -_INF  # stays masked: the cap is for logits, not for masks
        z.div_(softcap).tanh_().mul_(softcap).masked_fill_(masked, -_INF)
    return z
