"""``scale_grad_``: the upstream factor of a gradient that was computed in the forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops.scale_grad import scale_grad_

SHAPES = {"cpu": [(512, 32000), (256, 128256)], "cuda": [(4096, 32000), (4096, 128256)]}


class ScaleGradCase:
    """See :class:`kdkernels.bench.cases.Case`."""

    divergences = default_divergences = ("forward_kl",)  # nothing to choose
    modes = ("forward",)
    rivals = ("eager",)
    row_kernels = ("scale_rows", "scale_grad_kernel")
    unchecked: tuple[str, ...] = ()
    unfused_kernels: tuple[str, ...] = ()

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """A gradient and a factor, -1: applied again and again it makes nothing overflow."""
        grad = torch.randn(shape, device=setting.device).to(setting.dtype)
        return grad, torch.tensor(-1.0, device=setting.device)

    def ours(self, setting: Setting, backend: str) -> Run:
        """The primitive, in place."""

        def run(grad: Tensor, scale: Tensor) -> Tensor:
            scale_grad_(backend, grad, scale)
            return grad

        return run

    def rival(self, setting: Setting, name: str) -> Run:
        """``Tensor.mul_``."""
        return Tensor.mul_

    def traffic(self, mode: str) -> int:
        """Read once, written once."""
        return 2

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """dtypes, factors and layouts."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        for dtype, factor in itertools.product(dtypes, (1.0, 0.0, -2.5)):
            for shape in ((0, 5), (3, 5000)):
                grad = torch.randn(shape).to(device, dtype)
                name = f"{str(dtype).removeprefix('torch.')} by {factor:g}, {shape[0]} rows"
                yield name, [_check(grad, factor, backend)]
        wide = torch.randn(4, 700, device=device)
        yield "rows with a stride", [_check(wide[:, :600], 3.0, backend)]

    def triton_calls(self) -> Iterator[TritonCall]:
        """dtypes, aligned and odd rows."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        for dtype, columns in itertools.product(dtypes, (32000, 50257)):
            name = f"{columns} columns {str(dtype).removeprefix('torch.')}"
            yield TritonCall(name, partial(_scale_nothing, dtype, columns), wide=columns % 8 == 0)


def _scale_nothing(dtype: torch.dtype, columns: int) -> None:
    scale_grad_("triton", torch.empty(3, columns, dtype=dtype), torch.ones(()))


def _check(grad: Tensor, factor: float, backend: str) -> Check:
    oracle, reference = grad.double() * factor, grad * factor
    scale_grad_(backend, grad, torch.tensor(factor, device=grad.device))
    return compare("gradient", grad, oracle, reference, grad.dtype)


CASE = ScaleGradCase()
