"""Hard cross-entropy and a teacher-student divergence over rows of logits, in one pass."""

import importlib.util

from kdkernels.ops.kd_loss.op import kd_loss, kd_loss_rows, unsupported
from kdkernels.ops.kd_loss.spec import Divergence, Spec, Tail

if importlib.util.find_spec("triton") is not None:
    from kdkernels.ops.kd_loss import triton_launch as _triton_launch  # noqa: F401

__all__ = ["Divergence", "Spec", "Tail", "kd_loss", "kd_loss_rows", "unsupported"]
