"""``linear_topk_kd_loss`` against ``topk_kd_loss`` of the logits in full, over every backend.

What it shares with ``linear_kd_loss`` (chunks, 16-bit heads, memory) is tested there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.backends import Backend
from helpers.budget import assert_within_budget
from torch import Tensor

import kdkernels
from kdkernels.ops.kd_loss import Divergence, Spec, Tail
from kdkernels.ops.linear_topk_kd_loss import linear_topk_kd_loss, linear_topk_kd_loss_rows
from kdkernels.ops.linear_topk_kd_loss.op import (
    linear_topk_kd_loss_forward,
    linear_topk_kd_loss_grad,
)
from kdkernels.ops.topk_kd_loss import TopKTeacher

ROWS, VOCAB, WIDTH, K = 7, 53, 12, 6
SPEC = Spec(
    Divergence.FORWARD_KL.value,
    temperature=2.0,
    ce_weight=0.4,
    kd_weight=0.6,
    tail=int(Tail.BUCKET),
)


class Problem:
    """Float64 inputs."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        self.hidden, self.weight, self.bias = normal(ROWS, WIDTH), normal(VOCAB, WIDTH), None
        top = normal(ROWS, VOCAB).log_softmax(1).topk(K)
        self.teacher = TopKTeacher(top.indices, top.values.float())
        self.labels = torch.randint(VOCAB, (ROWS,), generator=g)
        self.labels[2] = -100

    def run(
        self, backend: str, device: str, dtype: torch.dtype, spec: Spec, *, wide: bool = False,
        rows: bool = False, chunk_rows: int | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Loss (or rows) and gradients; ``wide``: the values of ``dtype``, in float64."""
        leaves = [
            x.to(device, dtype).to(torch.float64 if wide else dtype).requires_grad_()
            for x in (self.hidden, self.weight)
        ]
        teacher = TopKTeacher(*(x.to(device) for x in self.teacher))
        args = (leaves[0], teacher, self.labels.to(device), None)
        options: dict[str, Any] = {"head": (leaves[1], None), "backend": backend}
        if rows:
            value = linear_topk_kd_loss_rows(*args, spec, chunk_rows=chunk_rows, **options)
        else:
            value, _ = linear_topk_kd_loss(*args, None, spec, chunk_rows=chunk_rows, **options)
        value.backward(torch.linspace(1, 2, len(value)).to(value) if rows else None)
        return [value.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("tail", [t for t in Tail if t is not Tail.FULL], ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [False, True])
def test_matches_reference(backend: Backend, tail: Tail, dtype: torch.dtype, rows: bool) -> None:
    problem, spec = Problem(), SPEC._replace(tail=int(tail))
    actual = problem.run(backend.name, backend.device, dtype, spec, rows=rows, chunk_rows=3)
    oracle = problem.run("reference", "cpu", dtype, spec, rows=rows, wide=True)
    same = problem.run("reference", "cpu", dtype, spec, rows=rows)
    for a, o, s in zip(actual, oracle, same, strict=True):
        assert_within_budget(a, o, s, a.dtype)


def test_it_is_the_loss_of_the_logits() -> None:
    problem = Problem(1)
    hidden, weight = problem.hidden.float(), problem.weight.float()
    options = {"temperature": 2.0, "tail": "uniform", "divergence": "reverse_kl"}
    logits = kdkernels.topk_kd_loss(hidden @ weight.T, *problem.teacher, problem.labels, **options)
    fused = kdkernels.linear_topk_kd_loss(
        hidden, weight, *problem.teacher, problem.labels, chunk_bytes=VOCAB * 4 * 2, **options
    )
    torch.testing.assert_close(fused, logits)
    module = kdkernels.LinearTopKKDLoss(**options)
    torch.testing.assert_close(module(hidden, weight, *problem.teacher, problem.labels), logits)


def test_opcheck() -> None:
    if "native" not in kdkernels.available_backends("linear_topk_kd_loss"):
        pytest.skip("no compiled kernels here")
    problem = Problem(2)
    tensors = (problem.hidden.float(), problem.weight.float(), None, *problem.teacher)
    args = (*tensors, problem.labels, None, None, [float(x) for x in SPEC], 3)
    torch.library.opcheck(linear_topk_kd_loss_forward.overload("native"), args)
    wanted = [True, True, False]
    torch.library.opcheck(linear_topk_kd_loss_grad.overload("native"), (*args, wanted))


HIDDEN, HEAD = torch.randn(4, 8), torch.randn(10, 8)
IDS, P = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student_weight": torch.randn(10, 9)},
         r"linear_topk_kd_loss: student_weight must be \[vocab, 8\] for hidden states \[4, 8\]"),
        ({"topk_ids": IDS + 10},
         r"linear_topk_kd_loss: topk_ids must be in \[0, 10\), or -1 for no entry, got 10 in"),
        ({"topk_ids": IDS[:, :2]},
         r"linear_topk_kd_loss: topk_logprobs must have the shape of topk_ids \[4, 2\]"),
        ({"chunk_bytes": 9, "chunk_rows": 9},
         "linear_topk_kd_loss: chunk_rows must not be given together with chunk_bytes"),
        ({"student_weight": torch.zeros(3)},
         r"linear_topk_kd_loss: student_weight must be \[vocab, width\], got shape \[3\]"),
        ({"divergence": "tvd"},
         "linear_topk_kd_loss: divergence must be one of forward_kl, reverse_kl, got 'tvd'"),
    ],
)  # fmt: skip
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    full = {"student_hidden": HIDDEN, "student_weight": HEAD, "topk_ids": IDS, "topk_logprobs": P}
    with pytest.raises(ValueError, match=message):
        kdkernels.linear_topk_kd_loss(**(full | arguments))
