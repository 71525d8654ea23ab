"""The definition of ``kd_shard``'s three steps in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.ops.kd_loss.reference import capped_logits
from kdkernels.ops.kd_loss.spec import Divergence, Spec
from kdkernels.ops.kd_shard.spec import IGNORED, Found, Merged

_INF = torch.inf


def kd_shard_found_reference(
    student: Tensor,  # [rows, classes]
    teacher: Tensor | None,  # [rows, classes]
    places: Tensor | None,  # [rows] int64
    spec: Spec,
) -> Tensor:
    """``[len(Found), rows]``; see ``op.py`` for the contract."""
    shard = _Shard(student, teacher, places, spec)
    z, found = shard.z, shard.z.new_zeros((len(Found), student.shape[0]))
    top = _top(z)
    d = z - top[:, None]
    e = (d / shard.temperature).exp()
    found[Found.STUDENT_TOP] = top
    found[Found.STUDENT_SUM] = e.sum(1)
    found[Found.STUDENT_SUM_1] = d.exp().sum(1)
    if places is not None and spec.needs_ce:
        here = places >= 0
        label = z.gather(1, torch.where(here, places, 0)[:, None])[:, 0]
        found[Found.LABEL] = torch.where(here, label, 0.0)
    if spec.needs_ce and spec.label_smoothing != 0.0:
        live = d > -_INF
        found[Found.LIVE] = live.sum(1).to(z.dtype)
        found[Found.LOGITS] = torch.where(live, d, 0.0).sum(1)
    t = shard.t
    if t is None:
        return found
    top_t = _top(t)
    d_t = t - top_t[:, None]
    e_t = (d_t / shard.temperature).exp()
    found[Found.TEACHER_TOP] = top_t
    found[Found.TEACHER_SUM] = e_t.sum(1)
    if spec.divergence == Divergence.FORWARD_KL.value:
        found[Found.GAP] = _expectation(e_t, d_t - d)
    elif spec.divergence == Divergence.SOFT_CE.value:
        found[Found.GAP] = _expectation(e_t, -d)
    elif spec.divergence == Divergence.REVERSE_KL.value:
        found[Found.GAP] = _expectation(e, d - d_t)
    return found


def kd_shard_middle_reference(
    student: Tensor, teacher: Tensor, places: Tensor | None, merged: Tensor, spec: Spec
) -> Tensor:
    """``[2, rows]``: of the classes here the value of D and ``Merged.MEAN``."""
    p_s, p_t = _Shard(student, teacher, places, spec).probabilities(merged)
    if spec.divergence == Divergence.TVD.value:
        gap = p_s - p_t
        return torch.stack([0.5 * gap.abs().sum(1), (p_s * gap.sign()).sum(1)])
    log_m = _log_mixture(p_s, p_t, spec.beta)
    of_s = _expectation(p_s, p_s.log() - log_m)
    of_t = _expectation(p_t, p_t.log() - log_m)
    return torch.stack([spec.beta * of_t + (1.0 - spec.beta) * of_s, of_s])


def kd_shard_grad_reference(
    student: Tensor,
    teacher: Tensor | None,
    places: Tensor | None,
    merged: Tensor,
    spec: Spec,
) -> Tensor:
    """The gradient of the loss for the logits that are here, in the dtype of the sums."""
    shard = _Shard(student, teacher, places, spec)
    z, weight = shard.z, merged[Merged.WEIGHT][:, None]
    d = z - merged[Merged.STUDENT_TOP][:, None]
    grad = torch.zeros_like(z)
    if spec.needs_divergence and spec.kd_weight != 0.0:
        grad += weight * (spec.kd_weight / spec.temperature) * _slope(shard, merged, spec)
    log_sum = merged[Merged.STUDENT_SUM_1].log()
    factor = spec.ce_weight + 2.0 * spec.z_loss * (merged[Merged.STUDENT_TOP] + log_sum)
    if spec.ce_weight != 0.0 or spec.needs_z:
        grad += weight * factor[:, None] * (d.exp() / merged[Merged.STUDENT_SUM_1][:, None])
    if spec.ce_weight != 0.0:
        share = spec.label_smoothing * spec.ce_weight
        if share != 0.0:
            grad -= (z > -_INF) * (weight * share / merged[Merged.LIVE][:, None])
        assert places is not None
        here = (places >= 0)[:, None]
        hot = torch.where(here, -weight * spec.ce_weight * (1.0 - spec.label_smoothing), 0.0)
        grad.scatter_add_(1, torch.where(here, places[:, None], 0), hot)
    grad *= spec.student_scale
    if spec.student_softcap != 0.0:
        slope = 1.0 - (z / spec.student_softcap).square()
        grad *= slope.masked_fill(z == -_INF, 0.0)
    return grad.masked_fill_(~shard.valid[:, None], 0.0)


class _Shard:
    """The logits that are here, after scale and soft-cap."""

    def __init__(
        self, student: Tensor, teacher: Tensor | None, places: Tensor | None, spec: Spec
    ) -> None:
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        rows, classes = student.shape
        self.temperature = spec.temperature if spec.needs_divergence else 1.0
        self.valid = torch.ones(rows, dtype=torch.bool, device=student.device)
        if places is not None:
            self.valid = places != IGNORED
        of_student = spec.student_scale, spec.student_softcap
        self.z = capped_logits(student, self.valid, classes, *of_student, dtype)
        self.t: Tensor | None = None
        if spec.needs_teacher:
            assert teacher is not None
            of_teacher = spec.teacher_scale, spec.teacher_softcap
            self.t = capped_logits(teacher, self.valid, classes, *of_teacher, dtype)

    def probabilities(self, merged: Tensor) -> tuple[Tensor, Tensor]:
        """Of student and teacher at the temperature."""
        assert self.t is not None
        return (
            self._softmax(self.z, merged[Merged.STUDENT_TOP], merged[Merged.STUDENT_SUM]),
            self._softmax(self.t, merged[Merged.TEACHER_TOP], merged[Merged.TEACHER_SUM]),
        )

    def _softmax(self, z: Tensor, top: Tensor, total: Tensor) -> Tensor:
        return ((z - top[:, None]) / self.temperature).exp() / total[:, None]


def _top(z: Tensor) -> Tensor:
    """The largest logit, finite: differences to it of masked classes stay ``-inf``."""
    return z.amax(1).clamp(min=torch.finfo(torch.float32).min)


def _expectation(e: Tensor, values: Tensor) -> Tensor:
    """``[rows]``: a class without mass adds nothing, whatever its value."""
    return (e * torch.where(e > 0, values, 0.0)).sum(1)


def _log_mixture(p_s: Tensor, p_t: Tensor, beta: float) -> Tensor:
    """Of the JSD, in the form that is exactly ``p`` where both agree."""
    return (p_s + beta * (p_t - p_s)).clamp(min=torch.finfo(p_s.dtype).tiny).log()


def _slope(shard: _Shard, merged: Tensor, spec: Spec) -> Tensor:
    """The derivative of D by ``z / T``."""
    p_s, p_t = shard.probabilities(merged)
    kind, mean = spec.divergence, merged[Merged.MEAN][:, None]
    if kind in (Divergence.FORWARD_KL.value, Divergence.SOFT_CE.value):
        return p_s - p_t
    if kind == Divergence.TVD.value:
        return 0.5 * p_s * ((p_s - p_t).sign() - mean)
    if kind == Divergence.JSD.value:
        ratio = torch.where(p_s > 0, p_s.log() - _log_mixture(p_s, p_t, spec.beta), 0.0)
        return (1.0 - spec.beta) * p_s * (ratio - mean)
    assert shard.t is not None
    d_s = shard.z - merged[Merged.STUDENT_TOP][:, None]
    d_t = shard.t - merged[Merged.TEACHER_TOP][:, None]
    return p_s * torch.where(p_s > 0, (d_s - d_t) / shard.temperature - mean, 0.0)
