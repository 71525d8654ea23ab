"""``kd_loss`` straight from hidden states and heads: no ``[rows, vocab]`` tensor."""

from kdkernels.ops._shared.linear_loss import plan_chunk_rows
from kdkernels.ops.linear_kd_loss.op import (
    Heads,
    linear_kd_loss,
    linear_kd_loss_rows,
    unsupported,
)

__all__ = ["Heads", "linear_kd_loss", "linear_kd_loss_rows", "plan_chunk_rows", "unsupported"]
