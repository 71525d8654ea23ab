"""The definition of ``kd_loss`` in PyTorch: what every kernel is judged against.

Plain differentiable PyTorch, so it serves as a backend of its own (any device, double backward,
``torch.func``), as the oracle of the tests when given float64, and as the eager baseline.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdkernels.ops.kd_loss.spec import Divergence, Spec


def kd_loss_reference(
    student: Tensor,  # [rows, columns >= spec.classes]
    teacher: Tensor | None,  # [rows, columns >= spec.classes]
    labels: Tensor | None,  # [rows] int64
    row_weights: Tensor | None,  # [rows]
    denominator: Tensor | None,  # []
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(loss [], parts [4], rows [rows])``; see ``op.py`` for the contract."""

    def divergence(z: Tensor, valid: Tensor) -> Tensor:
        t = None
        if teacher is not None:
            scale, cap = spec.teacher_scale, spec.teacher_softcap
            t = capped_logits(teacher, valid, z.shape[1], scale, cap, z.dtype)
        return _divergence(z, t, z > -torch.inf, labels, valid, spec)

    return reduced_rows(student, labels, row_weights, denominator, spec, divergence)


def reduced_rows(
    student: Tensor,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    divergence_of: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """All of the loss but the divergence, which comes from the student's ``z`` and valid rows."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    valid = _valid_rows(student, labels, spec)
    classes = spec.classes if spec.classes >= 0 else student.shape[1]
    z = capped_logits(student, valid, classes, spec.student_scale, spec.student_softcap, dtype)
    log_p = z.log_softmax(1)
    live = z > -torch.inf

    zero = z.new_zeros(z.shape[0])
    ce = _cross_entropy(log_p, live, labels, valid, spec) if spec.needs_ce else zero
    divergence = divergence_of(z, valid) if spec.needs_divergence else zero
    lse_squared = z.logsumexp(1).square() if spec.needs_z else zero

    weight = valid.to(dtype)
    if row_weights is not None:
        # where, not a product: the weight of an ignored row may be NaN.
        weight = torch.where(valid, row_weights.to(dtype), 0.0)
    rows = z.masked_fill(torch.ones_like(live), 0.0).sum(1)  # zeros that belong to the graph
    for factor, term in (
        (spec.ce_weight, ce),
        (spec.kd_weight, divergence),
        (spec.z_loss, lse_squared),
    ):
        if factor != 0.0:  # an infinite term without a weight is no NaN
            rows = rows + weight * factor * term
    count = valid.sum().to(dtype)
    if denominator is not None:
        divisor = denominator.to(dtype)
        scale = 1.0 / torch.where(divisor == 0, 1.0, divisor)
    else:
        scale = 1.0 / count.clamp(min=1.0) if spec.mean else torch.ones_like(count)
    parts = torch.stack(
        [
            (weight * ce).sum() * scale,
            (weight * divergence).sum() * scale,
            (weight * lse_squared).sum() * scale,
            count,
        ]
    )
    return rows.sum() * scale, parts.detach(), rows


def _valid_rows(student: Tensor, labels: Tensor | None, spec: Spec) -> Tensor:
    if labels is None:
        return student.new_ones(student.shape[0], dtype=torch.bool)
    return labels != spec.ignore_index


def capped_logits(
    x: Tensor, valid: Tensor, classes: int, scale: float, softcap: float, dtype: torch.dtype
) -> Tensor:
    # An ignored row may hold anything, also NaN.
    z = x[:, :classes].to(dtype).masked_fill(~valid[:, None], 0.0)
    if scale != 1.0:
        z = z * scale
    if softcap != 0.0:
        masked = z == -torch.inf  # stays masked: the cap is for logits, not for masks
        z = (softcap * torch.tanh(z / softcap)).masked_fill(masked, -torch.inf)
    return z


def _pick(values: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """``values[row, label]``; NaN, also in the gradient, where the label of a valid row is out of
    range.
    """
    inside = (labels >= 0) & (labels < values.shape[1])
    picked = values.gather(1, torch.where(inside, labels, 0)[:, None])[:, 0]
    return picked * torch.where(inside | ~valid, 1.0, torch.nan)


def _cross_entropy(
    log_p: Tensor, live: Tensor, labels: Tensor | None, valid: Tensor, spec: Spec
) -> Tensor:
    assert labels is not None
    ce = -_pick(log_p, labels, valid)
    if spec.label_smoothing != 0.0:
        uniform = -torch.where(live, log_p, 0.0).sum(1) / live.sum(1)
        ce = (1.0 - spec.label_smoothing) * ce + spec.label_smoothing * uniform
    return ce


def _divergence(
    z: Tensor,
    t: Tensor | None,
    live: Tensor,
    labels: Tensor | None,
    valid: Tensor,
    spec: Spec,
) -> Tensor:
    log_s = (z / spec.temperature).log_softmax(1)
    if spec.divergence == Divergence.NEG_ENTROPY.value:
        return _expectation(log_s.exp(), log_s)
    if spec.divergence == Divergence.SPIKE.value:
        assert labels is not None
        return _spike(log_s, live, labels, valid, spec.beta)
    assert t is not None
    log_t = (t / spec.temperature).log_softmax(1)
    p_s, p_t = log_s.exp(), log_t.exp()
    if spec.divergence == Divergence.FORWARD_KL.value:
        return _expectation(p_t, log_t - log_s)
    if spec.divergence == Divergence.SOFT_CE.value:
        return _expectation(p_t, -log_s)
    if spec.divergence == Divergence.REVERSE_KL.value:
        return _expectation(p_s, log_s - log_t)
    if spec.divergence == Divergence.TVD.value:
        return 0.5 * (p_s - p_t).abs().sum(1)
    # JSD: the mixture in this form is exactly p when both models agree.
    mixture = p_s + spec.beta * (p_t - p_s)
    tiny = torch.finfo(mixture.dtype).tiny
    log_m = mixture.clamp(min=tiny).log()
    return spec.beta * _expectation(p_t, log_t - log_m) + (1.0 - spec.beta) * _expectation(
        p_s, log_s - log_m
    )


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """Sum of ``p * values`` over classes, where a class without mass adds nothing."""
    # The inner where keeps 0 * inf out of the backward pass too.
    mass = p > 0
    return (p * torch.where(mass, values, 0.0)).sum(1)


def _spike(log_s: Tensor, live: Tensor, labels: Tensor, valid: Tensor, on_label: float) -> Tensor:
    """Forward KL from the teacher with ``on_label`` on the label, the rest spread evenly."""
    others = live.sum(1).to(log_s.dtype) - 1.0
    share = torch.where(others > 0, (1.0 - on_label) / others.clamp(min=1.0), 0.0)
    at_label = torch.where(others > 0, torch.full_like(others, on_label), 1.0)
    entropy = torch.special.xlogy(at_label, at_label) + others * torch.special.xlogy(share, share)
    log_label = _pick(log_s, labels, valid)
    log_sum = torch.where(live, log_s, 0.0).sum(1)
    return entropy - (at_label - share) * log_label - share * log_sum
