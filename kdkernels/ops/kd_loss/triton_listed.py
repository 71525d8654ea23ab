"""The list of a sparse teacher in the Triton kernel of a row: what is done to it.

The listed classes are left out of the passes over the row (a bit for each column says which), so
that the student's mass outside of them is a sum and not a difference from 1. They are then met one
by one, all at once, since a list fits a program.
"""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops.kd_loss.spec import Tail

_BUCKET = tl.constexpr(int(Tail.BUCKET))
_RENORM = tl.constexpr(int(Tail.RENORM))
_NONE = tl.constexpr(int(Tail.NONE))
_INF = tl.constexpr(float("inf"))
_LEAST_TAIL = tl.constexpr(2.0**-24)


@triton.jit
def unlisted(words_row, cols, inside):
    """Whether a class is outside of the row's list."""
    words = tl.load(words_row + cols // 32, mask=inside, other=0)
    return ((words >> (cols % 32)) & 1) == 0


@triton.jit
def _log(x):
    """log(x), -inf at 0."""
    return tl.where(x > 0.0, tl.log(tl.maximum(x, 2.0**-126)), -_INF)


@triton.jit
def _terms(p, log_p, log_q):
    return tl.sum(tl.where(p > 0.0, p * (log_p - log_q), 0.0), 0)


@triton.jit
def _teacher(log_p, kept, classes):
    """Probabilities of the list, at most 1 together, their sum, and what is left of it."""
    p = tl.where(kept, tl.exp(log_p), 0.0)
    mass = tl.sum(p, 0)
    divisor = tl.maximum(mass, 1.0)
    others = tl.sum(kept.to(tl.int32), 0) < classes
    rest = tl.where(others, tl.maximum(1.0 - mass, 0.0), 0.0)
    return p / divisor, log_p - tl.log(divisor), mass / divisor, rest


@triton.jit
def _forward(p, log_p, mass, rest, q, log_q, tail_q, tail_live, tail_log_q, TAIL: tl.constexpr):
    value = _terms(p, log_p, log_q)
    of_q = mass
    of_p = 1.0
    slope = 0.0
    uniform = 0.0
    if TAIL == _RENORM:
        listed_q = tl.sum(q, 0)
        some = mass > 0.0
        of_p = tl.where(some, 1.0 / tl.where(some, mass, 1.0), 0.0)
        of_q = tl.where(some, 1.0 / tl.where(some, listed_q, 1.0), 0.0)
        value = tl.where(some, value * of_p + _log(listed_q) - _log(mass), 0.0)
    elif TAIL == _NONE:
        slope = mass
    else:
        of_q = mass + rest
        slope = of_q
        if TAIL == _BUCKET:
            value += tl.where(rest > 0.0, rest * (_log(rest) - _log(tail_q)), 0.0)
            ratio = rest / tl.where(tail_q > 0.0, tail_q, 1.0)
            slope = tl.where(tail_q > 0.0, slope - ratio, 0.0)
        else:
            each = rest / tl.maximum(tail_live, 1.0)
            spread = tl.where(tail_live > 0.0, rest * _log(each) - each * tail_log_q, _INF)
            value += tl.where(rest > 0.0, spread, 0.0)
            uniform = tl.where(tail_live > 0.0, each, 0.0)
    return value, of_q * q - of_p * p, slope, uniform, 0.0


@triton.jit
def _reverse(p, log_p, mass, rest, q, log_q, tail_q, tail_live, tail_entropy, TAIL: tl.constexpr):
    log_rest = tl.log(tl.maximum(rest, _LEAST_TAIL))
    value = _terms(q, log_q, log_p)
    scale = 1.0
    slope = 0.0
    tail_mean = 0.0
    if TAIL == _RENORM:
        listed_q = tl.sum(q, 0)
        some = listed_q > 0.0
        scale = tl.where(some, 1.0 / tl.where(some, listed_q, 1.0), 0.0)
        mean = value * scale
        value = tl.where(some, mean - (_log(listed_q) - _log(mass)), 0.0)
    elif TAIL == _NONE:
        listed_q = tl.sum(q, 0)
        mean = value + listed_q - 1.0
        slope = -(value + listed_q)
    elif TAIL == _BUCKET:
        ratio = tl.where(tail_q > 0.0, _log(tail_q) - log_rest, 0.0)
        value += tail_q * ratio
        mean = value
        slope = ratio - value
    else:
        log_each = log_rest - tl.log(tl.maximum(tail_live, 1.0))
        value += tail_entropy - tail_q * log_each
        mean = value
        tail_mean = log_each + value
    listed = tl.where(q > 0.0, scale * q * (log_q - log_p - mean), 0.0)
    return value, listed, slope, 0.0, tail_mean


@triton.jit
def meet_list(z, log_p, kept, part, expect, classes, s, F: tl.constexpr):
    """The listed classes join the statistics of the others.

    Args:
        z: the student's logits of the list.
        log_p: the teacher's log-probabilities.
        kept: which entries count.
        part: maxima and sums of the pass over the other classes.
        expect: expectations of that pass.
        classes: of the row.
        s: ``Scalars``.
        F: ``Flags``.

    Returns:
        ``part`` and ``expect`` of all classes, the divergence, the gradient of it for the listed
        ``z / T``, and three numbers for the others: ``slope * q - uniform``, or with an entropy
        ``q * ((z - max) / T - mean)``.
    """
    max_tail, total_tail, total_tail_1, max_t, total_t = part
    dot, sum_z, live = expect
    z = tl.where(kept, z, -_INF)
    max_s = tl.maximum(max_tail, tl.max(z, 0))
    fall = tl.where(live > 0.0, max_tail - max_s, 0.0)
    keep = tl.exp((max_tail - max_s) * s.inv_t)
    e = tl.exp((z - max_s) * s.inv_t)
    tail = total_tail * keep
    dot = tl.where(keep > 0.0, keep * (dot + fall * total_tail), 0.0)
    sum_z = sum_z + fall * live
    total_s = tail + tl.sum(e, 0)
    if F.temperatures == 1:
        e_1 = e
        total_1 = total_s
    else:
        e_1 = tl.exp(z - max_s)
        total_1 = total_tail_1 * tl.exp(max_tail - max_s) + tl.sum(e_1, 0)
    log_s = tl.log(total_s)
    q = e / total_s
    log_q = (z - max_s) * s.inv_t - log_s
    p, log_p, mass, rest = _teacher(log_p, kept, classes)
    tail_q = tail / total_s
    if F.reverse:
        entropy = dot / total_s * s.inv_t - tail_q * log_s
        result = _reverse(p, log_p, mass, rest, q, log_q, tail_q, live, entropy, F.tail)
    else:
        tail_log_q = sum_z * s.inv_t - live * log_s
        result = _forward(p, log_p, mass, rest, q, log_q, tail_q, live, tail_log_q, F.tail)
    value, listed, slope, uniform, mean = result
    here = z > -_INF
    sum_z += tl.sum(tl.where(here, z - max_s, 0.0), 0)
    live += tl.sum(here.to(tl.float32), 0)
    return (
        (max_s, total_s, total_1, max_t, total_t),
        (dot, sum_z, live),
        value,
        (z, e_1, listed),
        (slope, uniform, mean + log_s),
    )
