"""Device functions of more than one op's Triton kernels."""

# mypy: allow-untyped-defs
# (Triton reads annotations of kernel arguments itself.)

from __future__ import annotations

import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))


@triton.jit
def tanh(x):
    """Tanh to 2 ulp: near 0 an odd polynomial (Cephes), since 1 - 2 / (e^2x + 1) cancels."""
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def to_z(x, scale, softcap, SOFTCAP: tl.constexpr):
    """Scales and caps logits in float32; a masked class (-inf) stays masked."""
    z = x * scale
    if SOFTCAP:
        z = tl.where(z == -_INF, z, softcap * tanh(z / softcap))
    return z
