"""AdamW and the running average of the weights in one pass over memory."""

import importlib.util

from kdkernels.ops.adamw_average.op import adamw_average_, unsupported
from kdkernels.ops.adamw_average.plan import Plan

if importlib.util.find_spec("triton") is not None:
    from kdkernels.ops.adamw_average import triton_launch as _triton_launch  # noqa: F401

__all__ = ["Plan", "adamw_average_", "unsupported"]
