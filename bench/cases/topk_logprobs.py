"""``topk_logprobs`` of logits: the sparse teacher."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops.topk_logprobs import Spec, topk_logprobs
from kdkernels.ops.topk_logprobs.op import topk_logprobs_rows

SHAPES = {"cpu": [(512, 32000), (256, 128256)], "cuda": [(8192, 32000), (8192, 128256)]}
K = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TopkCase:
    """See :class:`kdkernels.bench.cases.Case`. ``logsumexp`` is the floor: one pass, no classes."""

    divergences = default_divergences = ("forward_kl",)  # nothing to choose
    modes = ("forward",)
    rivals = ("eager", "logsumexp")
    row_kernels = ("topk_rows", "topk_select_kernel")
    # Results are k ids of 64 bits, no rows.
    narrow_stores = ("topk_rows",)
    unchecked = ("logsumexp",)
    unfused_kernels: tuple[str, ...] = ()

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes, ``(rows, vocabulary)``."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """Logits with a deviation of 3."""
        return ((3 * torch.randn(shape, device=setting.device)).to(setting.dtype),)

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.topk_logprobs`` as users call it; the log-probabilities and the tail."""

        def run(logits: Tensor) -> Tensor:
            k = min(K, logits.shape[-1])
            top = kdkernels.topk_logprobs(
                logits, k, temperature=setting.temperature, backend=backend
            )
            return torch.cat((top.logprobs, top.tail[..., None]), -1)

        return run

    def rival(self, setting: Setting, name: str) -> Run | str:
        """What users write without this op; the lower bound of a pass by our own ``kd_loss``."""
        if name == "logsumexp":
            return _cross_entropy
        if name != "eager":
            return f"{name} has no case here"

        def run(logits: Tensor) -> Tensor:
            z = logits.float() / setting.temperature
            values = torch.topk(z, min(K, z.shape[-1])).values
            logprobs = values - torch.logsumexp(z, -1, keepdim=True)
            return torch.cat((logprobs, 1 - logprobs.exp().sum(-1, keepdim=True)), -1)

        return run

    def traffic(self, mode: str) -> int:
        """Read once."""
        return 1

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """dtypes, options, ties, masked classes, few classes."""
        for dtype in DTYPES:
            x = (3 * torch.randn(4, 3000)).to(device, dtype)
            name = str(dtype).removeprefix("torch.")
            yield name, _check(x, 20, Spec(), backend)
            capped = Spec(temperature=2.0, scale=0.5, softcap=5.0, classes=2990)
            yield f"{name} capped", _check(x, 20, capped, backend)
        x = torch.randn(3, 2500, device=device)
        yield "ties", _check(x.round(), 100, Spec(), backend)
        x[:, 10:] = -torch.inf
        yield "masked", _check(x, 20, Spec(), backend)
        yield "all of them", _check(x[:, :9], 9, Spec(), backend)
        yield "no rows", _check(x[:0], 9, Spec(), backend)
        x = torch.full((2, 900), -21.0, device=device)
        x[:, 5] = 8.0
        yield "a tail of 1e-10", _check(x, 1, Spec(), backend)

    def triton_calls(self) -> Iterator[TritonCall]:
        """dtypes, capped or not, few and many classes wanted, short and odd rows."""
        for dtype in DTYPES:
            for columns, k, softcap in ((32000, 64, 0.0), (50257, 64, 30.0), (32000, 1024, 0.0)):
                name = f"k = {k} of {columns} {str(dtype).removeprefix('torch.')}"
                call = partial(_select_nothing, dtype, columns, k, softcap)
                yield TritonCall(name, call, wide=columns % 8 == 0)
            yield TritonCall("k = 1 of 100", partial(_select_nothing, dtype, 100, 1, 0.0), False)


def _cross_entropy(logits: Tensor) -> Tensor:
    labels = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    loss: Any = kdkernels.kd_loss(logits, None, labels)
    result: Tensor = loss
    return result


def _select_nothing(dtype: torch.dtype, columns: int, k: int, softcap: float) -> None:
    spec = Spec(softcap=softcap)
    topk_logprobs_rows("triton", torch.empty(3, columns, dtype=dtype), k, spec)


def _check(x: Tensor, k: int, spec: Spec, backend: str) -> list[Check]:
    found = topk_logprobs(x, k, spec, backend=backend)
    oracle = topk_logprobs(x.double(), k, spec, backend="reference")
    reference = topk_logprobs(x, k, spec, backend="reference")
    # In logarithms errors are relative: a tail may be small.
    tails = [tail.double().log() for tail in (found[2], oracle[2], reference[2])]
    wrong = (found[0] != oracle[0]).double()
    return [
        compare("ids", wrong, torch.zeros_like(wrong), torch.zeros_like(wrong), torch.float64),
        compare("logprobs", found[1], oracle[1], reference[1], torch.float32),
        compare("tail", tails[0], tails[1], tails[2], torch.float32),
    ]


CASE = TopkCase()
