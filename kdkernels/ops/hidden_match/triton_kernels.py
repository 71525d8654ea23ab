"""The Triton kernel of ``hidden_match``: one program owns one row of one layer."""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl

MSE = tl.constexpr(0)
SMOOTH_L1 = tl.constexpr(1)
COSINE = tl.constexpr(2)


@triton.jit
def _pair(s_ptr, t_ptr, cols, width):
    """Both rows, 0 behind their ends."""
    s = tl.load(s_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    return s, t


@triton.jit
def _elements(
    s_ptr, t_ptr, grad_ptr, width, scale, beta,
    KIND: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``mse`` and ``smooth_l1``: a sum over elements."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        s, t = _pair(s_ptr, t_ptr, cols, width)
        x = s - t
        if KIND == MSE:
            total += x * x
            derivative = 2.0 * x
        else:
            size = tl.abs(x)
            small = size < beta
            # beta may be 0: then nothing is small.
            slope = x / tl.where(beta > 0.0, beta, 1.0)
            total += tl.where(small, 0.5 * x * slope, size - 0.5 * beta)
            sign = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))
            derivative = tl.where(small, slope, sign)
        if GRAD:
            grad = derivative * (scale / width)
            tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < width)
    return tl.sum(total, 0) / width


@triton.jit
def _direction(
    s_ptr, t_ptr, grad_ptr, width, scale,
    KIND: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``cosine`` and ``pkd``: of the unit vectors. The second reading hits the cache."""
    ss = tl.zeros([BLOCK], tl.float32)
    tt = tl.zeros([BLOCK], tl.float32)
    st = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        s, t = _pair(s_ptr, t_ptr, start + tl.arange(0, BLOCK), width)
        ss += s * s
        tt += t * t
        st += s * t
    square_s = tl.sum(ss, 0)
    square_t = tl.sum(tt, 0)
    live = (square_s != 0.0) & (square_t != 0.0)
    inverse_s = 1.0 / tl.sqrt_rn(tl.where(live, square_s, 1.0))
    inverse_t = 1.0 / tl.sqrt_rn(tl.where(live, square_t, 1.0))
    # d(1 - cos)/ds = (cos * s/|s| - t/|t|) / |s|
    cosine = tl.sum(st, 0) * inverse_s * inverse_t
    factor = 0.5
    if KIND != COSINE:
        factor = 1.0 / width
    outer = tl.where(live, 2.0 * factor * scale * inverse_s, 0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        s, t = _pair(s_ptr, t_ptr, cols, width)
        s *= inverse_s
        t *= inverse_t
        total += (s - t) * (s - t)
        if GRAD:
            # Where nothing is live either row may still hold values.
            grad = tl.where(live, (s * cosine - t) * outer, 0.0)
            tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < width)
    return tl.where(live, factor * tl.sum(total, 0), 0.0)


@triton.jit
def match_rows_kernel(
    students,  # a pointer a layer: [rows, width]
    teachers,
    student_strides,  # a number a layer
    teacher_strides,
    widths,
    offsets,  # of the gradients
    weights,
    grad_ptr,  # the gradients of all layers
    terms_ptr,  # [layers, rows] float32: distances times the rows' weights
    weighted_ptr,  # the same times the layers' weights
    mask_ptr,  # [rows] uint8, or None
    row_weights_ptr,  # [rows] float32, or None
    divisor_ptr,  # [] float32, not 0
    rows,
    beta,
    LAYERS: tl.constexpr,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Distance of two rows, and the gradient for the student's."""
    layer = tl.program_id(0) // rows
    row = (tl.program_id(0) % rows).to(tl.int64)
    s_ptr, t_ptr = students[0], teachers[0]
    s_stride, t_stride = student_strides[0].to(tl.int64), teacher_strides[0].to(tl.int64)
    width, offset, weight = widths[0].to(tl.int32), offsets[0].to(tl.int64), weights[0]
    for i in tl.static_range(1, LAYERS):
        here = layer == i
        s_ptr = tl.where(here, students[i], s_ptr)
        t_ptr = tl.where(here, teachers[i], t_ptr)
        s_stride = tl.where(here, student_strides[i].to(tl.int64), s_stride)
        t_stride = tl.where(here, teacher_strides[i].to(tl.int64), t_stride)
        width = tl.where(here, widths[i].to(tl.int32), width)
        offset = tl.where(here, offsets[i].to(tl.int64), offset)
        weight = tl.where(here, weights[i], weight)
    s_ptr += row * s_stride
    t_ptr += row * t_stride
    grad_ptr += offset + row * width
    kept = True
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + row) != 0
    term = 0.0
    if kept:
        row_weight = 1.0
        if row_weights_ptr is not None:
            row_weight = tl.load(row_weights_ptr + row)
        scale = weight * row_weight / tl.load(divisor_ptr)
        if KIND <= SMOOTH_L1:
            term = _elements(s_ptr, t_ptr, grad_ptr, width, scale, beta, KIND, GRAD, BLOCK)
        else:
            term = _direction(s_ptr, t_ptr, grad_ptr, width, scale, KIND, GRAD, BLOCK)
        term *= row_weight
    elif GRAD:
        zero = tl.zeros([BLOCK], grad_ptr.dtype.element_ty)
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(grad_ptr + cols, zero, mask=cols < width)
    at = layer.to(tl.int64) * rows + row
    tl.store(terms_ptr + at, term)
    tl.store(weighted_ptr + at, term * weight)
