"""``kd_loss`` with a sparse teacher: the ids and log-probabilities of a few classes a row."""

import importlib.util

from kdkernels.ops.topk_kd_loss.op import (
    TopKTeacher,
    topk_kd_loss,
    topk_kd_loss_rows,
    unsupported,
)

if importlib.util.find_spec("triton") is not None:
    from kdkernels.ops.topk_kd_loss import triton_launch as _triton_launch  # noqa: F401

__all__ = ["TopKTeacher", "topk_kd_loss", "topk_kd_loss_rows", "unsupported"]
