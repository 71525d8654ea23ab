"""``kd_loss`` on rows of which each process has some of the classes, in three steps."""

import importlib.util

from kdkernels.ops.kd_shard.op import (
    choose,
    found,
    gradient,
    gradient_,
    middle,
    shard_spec,
    unsupported,
)

if importlib.util.find_spec("triton") is not None:
    from kdkernels.ops.kd_shard import triton_launch as _triton_launch  # noqa: F401

__all__ = ["choose", "found", "gradient", "gradient_", "middle", "shard_spec", "unsupported"]
