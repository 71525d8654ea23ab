"""``hidden_match`` of a student behind a linear projection, without its output in memory."""

from kdkernels.ops.linear_hidden_match.op import (
    linear_hidden_match,
    linear_hidden_match_rows,
    unsupported,
)

__all__ = ["linear_hidden_match", "linear_hidden_match_rows", "unsupported"]
