"""Applies the upstream gradient to a gradient that was computed in the forward pass."""

import importlib.util

from kdkernels.ops.scale_grad import reference as _reference  # noqa: F401  # attaches it
from kdkernels.ops.scale_grad.op import scale_grad, scale_grad_, unsupported

if importlib.util.find_spec("triton") is not None:
    from kdkernels.ops.scale_grad import triton_launch as _triton_launch  # noqa: F401

__all__ = ["scale_grad", "scale_grad_", "unsupported"]
