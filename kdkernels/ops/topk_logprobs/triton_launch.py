"""Launches the Triton kernels of ``topk_logprobs``; imports Triton at the first launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels._triton import device_guard
from kdkernels.ops.topk_logprobs.op import topk_logprobs_rows
from kdkernels.ops.topk_logprobs.spec import Spec

_BLOCK = 2048  # 8 columns a thread, which is 16 bytes of bf16; as many groups


class Scalars(NamedTuple):
    """What a kernel gets at run time."""

    inv_t: float
    scale: float
    softcap: float


def capacity_of(k: int) -> int:
    """Candidates that a row may have before the bound is raised: 1420 are to be expected for k =
    1024, 66 for k = 64.
    """
    capacity = 128
    while capacity < 2 * k:
        capacity *= 2
    return capacity


@topk_logprobs_rows.launcher("triton")
def topk_logprobs_triton(
    x: Tensor, k: int, numbers: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and tail; see ``op.py``."""
    from kdkernels.ops.topk_logprobs import triton_kernels as kernels

    spec = Spec.of(numbers)
    rows, columns = x.shape
    classes, capacity = spec.classes_of(columns), capacity_of(k)
    block = min(max(16, 1 << (classes - 1).bit_length()), _BLOCK)
    scalars = Scalars(1.0 / spec.temperature, float(spec.scale), float(spec.softcap))
    part = min(capacity // 2, 128)  # candidates compared with as many others at a time
    capped = spec.softcap != 0.0
    ids = x.new_empty((rows, k), dtype=torch.int64)
    logprobs = x.new_empty((rows, k), dtype=torch.float32)
    tail = x.new_empty(rows, dtype=torch.float32)
    picked = x.new_empty((rows, capacity), dtype=torch.int32)
    counts = x.new_empty(rows, dtype=torch.int32)
    stats = x.new_empty((rows, 2), dtype=torch.float32)
    if rows == 0:
        return ids, logprobs, tail
    with device_guard(x):
        kernels.topk_select_kernel[(rows,)](
            x,
            picked,
            counts,
            stats,
            x.stride(0),
            classes,
            k,
            capacity,
            scalars,
            SOFTCAP=capped,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
        kernels.topk_rank_kernel[(rows,)](
            x,
            picked,
            counts,
            stats,
            ids,
            logprobs,
            tail,
            x.stride(0),
            k,
            capacity,
            scalars,
            SOFTCAP=capped,
            PART=part,
            num_warps=part * part // 1024,
        )
    return ids, logprobs, tail
