"""Launches the Triton kernels of ``weight_average``; imports Triton at the first launch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdkernels._triton import device_guard
from kdkernels.ops.weight_average.op import weight_average_swap, weight_average_update
from kdkernels.ops.weight_average.plan import CHUNK

_BLOCK = 2048


@weight_average_update.launcher("triton")
def weight_average_triton(
    table: Tensor, weight: Tensor, dtypes: Sequence[int], chunks: int
) -> None:
    """See ``op.py``."""
    from kdkernels.ops.weight_average.triton_kernels import average_kernel

    average, param, copy = dtypes
    with device_guard(table):
        average_kernel[(chunks,)](
            table,
            weight,
            table.shape[0],
            AVERAGE=average,
            PARAM=param,
            COPY=copy,
            COMPENSATED=average != 0,
            CHUNK=CHUNK,
            BLOCK=_BLOCK,
            num_warps=8,
        )


@weight_average_swap.launcher("triton")
def weight_average_swap_triton(
    table: Tensor, dtypes: Sequence[int], chunks: int, back: bool
) -> None:
    """See ``op.py``."""
    from kdkernels.ops.weight_average.triton_kernels import swap_kernel

    average, param, _ = dtypes
    with device_guard(table):
        swap_kernel[(chunks,)](
            table,
            table.shape[0],
            int(back),
            AVERAGE=average,
            PARAM=param,
            CHUNK=CHUNK,
            BLOCK=_BLOCK,
            num_warps=8,
        )
