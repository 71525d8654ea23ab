"""``gate_scores`` of the neurons and the heads of a layer of BERT, for one loss or two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.bench.accuracy import Check, compare
from kdkernels.bench.cases import Inputs, Run, Setting, TritonCall
from kdkernels.ops.gate_scores import gate_scores
from kdkernels.ops.gate_scores.op import gate_scores_forward

SEQ = 128
SHAPES = {
    "cpu": [(32 * SEQ, 3072), (32 * SEQ, 768)],
    "cuda": [(32 * SEQ, 3072), (32 * SEQ, 768), (32 * SEQ, 11008)],
}
HEAD = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class What:
    """What is scored."""

    grads: int = 2
    heads: bool = False
    per: str = "batch"

    def width(self, columns: int) -> int:
        """Columns of a group; of odd rows what divides them."""
        return math.gcd(columns, HEAD) if self.heads else 1


WHAT = {
    "neurons": What(),
    "heads": What(heads=True),
    "neurons_one": What(grads=1),
    "heads_one": What(grads=1, heads=True),
    "neurons_example": What(per="example"),
    "heads_example": What(heads=True, per="example"),
}


class GateScoresCase:
    """See :class:`kdkernels.bench.cases.Case`. A shape is ``(batch * 128 tokens, columns)``."""

    divergences = tuple(WHAT)
    default_divergences = ("neurons", "heads")
    modes = ("forward",)
    rivals = ("eager", "compile")
    row_kernels = ("gate_parts", "gate_scores_kernel")
    narrow_stores = row_kernels  # sums of rows
    unchecked: tuple[str, ...] = ()
    unfused_kernels: tuple[str, ...] = ()

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes: 32 x 128 tokens, the neurons and the hidden states of BERT-base."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """The activation and the gradients, each ``[batch, 128, columns]``."""
        tokens, columns = shape
        seq = SEQ if tokens % SEQ == 0 else 1
        size = (tokens // seq, seq, columns)
        return tuple(
            torch.randn(size, device=setting.device).to(setting.dtype)
            for _ in range(1 + WHAT[setting.divergence].grads)
        )

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.gate_scores`` as users call it."""
        what = WHAT[setting.divergence]

        def scores(activation: Tensor, *grads: Tensor) -> Tensor:
            found = kdkernels.gate_scores(
                activation,
                grads if len(grads) == 2 else grads[0],
                width=what.width(activation.shape[-1]),
                per=what.per,
                backend=backend,
            )
            return torch.stack(found) if len(grads) == 2 else found[None]

        return scores

    def rival(self, setting: Setting, name: str) -> Run | str:
        """What users write for each loss: the product, its sum, the absolute value."""
        run: Any = partial(_eager, WHAT[setting.divergence])
        if name == "eager":
            return run
        torch._dynamo.reset()  # one shape a time: no limit on recompilations is reached
        compiled: Run = torch.compile(run, dynamic=False)
        return compiled

    def traffic(self, mode: str) -> int:
        """Activation and both gradients are read."""
        return 3

    def mixed_traffic(self, setting: Setting) -> int:
        """The same with as many gradients as there are."""
        return 1 + WHAT[setting.divergence].grads

    def checks(self, device: str, backend: str) -> Iterator[tuple[str, list[Check]]]:
        """What is scored, dtypes, even and odd rows, many rows and few, with a mask."""
        for (name, what), dtype in itertools.product(WHAT.items(), DTYPES):
            for examples, rows, columns in ((4, 40, 768), (2, 300, 200), (3, 7, 333)):
                found = _check(what, dtype, (examples, rows, columns), device, backend)
                dtype_name = str(dtype).removeprefix("torch.")
                yield f"{name} {dtype_name} {examples} x {rows} x {columns}", found

    def triton_calls(self) -> Iterator[TritonCall]:
        """One gradient and two, with and without a mask, even and odd rows."""
        for grads, dtype, masked in itertools.product((1, 2), DTYPES, (False, True)):
            for columns in (768, 3072, 333):
                name = f"{grads} {columns} {str(dtype).removeprefix('torch.')} {masked}"
                call = partial(_score_nothing, grads, dtype, columns, masked)
                yield TritonCall(name, call, wide=columns % 8 == 0)


def _eager(what: What, activation: Tensor, *grads: Tensor) -> Tensor:
    width = what.width(activation.shape[-1])
    wide = torch.float64 if activation.dtype == torch.float64 else torch.float32
    rows = (0, 1) if what.per == "batch" else (1,)
    found = []
    for grad in grads:
        dots = (activation * grad).sum(rows, dtype=wide)
        if width > 1:
            dots = dots.unflatten(-1, (-1, width)).sum(-1)
        dots = dots.abs()
        found.append(dots if what.per == "batch" else dots.sum(0))
    return torch.stack(found)


def _score_nothing(grads: int, dtype: torch.dtype, columns: int, masked: bool) -> None:
    activation, *others = (torch.zeros(64, columns, dtype=dtype) for _ in range(1 + grads))
    mask = torch.ones(64, dtype=torch.bool) if masked else None
    gate_scores_forward("triton", activation, others, mask, 1, 2)


def _check(
    what: What, dtype: torch.dtype, size: Sequence[int], device: str, backend: str
) -> list[Check]:
    examples, rows, columns = size
    tensors = [torch.randn(examples * rows, columns).to(device, dtype) for _ in range(3)]
    mask = torch.arange(examples * rows, device=device) % 5 != 2

    def run(name: str, precision: torch.dtype) -> list[Tensor]:
        activation, *grads = (x.to(precision) for x in tensors[: 1 + what.grads])
        return gate_scores(
            activation,
            grads,
            mask,
            what.width(columns),
            1 if what.per == "batch" else examples,
            backend=name,
        )

    results = run(backend, dtype), run("reference", torch.float64), run("reference", dtype)
    names = ["first scores", "second scores"]
    return [
        compare(name, actual, oracle, reference, reference.dtype)
        for name, actual, oracle, reference in zip(names, *results, strict=False)
    ]


CASE = GateScoresCase()
