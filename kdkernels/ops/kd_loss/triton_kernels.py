"""Triton kernels of ``kd_loss``: one program owns one row and walks over it in blocks.

Pass 1 takes online statistics of both rows (maxima, partition sums, the expectation that a KL
needs); JSD and TVD, which need finished probabilities, take a second pass; the last pass writes
the gradient. The sum over rows runs in a kernel of its own in a fixed order, so results are
deterministic. Products are never fused with sums (``enable_fp_fusion=False`` at the launch):
``e_s / S_s - e_t / S_t`` has to be exactly zero when both models agree.
"""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels._triton.device import to_z
from kdkernels.ops.kd_loss.spec import LISTED, LISTED_ENTROPY, Divergence
from kdkernels.ops.kd_loss.triton_listed import meet_list, unlisted

_FORWARD_KL = tl.constexpr(int(Divergence.FORWARD_KL))
_SOFT_CE = tl.constexpr(int(Divergence.SOFT_CE))
_REVERSE_KL = tl.constexpr(int(Divergence.REVERSE_KL))
_JSD = tl.constexpr(int(Divergence.JSD))
_TVD = tl.constexpr(int(Divergence.TVD))
_SPIKE = tl.constexpr(int(Divergence.SPIKE))
_NEG_ENTROPY = tl.constexpr(int(Divergence.NEG_ENTROPY))
_LISTED = tl.constexpr(LISTED)
_LISTED_ENTROPY = tl.constexpr(LISTED_ENTROPY)
_INF = tl.constexpr(float("inf"))
_TINY = tl.constexpr(2.0**-126)  # smallest normal float32
# Where a running maximum starts: finite, so that a block of -inf gives no -inf - -inf.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _logits(row_ptr, cols, classes, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits of some columns in float32; -inf, which carries no mass, outside the classes."""
    inside = cols < classes
    z = to_z(
        tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32), scale, softcap, SOFTCAP
    )
    return tl.where(inside, z, -_INF)


@triton.jit
def _student(row, cols, s, F: tl.constexpr):
    """The student's logits; -inf for the classes of a sparse teacher's list."""
    z = any_student(row, cols, s, F)
    if F.listed:
        z = tl.where(unlisted(row[3], cols, cols < row[2]), z, -_INF)
    return z


@triton.jit
def any_student(row, cols, s, F: tl.constexpr):
    return _logits(row[0], cols, row[2], s.student_scale, s.student_softcap, F.student_cap)


@triton.jit
def _teacher(row, cols, s, F: tl.constexpr):
    return _logits(row[1], cols, row[2], s.teacher_scale, s.teacher_softcap, F.teacher_cap)


@triton.jit
def _fall(before, after):
    """By how much values relative to a running maximum fall; 0 while there were none."""
    return tl.where(before == _LOWEST, 0.0, before - after)


@triton.jit
def _rescale(dot, shift, mass, keep):
    """An expectation relative to a new maximum.

    It is infinite where a class with mass has none in the other model, unless that mass has become
    nothing against the new maximum.
    """
    return tl.where(keep > 0.0, keep * (dot + shift * mass), 0.0)


@triton.jit
def statistics(row, s, F: tl.constexpr, BLOCK: tl.constexpr):
    """Pass 1. Everything is kept relative to the running maxima, so that neither a large offset
    of the logits nor one between the two models costs digits.
    """
    max_s = tl.full((), _LOWEST, tl.float32)
    max_t = tl.full((), _LOWEST, tl.float32)
    sum_s = tl.zeros([BLOCK], tl.float32)  # at the temperature
    sum_1 = tl.zeros([BLOCK], tl.float32)  # at temperature 1, where that is another one
    sum_t = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)  # unnormalised expectation of a logit difference
    sum_z = tl.zeros([BLOCK], tl.float32)
    live = tl.zeros([BLOCK], tl.float32)
    for start in range(0, row[2], BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = _student(row, cols, s, F)
        top_s = tl.maximum(max_s, tl.max(z, 0))
        e_s = tl.exp((z - top_s) * s.inv_t)
        keep_s = tl.exp((max_s - top_s) * s.inv_t)
        fall_s = _fall(max_s, top_s)
        if F.divergence == _NEG_ENTROPY or F.divergence == _LISTED_ENTROPY:
            dot = _rescale(dot, fall_s, sum_s, keep_s)
            dot += tl.where(e_s > 0.0, e_s * (z - top_s), 0.0)
        if F.teacher:
            t = _teacher(row, cols, s, F)
            top_t = tl.maximum(max_t, tl.max(t, 0))
            e_t = tl.exp((t - top_t) * s.inv_t)
            keep_t = tl.exp((max_t - top_t) * s.inv_t)
            fall_t = _fall(max_t, top_t)
            if F.divergence == _FORWARD_KL:
                dot = _rescale(dot, fall_t - fall_s, sum_t, keep_t)
                dot += tl.where(e_t > 0.0, e_t * ((t - top_t) - (z - top_s)), 0.0)
            if F.divergence == _SOFT_CE:
                dot = _rescale(dot, -fall_s, sum_t, keep_t)
                dot += tl.where(e_t > 0.0, e_t * (top_s - z), 0.0)
            if F.divergence == _REVERSE_KL:
                dot = _rescale(dot, fall_s - fall_t, sum_s, keep_s)
                dot += tl.where(e_s > 0.0, e_s * ((z - top_s) - (t - top_t)), 0.0)
            sum_t = sum_t * keep_t + e_t
            max_t = top_t
        if F.uniform:
            sum_z = sum_z + fall_s * live + tl.where(z == -_INF, 0.0, z - top_s)
            live = live + tl.where(z == -_INF, 0.0, 1.0)
        sum_s = sum_s * keep_s + e_s
        if F.temperatures == 2:  # T = 2: e^z is the square of e^(z/2)
            sum_1 = sum_1 * (keep_s * keep_s) + e_s * e_s
        if F.temperatures == 3:
            sum_1 = sum_1 * tl.exp(max_s - top_s) + tl.exp(z - top_s)
        max_s = top_s
    total_s = tl.sum(sum_s, 0)
    total_1 = total_s if F.temperatures == 1 else tl.sum(sum_1, 0)
    return (
        (max_s, total_s, total_1, max_t, tl.sum(sum_t, 0)),
        (tl.sum(dot, 0), tl.sum(sum_z, 0), tl.sum(live, 0)),
    )


@triton.jit
def _probabilities(row, cols, part, s, F: tl.constexpr):
    """A block of the student's logits, and both models' probabilities at the temperature."""
    max_s, total_s, _, max_t, total_t = part
    z = _student(row, cols, s, F)
    e_s = tl.exp((z - max_s) * s.inv_t)
    p_s = e_s * (1.0 / total_s)
    t = z
    p_t = p_s
    if F.teacher:
        t = _teacher(row, cols, s, F)
        p_t = tl.exp((t - max_t) * s.inv_t) * (1.0 / total_t)
    return z, t, e_s, p_s, p_t


@triton.jit
def _log_ratio(p, p_s, p_t, beta):
    """log(p / m) of the JSD, 0 where p is 0; exactly 0 where both models agree."""
    mixture = tl.maximum(p_s + beta * (p_t - p_s), _TINY)
    return tl.where(p > 0.0, tl.log(p / mixture), 0.0)


@triton.jit
def _sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def compare(row, part, s, F: tl.constexpr, BLOCK: tl.constexpr):
    """The middle pass of JSD and TVD: the divergence and the mean of its derivative over the
    student's distribution, which the gradient is relative to.
    """
    divergence = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for start in range(0, row[2], BLOCK):
        cols = start + tl.arange(0, BLOCK)
        _, _, _, p_s, p_t = _probabilities(row, cols, part, s, F)
        if F.divergence == _JSD:
            from_student = p_s * _log_ratio(p_s, p_s, p_t, s.beta)
            from_teacher = p_t * _log_ratio(p_t, p_s, p_t, s.beta)
            divergence += s.beta * from_teacher + (1.0 - s.beta) * from_student
            mean += from_student
        else:
            divergence += 0.5 * tl.abs(p_s - p_t)
            mean += p_s * _sign(p_s - p_t)
    return tl.sum(divergence, 0), tl.sum(mean, 0)


@triton.jit
def _spike(live, beta):
    """Probability of the virtual teacher on the label and on each other live class."""
    others = live - 1.0
    share = tl.where(others > 0.0, (1.0 - beta) / tl.maximum(others, 1.0), 0.0)
    return tl.where(others > 0.0, beta, 1.0), share


@triton.jit
def _xlogx(x):
    return tl.where(x > 0.0, x * tl.log(tl.maximum(x, _TINY)), 0.0)


@triton.jit
def _divergence(part, expect, z_label, s, F: tl.constexpr):
    """The divergence from the statistics of pass 1, and where the gradient needs it the mean of
    its derivative over the student's distribution.
    """
    max_s, total_s, _, _, total_t = part
    dot, sum_z, live = expect
    log_s = tl.log(total_s)
    mean = 0.0
    if F.divergence == _SPIKE:
        at_label, share = _spike(live, s.beta)
        entropy = _xlogx(at_label) + (live - 1.0) * _xlogx(share)
        log_label = (z_label - max_s) * s.inv_t - log_s
        value = entropy - (at_label - share) * log_label - share * (sum_z * s.inv_t - live * log_s)
    elif F.divergence == _NEG_ENTROPY:
        mean = dot / total_s * s.inv_t
        value = mean - log_s
    elif F.divergence == _REVERSE_KL:
        mean = dot / total_s * s.inv_t
        value = mean - log_s + tl.log(total_t)
    else:
        value = dot / total_t * s.inv_t + log_s
        if F.divergence == _FORWARD_KL:
            value = value - tl.log(total_t)
    return value, mean


@triton.jit
def _kd_slope(z, t, p_s, p_t, cols, label, part, live, mean, tail, s, F: tl.constexpr):
    """Derivative of the divergence for the student's logits divided by the temperature.

    ``tail`` is what ``meet_list`` says of the classes outside of a list.
    """
    if F.divergence == _LISTED:
        return tail[0] * p_s - tl.where(z > -_INF, tail[1], 0.0)
    elif F.divergence == _FORWARD_KL or F.divergence == _SOFT_CE:
        return p_s - p_t
    elif F.divergence == _SPIKE:
        at_label, share = _spike(live, s.beta)
        target = tl.where(z > -_INF, share, 0.0) + tl.where(cols == label, at_label - share, 0.0)
        return p_s - target
    elif F.divergence == _TVD:
        return 0.5 * p_s * (_sign(p_s - p_t) - mean)
    elif F.divergence == _JSD:
        return (1.0 - s.beta) * p_s * (_log_ratio(p_s, p_s, p_t, s.beta) - mean)
    else:
        gap = z - part[0]
        if F.divergence == _REVERSE_KL:
            gap = gap - (t - part[3])
        return tl.where(p_s > 0.0, p_s * (gap * s.inv_t - mean), 0.0)


@triton.jit
def gradient(
    row,
    grad_row,
    columns,
    label,
    factor,
    part,
    live,
    mean,
    tail,
    s,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last pass. ``grad_row`` may be the student's: a block is read before it is written."""
    max_s, _, total_1, _, _ = part
    hard = s.ce_weight + 2.0 * s.z_loss * (max_s + tl.log(total_1))
    on_label = s.ce_weight * (1.0 - s.label_smoothing)
    spread = s.ce_weight * s.label_smoothing / live
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, t, e_s, p_s, p_t = _probabilities(row, cols, part, s, F)
        slope = tl.zeros([BLOCK], tl.float32)
        if F.divergence != 0:
            kd = _kd_slope(z, t, p_s, p_t, cols, label, part, live, mean, tail, s, F)
            slope = s.kd_weight * s.inv_t * kd
        if F.hard:
            e_1 = e_s
            if F.temperatures == 2:
                e_1 = e_s * e_s
            if F.temperatures == 3:
                e_1 = tl.exp(z - max_s)
            slope += hard * (e_1 * (1.0 / total_1)) - tl.where(cols == label, on_label, 0.0)
            if F.smoothing:
                slope -= tl.where(z > -_INF, spread, 0.0)
        slope *= factor * s.student_scale
        if F.student_cap:
            capped = z / s.student_softcap
            slope = tl.where(z == -_INF, 0.0, slope * (1.0 - capped * capped))
        slope = tl.where(cols < row[2], slope, 0.0).to(grad_row.dtype.element_ty)
        tl.store(grad_row + cols, slope, mask=cols < columns)


@triton.jit
def _listed_gradient(listed, cols, grad_row, label, factor, part, live, s, F: tl.constexpr):
    """Writes the gradients of the listed classes ``cols`` over what the last pass left there."""
    z, e_1, slope = listed
    max_s, _, total_1, _, _ = part
    slope = s.kd_weight * s.inv_t * slope
    if F.hard:
        hard = s.ce_weight + 2.0 * s.z_loss * (max_s + tl.log(total_1))
        on_label = s.ce_weight * (1.0 - s.label_smoothing)
        slope += hard * (e_1 * (1.0 / total_1)) - tl.where(cols == label, on_label, 0.0)
        if F.smoothing:
            slope -= tl.where(z > -_INF, s.ce_weight * s.label_smoothing / live, 0.0)
    slope *= factor * s.student_scale
    if F.student_cap:
        capped = z / s.student_softcap
        slope = tl.where(z == -_INF, 0.0, slope * (1.0 - capped * capped))
    tl.debug_barrier()  # other threads have written there
    tl.store(grad_row + cols, slope.to(grad_row.dtype.element_ty), mask=cols >= 0)


@triton.jit
def _valid_row(
    row, grad_row, columns, label, weight, scale, entries, s, F: tl.constexpr, BLOCK: tl.constexpr
):
    """Loss and terms of one row; writes its gradient unless ``grad_row`` is None."""
    part, expect = statistics(row, s, F, BLOCK)
    factor = weight * scale
    ce, divergence, mean, square = 0.0, 0.0, 0.0, 0.0
    tail = (0.0, 0.0, 0.0)
    if F.listed:
        cols, log_p = entries
        z = any_student(row, tl.maximum(cols, 0), s, F)
        kept = cols >= 0
        part, expect, divergence, listed, tail = meet_list(
            z, log_p, kept, part, expect, row[2], s, F
        )
        mean = tail[2]
        wrong = tl.min(cols, 0) < -1
        divergence = tl.where(wrong, float("nan"), divergence)
        factor = tl.where(wrong, float("nan"), factor)
    max_s, log_1, live = part[0], tl.log(part[2]), expect[2]
    z_label = 0.0
    if F.needs_labels:
        inside = (label >= 0) & (label < row[2])
        z_label = any_student(row, tl.where(inside, label, 0), s, F)
        z_label = tl.where(inside, z_label, float("nan"))
        factor = tl.where(inside, factor, float("nan"))
    if F.needs_ce:
        ce = log_1 + (max_s - z_label)
        if F.smoothing:
            uniform = log_1 - expect[1] / live
            ce = (1.0 - s.label_smoothing) * ce + s.label_smoothing * uniform
    if F.divergence == _JSD or F.divergence == _TVD:
        divergence, mean = compare(row, part, s, F, BLOCK)
    elif F.divergence != 0 and not F.listed:
        divergence, mean = _divergence(part, expect, z_label, s, F)
    if F.needs_z:
        square = (max_s + log_1) * (max_s + log_1)
    if grad_row is not None:
        gradient(row, grad_row, columns, label, factor, part, live, mean, tail, s, F, BLOCK)
        if F.listed:
            _listed_gradient(listed, cols, grad_row, label, factor, part, live, s, F)
    # An infinite term without a weight is no NaN.
    loss = tl.where(s.ce_weight != 0.0, s.ce_weight * ce, 0.0)
    loss += tl.where(s.kd_weight != 0.0, s.kd_weight * divergence, 0.0) + s.z_loss * square
    return weight * loss, weight * ce, weight * divergence, weight * square


@triton.jit
def kd_loss_kernel(
    student_ptr,  # [rows, columns]
    teacher_ptr,  # [rows, >= classes] or None
    labels_ptr,  # [rows] int64 or None
    row_weights_ptr,  # [rows] or None
    sums_ptr,  # [2] float32: factor of the sum of all rows, number of valid rows
    rows_ptr,  # [rows] float32
    terms_ptr,  # [3, rows] float32: weighted CE, divergence, squared log-partition
    grad_ptr,  # [rows, columns] or None
    words_ptr,  # [rows, words] int32: a bit for each listed class; or None
    ids_ptr,  # [rows, entries] int32: -1 for none, -2 for one out of range; or None
    logprobs_ptr,  # [rows, entries] float32 or None
    words,
    entries,
    student_stride,
    teacher_stride,
    grad_stride,
    columns,
    classes,
    ignore_index,
    s,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
):
    """One program a row; ``s`` and ``F`` are ``Scalars`` and ``Flags`` of ``triton_launch``."""
    row = tl.program_id(0).to(tl.int64)
    student_row = student_ptr + row * student_stride
    teacher_row = student_row if teacher_ptr is None else teacher_ptr + row * teacher_stride
    grad_row = None if grad_ptr is None else grad_ptr + row * grad_stride
    label = row * 0
    valid = label == 0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        valid = label != ignore_index
    loss, ce, divergence, square = 0.0, 0.0, 0.0, 0.0
    if valid:
        weight = tl.full((), 1.0, tl.float32)
        if row_weights_ptr is not None:
            weight = tl.load(row_weights_ptr + row).to(tl.float32)
        scale = tl.load(sums_ptr)
        words_row = student_row  # read of a list only
        listed = None
        if F.listed:
            words_row = words_ptr + row * words
            place = tl.arange(0, LIST)
            ids = tl.load(ids_ptr + row * entries + place, mask=place < entries, other=-1)
            log_p = tl.load(logprobs_ptr + row * entries + place, mask=ids >= 0, other=-_INF)
            listed = (ids, log_p)
        logits = (student_row, teacher_row, classes, words_row)
        loss, ce, divergence, square = _valid_row(
            logits, grad_row, columns, label, weight, scale, listed, s, F, BLOCK
        )
    elif grad_ptr is not None:
        for start in range(0, columns, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], grad_ptr.dtype.element_ty)
            tl.store(grad_row + cols, zeros, mask=cols < columns)
    terms_row = terms_ptr + row
    rows = tl.num_programs(0).to(tl.int64)
    tl.store(rows_ptr + row, loss)
    tl.store(terms_row, ce)
    tl.store(terms_row + rows, divergence)
    tl.store(terms_row + 2 * rows, square)


@triton.jit
def kd_loss_scale_kernel(
    labels_ptr,  # [rows] int64 or None
    denominator_ptr,  # [] or None
    sums_ptr,  # [2] float32
    rows,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the valid rows and turns the denominator into a factor; one program."""
    count = tl.full((), rows, tl.float32)
    if labels_ptr is not None:
        valid = tl.zeros([BLOCK], tl.int32)
        for start in range(0, rows, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            labels = tl.load(labels_ptr + cols, mask=cols < rows, other=ignore_index)
            valid += (labels != ignore_index).to(tl.int32)
        count = tl.sum(valid, 0).to(tl.float32)
    denominator = tl.full((), 1.0, tl.float32)
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr).to(tl.float32)
        denominator = tl.where(denominator == 0.0, 1.0, denominator)
    elif MEAN:
        denominator = tl.maximum(count, 1.0)
    tl.store(sums_ptr, tl.div_rn(tl.full((), 1.0, tl.float32), denominator))
    tl.store(sums_ptr + 1, count)


@triton.jit
def kd_loss_sum_kernel(
    rows_ptr,  # [rows] float32
    terms_ptr,  # [3, rows] float32
    sums_ptr,  # [2] float32
    loss_ptr,  # [] float32
    parts_ptr,  # [4] float32
    rows,
    BLOCK: tl.constexpr,
):
    """Sums rows and terms in a fixed order; one program."""
    loss = tl.zeros([BLOCK], tl.float32)
    ce = tl.zeros([BLOCK], tl.float32)
    divergence = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < rows
        loss += tl.load(rows_ptr + cols, mask=inside, other=0.0)
        ce += tl.load(terms_ptr + cols, mask=inside, other=0.0)
        divergence += tl.load(terms_ptr + rows + cols, mask=inside, other=0.0)
        square += tl.load(terms_ptr + 2 * rows + cols, mask=inside, other=0.0)
    scale = tl.load(sums_ptr)
    tl.store(loss_ptr, tl.sum(loss, 0) * scale)
    tl.store(parts_ptr, tl.sum(ce, 0) * scale)
    tl.store(parts_ptr + 1, tl.sum(divergence, 0) * scale)
    tl.store(parts_ptr + 2, tl.sum(square, 0) * scale)
    tl.store(parts_ptr + 3, tl.load(sums_ptr + 1))
