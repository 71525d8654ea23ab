"""Triton kernels of ``kd_shard``: the passes of ``kd_loss`` over a row, one a kernel."""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops.kd_loss.triton_kernels import any_student, compare, gradient, statistics
from kdkernels.ops.kd_shard.spec import IGNORED, Found, Merged

_IGNORED = tl.constexpr(IGNORED)
_STUDENT_TOP = tl.constexpr(int(Found.STUDENT_TOP))
_STUDENT_SUM = tl.constexpr(int(Found.STUDENT_SUM))
_TEACHER_TOP = tl.constexpr(int(Found.TEACHER_TOP))
_TEACHER_SUM = tl.constexpr(int(Found.TEACHER_SUM))
_GAP = tl.constexpr(int(Found.GAP))
_STUDENT_SUM_1 = tl.constexpr(int(Found.STUDENT_SUM_1))
_LIVE = tl.constexpr(int(Found.LIVE))
_LOGITS = tl.constexpr(int(Found.LOGITS))
_LABEL = tl.constexpr(int(Found.LABEL))
_MERGED_STUDENT_TOP = tl.constexpr(int(Merged.STUDENT_TOP))
_MERGED_STUDENT_SUM = tl.constexpr(int(Merged.STUDENT_SUM))
_MERGED_TEACHER_TOP = tl.constexpr(int(Merged.TEACHER_TOP))
_MERGED_TEACHER_SUM = tl.constexpr(int(Merged.TEACHER_SUM))
_MERGED_MEAN = tl.constexpr(int(Merged.MEAN))
_MERGED_STUDENT_SUM_1 = tl.constexpr(int(Merged.STUDENT_SUM_1))
_MERGED_LIVE = tl.constexpr(int(Merged.LIVE))
_MERGED_WEIGHT = tl.constexpr(int(Merged.WEIGHT))


@triton.jit
def _logits_of_row(student_ptr, teacher_ptr, student_stride, teacher_stride, classes, row):
    student_row = student_ptr + row * student_stride
    teacher_row = student_row if teacher_ptr is None else teacher_ptr + row * teacher_stride
    return (student_row, teacher_row, classes, student_row)


@triton.jit
def _place(places_ptr, row):
    """Where the label of the row is among the classes."""
    place = row * 0 - 1
    if places_ptr is not None:
        place = tl.load(places_ptr + row)
    return place


@triton.jit
def _merged_part(merged_ptr, rows, row):
    """The statistics of all classes, in the order of those of ``kd_loss``."""
    at = merged_ptr + row
    return (
        tl.load(at + _MERGED_STUDENT_TOP * rows),
        tl.load(at + _MERGED_STUDENT_SUM * rows),
        tl.load(at + _MERGED_STUDENT_SUM_1 * rows),
        tl.load(at + _MERGED_TEACHER_TOP * rows),
        tl.load(at + _MERGED_TEACHER_SUM * rows),
    )


@triton.jit
def kd_shard_found_kernel(
    student_ptr,  # [rows, classes]
    teacher_ptr,  # [rows, classes] or None
    places_ptr,  # [rows] int64 or None
    found_ptr,  # [9, rows] float32
    student_stride,
    teacher_stride,
    classes,
    s,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row; ``s`` and ``F`` are ``Scalars`` and ``Flags`` of ``kd_loss``."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    place = _place(places_ptr, row)
    top_s, sum_s, sum_1, top_t, sum_t = 0.0, 0.0, 0.0, 0.0, 0.0
    gap, logits, live, label = 0.0, 0.0, 0.0, 0.0
    if place != _IGNORED:
        z = _logits_of_row(student_ptr, teacher_ptr, student_stride, teacher_stride, classes, row)
        part, expect = statistics(z, s, F, BLOCK)
        top_s, sum_s, sum_1, top_t, sum_t = part
        gap, logits, live = expect
        at_label = any_student(z, tl.maximum(place, 0), s, F)
        label = tl.where(place >= 0, at_label, 0.0)
    at = found_ptr + row
    tl.store(at + _STUDENT_TOP * rows, top_s)
    tl.store(at + _STUDENT_SUM * rows, sum_s)
    tl.store(at + _TEACHER_TOP * rows, top_t)
    tl.store(at + _TEACHER_SUM * rows, sum_t)
    tl.store(at + _GAP * rows, gap)
    tl.store(at + _STUDENT_SUM_1 * rows, sum_1)
    tl.store(at + _LIVE * rows, live)
    tl.store(at + _LOGITS * rows, logits)
    tl.store(at + _LABEL * rows, label)


@triton.jit
def kd_shard_middle_kernel(
    student_ptr,  # [rows, classes]
    teacher_ptr,  # [rows, classes]
    places_ptr,  # [rows] int64 or None
    merged_ptr,  # [8, rows] float32
    sums_ptr,  # [2, rows] float32
    student_stride,
    teacher_stride,
    classes,
    s,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    value, mean = 0.0, 0.0
    if _place(places_ptr, row) != _IGNORED:
        z = _logits_of_row(student_ptr, teacher_ptr, student_stride, teacher_stride, classes, row)
        value, mean = compare(z, _merged_part(merged_ptr, rows, row), s, F, BLOCK)
    tl.store(sums_ptr + row, value)
    tl.store(sums_ptr + rows + row, mean)


@triton.jit
def kd_shard_gradient_kernel(
    student_ptr,  # [rows, classes]
    teacher_ptr,  # [rows, classes] or None
    places_ptr,  # [rows] int64 or None
    merged_ptr,  # [8, rows] float32
    grad_ptr,  # [rows, classes]
    student_stride,
    teacher_stride,
    grad_stride,
    classes,
    s,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. ``grad_ptr`` may be the student's."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    place = _place(places_ptr, row)
    grad_row = grad_ptr + row * grad_stride
    if place != _IGNORED:
        z = _logits_of_row(student_ptr, teacher_ptr, student_stride, teacher_stride, classes, row)
        part = _merged_part(merged_ptr, rows, row)
        mean = tl.load(merged_ptr + _MERGED_MEAN * rows + row)
        live = tl.load(merged_ptr + _MERGED_LIVE * rows + row)
        weight = tl.load(merged_ptr + _MERGED_WEIGHT * rows + row)
        tail = (0.0, 0.0, 0.0)
        gradient(z, grad_row, classes, place, weight, part, live, mean, tail, s, F, BLOCK)
    else:
        for start in range(0, classes, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], grad_ptr.dtype.element_ty)
            tl.store(grad_row + cols, zeros, mask=cols < classes)
