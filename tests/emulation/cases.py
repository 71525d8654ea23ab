"""What the tests of the emulation share: layouts of the launch plan, inputs, expected results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from emulation import backend
from helpers.budget import assert_within_budget
from torch import Tensor

from kdkernels.ops.kd_loss.reference import kd_loss_reference

# Blocks that share a row; 0: the kernel that walks over the row in global memory.
LAYOUTS = {"cluster1": 1, "cluster2": 2, "cluster4": 4, "cluster8": 8, "looped": 0}
SEEDS = range(4)  # one for each kind of order


def device_for(
    ranks: int, classes: int, element_size: int, models: int = 2, entries: int = 0
) -> dict[str, int]:
    """A GPU on which the plan splits a row over ``ranks`` blocks (0: walks over it).

    A third of its shared memory holds just a block's share of the rows of the models, and of the
    list of a sparse teacher.
    """
    if ranks == 0:
        return {"major": 8, "shared": 1024 + 32 * entries}
    if ranks == 1:
        return backend.H200
    per_vector = 16 // element_size
    vectors = -(-(classes + 2 * (per_vector - 1)) // per_vector)
    share = -(-vectors // ranks)
    warps = min(max(-(-share // 64), 1), 8)
    block = share * models * 16 + (warps + ranks) * (32 + 16)
    if entries:
        bits = -(-share * per_vector // 32) * 4
        block += (warps + ranks) * 32 + -(-(8 * entries + bits) // 16) * 16
    return {"major": 9, "shared": 3 * (block + 1024) - 1024}


def make(rows: int, classes: int, dtype: torch.dtype, *, stride: int | None = None) -> Tensor:
    """Logits in a buffer full of NaN."""
    stride = stride or classes
    x = torch.full((rows, stride), torch.nan, dtype=dtype)[:, :classes]
    return x.copy_(3 * torch.randn(rows, classes))


class Expected:
    """Loss, rows and gradient of a reference: in float64, and with float32 arithmetic."""

    def __init__(
        self, student: Tensor, *args: Any, reference: Callable[..., Any] = kd_loss_reference
    ) -> None:
        self.results = []
        for dtype in (torch.float64, torch.float32):
            x = student.detach().to(dtype).requires_grad_()
            loss, _, rows = reference(x, *args)
            (grad,) = torch.autograd.grad(loss, x)
            if dtype == torch.float32:
                grad = grad.to(student.dtype)
            self.results.append((loss.detach(), rows.detach(), grad))

    def check(
        self,
        loss: Tensor,
        *,
        rows: Tensor | None = None,
        grad: Tensor | None = None,
        unit: float = 0.0,
    ) -> None:
        """Raises ``AssertionError`` unless all are within the budget.

        ``unit`` is the size of the probabilities whose difference the gradient is.
        """
        for i, actual in enumerate((loss, rows, grad)):
            if actual is not None:
                wide, same = self.results[0][i], self.results[1][i]
                of_grad = unit if actual is grad else 0.0
                assert_within_budget(actual, wide, same, actual.dtype, unit=of_grad)
