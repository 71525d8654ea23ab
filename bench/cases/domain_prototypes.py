"""``domain_prototypes`` of the last hidden states of BERT, batch by batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops.domain_prototypes import domain_prototypes
from kdkernels.ops.domain_prototypes.op import domain_prototypes_forward

SEQ = 128
GROUPS = 8  # four domains of two classes
SHAPES = {
    "cpu": [(32 * SEQ, 768), (256 * SEQ, 768)],
    "cuda": [(32 * SEQ, 768), (256 * SEQ, 768), (256 * SEQ, 4096)],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Means = tuple[Tensor, Tensor, Tensor]


class DomainPrototypesCase:
    """See :class:`kdkernels.bench.cases.Case`. A shape is ``(batch * 128 tokens, columns)``."""

    divergences = ("inner", "all")  # positions that count: all but the first and the last, or all
    default_divergences = ("inner",)
    modes = ("forward",)
    rivals = ("eager", "compile")
    row_kernels = ("prototype_parts", "position_sums_kernel")
    narrow_stores = row_kernels  # sums of rows
    unchecked: tuple[str, ...] = ()
    unfused_kernels: tuple[str, ...] = ()

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes: batches of 32 and 256 texts of 128 tokens."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """Hidden states ``[batch, 128, columns]``, groups, and a mask or nothing."""
        tokens, columns = shape
        seq = SEQ if tokens % SEQ == 0 else 1
        batch = tokens // seq
        hidden = torch.randn(batch, seq, columns, device=setting.device).to(setting.dtype)
        groups = torch.arange(batch, device=setting.device) % GROUPS
        if setting.divergence == "all":
            return hidden, groups
        mask = torch.ones(batch, seq, dtype=torch.bool, device=setting.device)
        mask[:, 0] = mask[:, -1] = seq <= 2
        return hidden, groups, mask

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.domain_prototypes`` as users call it."""

        def run(hidden: Tensor, groups: Tensor, mask: Tensor | None = None) -> Tensor:
            means, sums, _ = kdkernels.domain_prototypes(
                hidden, groups, GROUPS, mask=mask, backend=backend
            )
            return torch.cat((means, sums))

        return run

    def rival(self, setting: Setting, name: str) -> Run | str:
        """What users write: a product with the mask, its sum, the sums of rows by index."""
        run: Any = _eager
        if name == "eager":
            return run
        torch._dynamo.reset()  # one shape a time: no limit on recompilations is reached
        compiled: Run = torch.compile(run, dynamic=False)
        return compiled

    def traffic(self, mode: str) -> int:
        """The hidden states are read."""
        return 1

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """Dtypes, even and odd rows, few and many positions and examples, with a mask."""
        for dtype, masked in itertools.product(DTYPES, (True, False)):
            for size in ((8, 40, 768), (2, 300, 200), (40, 7, 333), (3, 1, 64)):
                name = f"{str(dtype).removeprefix('torch.')} {size} {'masked' if masked else 'all'}"
                yield name, _check(dtype, size, masked, device, backend)

    def triton_calls(self) -> Iterator[TritonCall]:
        """With and without a mask, even and odd rows."""
        for dtype, masked in itertools.product(DTYPES, (False, True)):
            for columns in (768, 4096, 333):
                name = f"{columns} {str(dtype).removeprefix('torch.')} {masked}"
                call = partial(_reduce_nothing, dtype, columns, masked)
                yield TritonCall(name, call, wide=columns % 8 == 0)


def _eager(hidden: Tensor, groups: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is None:
        means = hidden.mean(1, dtype=torch.float32)
    else:
        states = (hidden * mask[..., None]).sum(1, dtype=torch.float32)
        means = states / mask.sum(1, keepdim=True).clamp(min=1)
    sums = means.new_zeros(GROUPS, means.shape[1]).index_add_(0, groups, means)
    return torch.cat((means, sums))


def _reduce_nothing(dtype: torch.dtype, columns: int, masked: bool) -> None:
    hidden, groups = torch.zeros(4, 16, columns, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    mask = torch.ones(4, 16, dtype=torch.bool) if masked else None
    domain_prototypes_forward("triton", hidden, groups, mask, 2)


def _check(
    dtype: torch.dtype, size: Sequence[int], masked: bool, device: str, backend: str
) -> list[Check]:
    hidden = torch.randn(*size).to(device, dtype)
    groups = torch.arange(size[0], device=device) % 4 - 1
    mask = torch.rand(*size[:2], device=device) < 0.8 if masked else None

    def run(name: str, precision: torch.dtype) -> Means:
        return domain_prototypes(hidden.to(precision), groups, mask, 3, backend=name)

    results = run(backend, dtype), run("reference", torch.float64), run("reference", dtype)
    return [
        compare(name, actual, oracle, reference, reference.dtype)
        for name, actual, oracle, reference in zip(("means", "sums"), *results, strict=False)
    ] + [
        compare(
            "counts", results[0][2].float(), results[1][2], results[2][2].float(), torch.float32
        )
    ]


CASE = DomainPrototypesCase()
