"""Triton kernel of ``adamw_average``: one program owns one chunk of one tensor."""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels._triton.device import tanh
from kdkernels._triton.multi_tensor import chunk_of, row_of, tensor_at

_COLUMNS = tl.constexpr(9)  # of the table


@triton.jit
def _correction(step, beta_log):
    """``1 - beta^step`` by tanh: there is no expm1, and 1 - exp(x) has three digits near 0."""
    u = tanh(-0.5 * step * beta_log)
    return 2.0 * u / (1.0 + u)


@triton.jit
def _adamw_block(
    row_ptr,
    factor,
    decay,
    weight,
    step_size,
    root_scale,
    beta1_rest,
    beta2,
    beta2_rest,
    eps,
    first,
    size,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    AVERAGE: tl.constexpr,
    MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # the block is, and all tensors begin on 16-byte boundaries
):
    at = first + tl.arange(0, BLOCK)
    inside = None if WHOLE else at < size
    param_ptr = tensor_at(tl.load(row_ptr), PARAM, WHOLE) + at
    grad_ptr = tensor_at(tl.load(row_ptr + 1), GRAD, WHOLE) + at
    m_ptr = tensor_at(tl.load(row_ptr + 2), 0, WHOLE) + at
    v_ptr = tensor_at(tl.load(row_ptr + 3), 0, WHOLE) + at
    g = tl.load(grad_ptr, mask=inside).to(tl.float32) * factor
    m = tl.load(m_ptr, mask=inside)
    v = tl.load(v_ptr, mask=inside)
    if MASTER:
        master_ptr = tensor_at(tl.load(row_ptr + 5), 0, WHOLE) + at
        p = tl.load(master_ptr, mask=inside)
    else:
        p = tl.load(param_ptr, mask=inside).to(tl.float32)
    # Not p * (1 - lr * weight_decay): that factor has three digits of the decay.
    p = p - decay * p
    m = m + beta1_rest * (g - m)
    v = beta2 * v + beta2_rest * (g * g)
    # Not rounded to the last digit: that takes up to 60 registers more.
    p = p - step_size * m / (tl.sqrt(v) * root_scale + eps)
    rounded = p.to(param_ptr.dtype.element_ty)
    tl.store(m_ptr, m, mask=inside)
    tl.store(v_ptr, v, mask=inside)
    tl.store(param_ptr, rounded, mask=inside)
    if MASTER:
        tl.store(master_ptr, p, mask=inside)
    if AVERAGE:
        average_ptr = tensor_at(tl.load(row_ptr + 4), 0, WHOLE) + at
        old = tl.load(average_ptr, mask=inside)
        now = p if MASTER else rounded.to(tl.float32)
        # A weight of 1 is a copy, not one within a rounding.
        tl.store(average_ptr, tl.where(weight == 1.0, now, old + weight * (now - old)), mask=inside)


@triton.jit
def adamw_kernel(
    table_ptr,  # [tensors, 9] int64, see Group of plan.py
    weight_ptr,  # [] float32, as the next three
    lr_ptr,
    factor_ptr,
    found_inf_ptr,  # or None
    tensors,
    sign,
    beta1_log,
    beta1_rest,
    beta2,
    beta2_log,
    beta2_rest,
    eps,
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    AVERAGE: tl.constexpr,
    MASTER: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See ``adamw_average_`` of ``op.py``."""
    chunk = tl.program_id(0).to(tl.int64)
    row_ptr = row_of(table_ptr, tensors, chunk, _COLUMNS)
    first, size = chunk_of(row_ptr, chunk, _COLUMNS, CHUNK)
    end = tl.minimum(first + CHUNK, size)
    if found_inf_ptr is not None:
        end = tl.where(tl.load(found_inf_ptr) == 0.0, end, first)
    lr = tl.load(lr_ptr)
    weight = tl.load(weight_ptr)
    factor = sign * tl.load(factor_ptr)
    step = tl.load(tl.load(row_ptr + 6).to(tl.pointer_type(tl.float32)))
    step_size = lr / _correction(step, beta1_log)
    root_scale = 1.0 / tl.sqrt(_correction(step, beta2_log))
    addresses = (
        tl.load(row_ptr) | tl.load(row_ptr + 1) | tl.load(row_ptr + 2) | tl.load(row_ptr + 3)
    )
    if AVERAGE:
        addresses |= tl.load(row_ptr + 4)
    if MASTER:
        addresses |= tl.load(row_ptr + 5)
    aligned = addresses % 16 == 0
    for start in range(first, end, BLOCK):
        # Else the masked form would move all blocks element by element.
        if aligned & (start + BLOCK <= size):
            _adamw_block(
                row_ptr, factor, lr * weight_decay, weight, step_size, root_scale,
                beta1_rest, beta2, beta2_rest, eps, start, size,
                PARAM, GRAD, AVERAGE, MASTER, BLOCK, WHOLE=True,
            )  # fmt: skip
        else:
            _adamw_block(
                row_ptr, factor, lr * weight_decay, weight, step_size, root_scale,
                beta1_rest, beta2, beta2_rest, eps, start, size,
                PARAM, GRAD, AVERAGE, MASTER, BLOCK, WHOLE=False,
            )  # fmt: skip
