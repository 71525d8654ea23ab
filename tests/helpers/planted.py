"""A wrong kernel for tests of what must notice it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops.kd_loss import Spec
from kdkernels.ops.kd_loss.op import kd_loss_forward, kd_loss_grad
from kdkernels.ops.kd_loss.reference import kd_loss_reference
from kdkernels.ops.scale_grad.op import scale_grad_


def plant(name: str, spoil: Callable[[Tensor], Tensor]) -> None:
    """Gives ``kd_loss`` a backend that is right but for what ``spoil`` does to its gradient."""

    @kd_loss_grad.launcher(name)
    def _wrong_gradient(student: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            loss, parts, _ = kd_loss_reference(leaf, *args[:4], Spec.of(args[4]))
            (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), parts, spoil(grad)

    @kd_loss_forward.launcher(name)
    def _right_loss(student: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return kd_loss_reference(student.detach(), *args[:4], Spec.of(args[4]))

    @scale_grad_.launcher(name)
    def _right_factor(grad: Tensor, scale: Tensor) -> None:
        grad.mul_(scale)
