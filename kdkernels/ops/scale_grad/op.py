"""The contract of ``scale_grad``: a gradient computed in the forward meets its upstream factor.

Losses that compute their gradient in the forward pass call this from their backward. The factor
stays on the device: the kernel reads it there and returns at once when it is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import _native, _triton
from kdkernels._op import Primitive

_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
scale_grad_ = Primitive("scale_grad_", "(Tensor(a!) grad, Tensor scale) -> ()", fake=None)


def scale_grad(grad: Tensor, scale: Tensor, *, backend: str) -> Tensor:
    """``grad * scale`` inside a backward pass, in place where nobody reads ``grad`` again.

    Args:
        grad: gradient computed in the forward pass; any shape, any floating dtype, dense.
        scale: upstream gradient of the scalar loss, ``[]`` float32 or float64.
        backend: ``native``, ``triton`` or ``reference``: the one that computed ``grad``.

    Returns:
        ``grad * scale`` in the dtype of ``grad``; ``grad`` itself, overwritten, unless the graph
        is kept for another backward pass (which would scale it twice).
    """
    if torch.compiler.is_compiling() or _graph_is_kept():
        return grad * scale
    scale_grad_(backend, grad if grad.dim() == 2 else grad.view(1, -1), scale)
    return grad


def unsupported(
    backend: str, grad: Tensor, scale: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot scale this gradient; ``None`` when it can."""
    device = device or grad.device.type
    if backend == "native":
        return _native.reason(device)
    return _triton.reason(device) if backend == "triton" else None
