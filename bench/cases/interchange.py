"""``interchange`` of a third of each row, from another row of the source."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops.interchange import Mode, interchange
from kdkernels.ops.interchange.op import (
    interchange_forward,
    interchange_grad_base,
    interchange_grad_source,
)

SEQ = 128
SHAPES = {"cpu": [(32 * SEQ, 768)], "cuda": [(32 * SEQ, 768), (32 * SEQ, 4096)]}
SHARE = 0.3  # of a row that is exchanged: what causal distillation draws
MODES = {mode.name.lower(): mode for mode in Mode}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROBED = 2**18  # results up to here are compared in full, larger ones only timed


class InterchangeCase:
    """See :class:`kdkernels.bench.cases.Case`. A shape is ``(batch * 128 positions, hidden)``."""

    divergences = tuple(MODES)
    default_divergences = ("swap",)
    modes = ("forward", "full")
    rivals = ("eager", "where", "compile")
    row_kernels = (
        "swap_positions",
        "collect_positions",
        "interchange_kernel",
        "interchange_grad_source_kernel",
    )
    unchecked: tuple[str, ...] = ()
    unfused_kernels: tuple[str, ...] = ()

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes: 32 x 128 x 768."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """Base, source, the gradient of the result, and spans of one length at random places."""
        positions, hidden = shape
        seq = SEQ if positions >= SEQ else max(1, positions // 4)
        size = (max(1, positions // seq), seq, hidden)
        batch, length = size[0], max(1, int(SHARE * seq))
        base, source, grad = (
            torch.randn(size, device=setting.device).to(setting.dtype) for _ in range(3)
        )
        starts = [torch.randint(0, seq - length + 1, (batch,)) for _ in range(2)]
        index = (*starts, torch.full((batch,), length), torch.randperm(batch))
        return (
            base.requires_grad_(),
            source.requires_grad_(),
            grad,
            *(x.to(setting.device) for x in index),
        )

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.interchange`` as users call it."""

        def swap(base: Tensor, source: Tensor, *index: Tensor) -> Tensor:
            start, source_start, length, row = index
            return kdkernels.interchange(
                base,
                source,
                base_start=start,
                source_start=source_start,
                length=length,
                source_row=row,
                mode=setting.divergence,
                backend=backend,
            )

        return partial(_with_gradient, swap)

    def rival(self, setting: Setting, name: str) -> Run | str:
        """Clone and scatter by index tensors; a gather of everything and ``where``."""
        if name == "eager":
            return partial(_with_gradient, partial(_scattered, setting.divergence))
        run: Any = partial(_chosen, setting.divergence)
        if name == "compile":
            torch._dynamo.reset()  # one shape a time: no limit on recompilations is reached
            run = torch.compile(run, dynamic=False)
        return partial(_with_gradient, run)

    def traffic(self, mode: str) -> int:
        """Base read, result written; upstream gradient read, both gradients written.

        What is read of the source is not read of the base (``swap``), and of the upstream gradient
        once for either result.
        """
        return 2 if mode == "forward" else 5

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """Modes, dtypes, columns on and off the 16-byte boundaries, sources that overlap."""
        for mode, dtype in itertools.product(Mode, DTYPES):
            name = f"{mode.name.lower()} {str(dtype).removeprefix('torch.')}"
            for hidden, dims in ((768, (0, 768)), (333, (0, 333)), (96, (5, 64))):
                found = _check(mode, dtype, hidden, dims, device, backend)
                yield f"{name} {hidden} columns, {dims[0]} to {dims[1]}", found

    def triton_calls(self) -> Iterator[TritonCall]:
        """Modes, dtypes and both indices, even and odd rows."""
        for mode, dtype, mapped in itertools.product(Mode, DTYPES, (False, True)):
            for hidden in (768, 4096, 333):
                name = f"{mode.name} {hidden} {str(dtype).removeprefix('torch.')} {mapped}"
                call = partial(_swap_nothing, mode, dtype, hidden, mapped)
                yield TritonCall(name, call, wide=hidden % 8 == 0)


class _Upstream(torch.autograd.Function):
    """A number whose gradient for the result is a given tensor, as a loss far above gives it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        if out.numel() <= PROBED:
            return (out.double() * grad.double()).sum().to(wide)
        return out.new_zeros((), dtype=wide)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def _with_gradient(run: Run, base: Tensor, source: Tensor, grad: Tensor, *index: Tensor) -> Tensor:
    out = run(base, source, *index)
    if not torch.is_grad_enabled():
        return out
    result: Tensor = _Upstream.apply(out, grad)
    return result


def _combine(mode: str, base: Tensor, source: Tensor) -> Tensor:
    if mode == "swap":
        return source
    return base + source if mode == "add" else base - source


def _scattered(mode: str, base: Tensor, source: Tensor, *index: Tensor) -> Tensor:
    """All spans have one length, which the host knows: no boolean mask, no synchronisation."""
    start, source_start, _, row = index
    step = torch.arange(max(1, int(SHARE * base.shape[1])), device=base.device)
    rows = torch.arange(base.shape[0], device=base.device)[:, None]
    at, taken = start[:, None] + step, source[row[:, None], source_start[:, None] + step]
    out = base.clone()
    out[rows, at] = taken if mode == "swap" else _combine(mode, base[rows, at], taken)
    return out


def _chosen(mode: str, base: Tensor, source: Tensor, *index: Tensor) -> Tensor:
    start, source_start, length, row = (x[:, None] for x in index)
    step = torch.arange(base.shape[1], device=base.device) - start
    live = (step >= 0) & (step < length)
    taken = source[row, (source_start + step).clamp(0, source.shape[1] - 1)]
    return torch.where(live[..., None], _combine(mode, base, taken), base)


def _swap_nothing(mode: Mode, dtype: torch.dtype, hidden: int, mapped: bool) -> None:
    base, source = (torch.empty(2, 3, hidden, dtype=dtype) for _ in range(2))
    one = torch.zeros(2, dtype=torch.int64)
    index = [torch.zeros(2, 3, dtype=torch.int64)] if mapped else [one, one, one, one]
    turned = [torch.zeros(6, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)]
    interchange_forward("triton", base, source, index, int(mode), 0, hidden)
    interchange_grad_base("triton", base, index, 2, 3, 0, hidden)
    inverse = turned if mapped else index
    interchange_grad_source("triton", base, inverse, 2, 3, mode == Mode.SUBTRACT, 0, hidden)


def _check(
    mode: Mode,
    dtype: torch.dtype,
    hidden: int,
    dims: tuple[int, int],
    device: str,
    backend: str,
) -> list[Check]:
    base, source, upstream = (torch.randn(4, 6, hidden).to(device, dtype) for _ in range(3))
    index = [
        torch.tensor(x, device=device)
        for x in ([0, 1, 4, 0], [2, 2, 0, 0], [3, 4, 0, 6], [1, 1, 0, 3])
    ]

    def run(name: str, precision: torch.dtype) -> list[Tensor]:
        first, second = (x.to(precision, copy=True).requires_grad_() for x in (base, source))
        out = interchange(first, second, index, mode, *dims, backend=name)
        return [out, *torch.autograd.grad(out, (first, second), upstream.to(precision))]

    results = run(backend, dtype), run("reference", torch.float64), run("reference", dtype)
    names = ["result", "gradient of the base", "gradient of the source"]
    return [
        compare(name, actual, oracle, reference, reference.dtype)
        for name, actual, oracle, reference in zip(names, *results, strict=True)
    ]


CASE = InterchangeCase()
