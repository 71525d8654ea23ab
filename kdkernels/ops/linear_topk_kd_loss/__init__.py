"""``topk_kd_loss`` straight from hidden states and the student's head."""

from kdkernels.ops.linear_topk_kd_loss.op import (
    linear_topk_kd_loss,
    linear_topk_kd_loss_rows,
    unsupported,
)

__all__ = ["linear_topk_kd_loss", "linear_topk_kd_loss_rows", "unsupported"]
