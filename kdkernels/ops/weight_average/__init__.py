"""Running averages of weights, over lists of tensors in one launch."""

import importlib.util

from kdkernels.ops.weight_average.op import unsupported, weight_average_, weight_average_swap_
from kdkernels.ops.weight_average.plan import Plan

if importlib.util.find_spec("triton") is not None:
    from kdkernels.ops.weight_average import triton_launch as _triton_launch  # noqa: F401

__all__ = ["Plan", "unsupported", "weight_average_", "weight_average_swap_"]
