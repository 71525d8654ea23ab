"""How much a loss depends on gates of neurons or heads: their absolute gradients."""

import importlib.util

from kdkernels.ops.gate_scores.op import gate_scores, unsupported

if importlib.util.find_spec("triton") is not None:
    from kdkernels.ops.gate_scores import triton_launch as _triton_launch  # noqa: F401

__all__ = ["gate_scores", "unsupported"]
