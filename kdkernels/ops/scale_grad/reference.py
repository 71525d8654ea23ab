"""The definition of ``scale_grad_`` in PyTorch."""

from __future__ import annotations

from torch import Tensor

from kdkernels.ops.scale_grad.op import scale_grad_


@scale_grad_.launcher("reference")
def scale_grad_reference(grad: Tensor, scale: Tensor) -> None:
    """Multiplies ``grad`` by the scalar tensor ``scale`` in place."""
    grad.mul_(scale)
