"""The distance of student's and teacher's hidden states over a list of layers."""

import importlib.util

from kdkernels.ops.hidden_match.op import hidden_match, hidden_match_rows, unsupported
from kdkernels.ops.hidden_match.spec import Kind, Spec

if importlib.util.find_spec("triton") is not None:
    from kdkernels.ops.hidden_match import triton_launch as _triton_launch  # noqa: F401

__all__ = ["Kind", "Spec", "hidden_match", "hidden_match_rows", "unsupported"]
