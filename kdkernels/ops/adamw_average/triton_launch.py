"""Launches the Triton kernel of ``adamw_average``; imports Triton at the first launch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels._triton import device_guard
from kdkernels.ops._shared.multi_tensor import CHUNK
from kdkernels.ops.adamw_average.op import adamw_average_grads, adamw_average_update

_BLOCK = 1024
_GRAD = 1  # column of the gradients' addresses


@adamw_average_update.launcher("triton")
def adamw_average_triton(
    table: Tensor,
    weight: Tensor,
    lr: Tensor,
    factor: Tensor,
    found_inf: Tensor | None,
    constants: Sequence[float],
    dtypes: Sequence[int],
    chunks: int,
) -> None:
    """See ``op.py``."""
    from kdkernels.ops.adamw_average.triton_kernels import adamw_kernel

    beta1, beta2, eps, weight_decay, maximize = constants
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
    param, grad, average, master = dtypes
    with device_guard(table):
        adamw_kernel[(chunks,)](
            table,
            weight,
            lr,
            factor,
            found_inf,
            table.shape[0],
            -1.0 if maximize else 1.0,
            logs[0],
            1.0 - beta1,
            beta2,
            logs[1],
            1.0 - beta2,
            eps,
            weight_decay,
            PARAM=param,
            GRAD=grad,
            AVERAGE=average == 0,
            MASTER=master == 0,
            CHUNK=CHUNK,
            BLOCK=_BLOCK,
            num_warps=4,
        )


@adamw_average_grads.launcher("triton")
def adamw_average_grads_triton(table: Tensor, addresses: Sequence[int]) -> None:
    """See ``op.py``."""
    # Pinned, it need not wait; the allocator keeps it until the copy is made.
    host = torch.tensor(addresses, dtype=torch.int64, pin_memory=table.is_cuda)
    table[:, _GRAD].copy_(host, non_blocking=True)
