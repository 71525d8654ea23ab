"""Masked means of hidden states, and their sums over groups of examples."""

import importlib.util

from kdkernels.ops.domain_prototypes.op import domain_prototypes, unsupported

if importlib.util.find_spec("triton") is not None:
    from kdkernels.ops.domain_prototypes import triton_launch as _triton_launch  # noqa: F401

__all__ = ["domain_prototypes", "unsupported"]
