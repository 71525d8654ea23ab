"""``weight_average`` against its reference, over every backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from emulation import backend as emulation
from helpers.backends import Backend
from helpers.budget import assert_within_budget
from torch import Tensor

from kdkernels.ops.weight_average import Plan, weight_average_, weight_average_swap_
from kdkernels.ops.weight_average.op import weight_average_swap, weight_average_update
from kdkernels.ops.weight_average.plan import CHUNK, HALVES

INF, NAN = float("inf"), float("nan")
# Scalars, no elements, odd sizes, more than a chunk.
SHAPES = [(), (5,), (0, 3), (70, 33), (CHUNK + 13,), (2, 3, 4)]


def tensors(dtype: torch.dtype, device: str, shapes: Any = SHAPES) -> list[Tensor]:
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


@contextmanager
def reach(backend: Backend, plan: Plan) -> Iterator[None]:
    """The emulation must be told what is reached by addresses."""
    if backend.name != "emulated":
        yield
        return
    written = [*plan.averages, *plan.compensations, *plan.copies, *plan.params]
    with emulation.reachable([], written):
        yield


def update(backend: Backend, plan: Plan, weight: float) -> None:
    with reach(backend, plan):
        weight_average_(plan, torch.tensor(weight, device=backend.device), backend=backend.name)


def swap(backend: Backend, plan: Plan, back: bool = False) -> None:
    with reach(backend, plan):
        weight_average_swap_(plan, back=back, backend=backend.name)


@pytest.mark.parametrize("copy", [None, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("param", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("weight", [0.3, 0.001, 0.0])
def test_float32_average(
    backend: Backend, weight: float, param: torch.dtype, copy: torch.dtype | None
) -> None:
    averages, params = tensors(torch.float32, backend.device), tensors(param, backend.device)
    copies = [] if copy is None else [torch.full_like(a, NAN, dtype=copy) for a in averages]
    oracle = [
        a.double() + weight * (p.double() - a.double())
        for a, p in zip(averages, params, strict=True)
    ]
    same = [a + weight * (p.float() - a) for a, p in zip(averages, params, strict=True)]
    kept = [p.clone() for p in params]
    update(backend, Plan(averages, params, copies=copies), weight)
    for i, (actual, right, alike) in enumerate(zip(averages, oracle, same, strict=True)):
        assert_within_budget(actual, right, alike, torch.float32)
        assert torch.equal(params[i], kept[i])
        if copies:
            assert_within_budget(copies[i], right, alike.to(copy), copies[i].dtype)


@pytest.mark.parametrize("param", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("average", HALVES, ids=str)
def test_compensated_average(backend: Backend, average: torch.dtype, param: torch.dtype) -> None:
    """The sum of both parts has twice the digits, and 500 small steps arrive."""
    averages, params = tensors(average, backend.device), tensors(param, backend.device)
    rest = [torch.zeros_like(a) for a in averages]
    exact = [a.double() for a in averages]
    plan = Plan(averages, params, compensations=rest)
    steps, weight = (3, 0.25) if backend.interpreted else (500, 0.003)
    for _ in range(steps):
        update(backend, plan, weight)
        exact = [a + weight * (p.double() - a) for a, p in zip(exact, params, strict=True)]
    eps = torch.finfo(average).eps
    for a, c, right in zip(averages, rest, exact, strict=True):
        if a.numel() == 0:
            continue
        # Each step rounds the sum to the last digit of the compensation.
        assert ((a.double() + c.double() - right).abs() <= steps * eps * eps * 4).all()
        assert (c.abs() <= eps * a.abs() + torch.finfo(average).tiny).all()


@pytest.mark.parametrize("average", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_of_one_copies(backend: Backend, average: torch.dtype) -> None:
    averages, params = tensors(average, backend.device), tensors(torch.bfloat16, backend.device)
    averages[1][:] = INF
    averages[3][:] = NAN
    rest = [torch.zeros_like(a) for a in averages] if average != torch.float32 else []
    update(backend, Plan(averages, params, compensations=rest), 1.0)
    assert all(torch.equal(a, p.to(average)) for a, p in zip(averages, params, strict=True))
    assert all((c == 0).all() for c in rest)


def test_bfloat16_moves_as_float64_says(backend: Backend) -> None:
    """An average kept in bfloat16 alone never moves at these weights."""
    start = torch.ones(40, device=backend.device)
    params = [torch.full((40,), 1.5, dtype=torch.bfloat16, device=backend.device)]
    averages = [start.clone()]
    plan, steps = Plan(averages, params), 30 if backend.interpreted else 3000
    for _ in range(steps):
        update(backend, plan, 0.001)
    right = 1.5 - 0.5 * 0.999**steps
    assert (averages[0] - right).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_swap_of_one_dtype(backend: Backend, dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        pytest.skip("16-bit averages are compensated: they are not exchanged")
    averages, params = tensors(dtype, backend.device), tensors(dtype, backend.device)
    before = [[x.clone() for x in xs] for xs in (averages, params)]
    plan = Plan(averages, params)
    swap(backend, plan)
    assert all(torch.equal(a, p) for a, p in zip(averages, before[1], strict=True))
    assert all(torch.equal(a, p) for a, p in zip(params, before[0], strict=True))
    swap(backend, plan, back=True)
    assert all(torch.equal(a, p) for a, p in zip(averages, before[0], strict=True))


def test_swap_of_halves_loses_nothing(backend: Backend) -> None:
    averages, params = (
        tensors(torch.float32, backend.device),
        tensors(torch.bfloat16, backend.device),
    )
    # Ties, both signs, zeros, the largest, infinity, subnormal numbers.
    bits = [0x3F808000, 0x3F818000, -0x40407000, 0x00000000, -0x80000000, 0x7F7F7FFF, 0x7F800000]
    special = torch.tensor([*bits, 0x00000001, 0x3F80FFFF, 0x3F807FFF], dtype=torch.int32)
    averages.append(special.view(torch.float32).to(backend.device))
    params.append(torch.randn(10).bfloat16().to(backend.device))
    before = [[x.clone() for x in xs] for xs in (averages, params)]
    plan = Plan(averages, params)
    versions = [p._version for p in params]
    swap(backend, plan)
    for average, param in zip(before[0], params, strict=True):
        away = average.cpu().view(torch.int32) + 0x8000  # nearest, ties away from zero
        wanted = (away >> 16).to(torch.int16).view(torch.bfloat16)
        assert torch.equal(param.cpu().view(torch.int16), wanted.view(torch.int16))
    assert all(p._version > v for p, v in zip(params, versions, strict=True))
    swap(backend, plan, back=True)
    for now, was in zip((*averages, *params), (*before[0], *before[1]), strict=True):
        kind = torch.int32 if now.dtype == torch.float32 else torch.int16
        assert torch.equal(now.view(kind), was.view(kind))


def test_layouts(backend: Backend) -> None:
    """Any order of dimensions, and addresses off the boundaries of vectors."""
    average = torch.randn(7, 5, device=backend.device).t()
    param = torch.randn(7, 5, device=backend.device).bfloat16().t()
    flat = torch.randn(103, device=backend.device)[3:]
    averages, params = [average, flat], [param, torch.randn(101, device=backend.device)[1:]]
    oracle = [a + 0.5 * (p.float() - a) for a, p in zip(averages, params, strict=True)]
    update(backend, Plan(averages, params), 0.5)
    for actual, right in zip(averages, oracle, strict=True):
        assert_within_budget(actual, right, right, torch.float32)


def test_many_tensors_of_mixed_dtypes(backend: Backend) -> None:
    sizes = [1 + i % 37 for i in range(300)]
    kinds = [(torch.float32, *HALVES)[i % 3] for i in range(300)]
    averages = [torch.randn(n, device=backend.device) for n in sizes]
    params = [
        torch.randn(n, device=backend.device).to(d) for n, d in zip(sizes, kinds, strict=True)
    ]
    oracle = [a + 0.5 * (p.float() - a) for a, p in zip(averages, params, strict=True)]
    plan = Plan(averages, params)
    assert len(plan.groups()) == 3
    update(backend, plan, 0.5)
    for actual, right in zip(averages, oracle, strict=True):
        assert_within_budget(actual, right, right, torch.float32)


def test_a_tensor_that_moved_is_found_again(backend: Backend) -> None:
    averages = [torch.zeros(9, device=backend.device)]
    param = torch.nn.Parameter(torch.ones(9, device=backend.device))
    plan = Plan(averages, [param])
    update(backend, plan, 0.5)
    param.data = torch.full((9,), 3.0, device=backend.device)
    update(backend, plan, 0.5)
    assert (averages[0] == 1.75).all()
    param.data = torch.ones(8, device=backend.device)
    with pytest.raises(ValueError, match=r"params\[0\] must have the shape and strides"):
        update(backend, plan, 0.5)


def test_float64_runs_by_the_reference() -> None:
    averages, params = [torch.zeros(3, dtype=torch.float64)], [torch.ones(3, dtype=torch.float64)]
    weight_average_(Plan(averages, params), torch.tensor(0.25))
    assert (averages[0] == 0.25).all()
    with pytest.raises(NotImplementedError, match="float16, not float64"):
        weight_average_(Plan(averages, params), torch.tensor(0.25), backend="native")


def test_nothing_to_do(backend: Backend) -> None:
    plan = Plan([], [])
    weight_average_(plan, torch.tensor(0.5), backend=backend.name)
    assert plan.groups() == []


@pytest.mark.parametrize(
    ("table", "dtypes", "message"),
    [
        (torch.zeros(2, 5), [0, 0, -1], "table must be contiguous int64"),
        (None, [0, 0], "dtypes must be three numbers, got 2"),
        (None, [0, 3, -1], r"dtypes must be in \[0, 3\), got 3"),
        (None, [0, 2, -2], r"dtypes must be in \[-1, 3\), got -2"),
    ],
)
def test_the_operators_check_their_table(
    table: Tensor | None, dtypes: list[int], message: str
) -> None:
    table = torch.zeros(0, 6, dtype=torch.int64) if table is None else table
    with pytest.raises(RuntimeError, match=message):
        weight_average_update("native", table, torch.tensor(0.5), dtypes, 1)
    with pytest.raises(RuntimeError, match=message):
        weight_average_swap("native", table, dtypes, 1, False)


A, P = torch.zeros(4, 3), torch.zeros(4, 3)
REFUSALS: list[tuple[tuple[list[Tensor], list[Tensor]], dict[str, Any], str]] = [
    (([A], []), {}, "params must be as many as averages, 1, got 0"),
    (([A], [P]), {"copies": [P, P]}, "copies must be as many as averages, 1, got 2"),
    (([A], [P.t()]), {}, r"params\[0\] must have the shape and strides of its average \[4, 3\]"),
    (([A], [torch.zeros(3, 4).t()]), {}, r"got \[4, 3\] \[1, 4\]"),
    (([A], [P.long()]), {}, r"params\[0\] must be float32, bfloat16 or float16, got torch.int64"),
    (([A], [P.to("meta")]), {}, r"params\[0\] must be on cpu, got meta"),
    (([torch.zeros(4, 6)[:, ::2]], [P]), {}, r"averages\[0\] must be dense, got strides \[6, 2\]"),
    (([A.bfloat16()], [P]), {}, r"averages\[0\] of torch.bfloat16 without them"),
    (([A], [P]), {"compensations": [A]}, r"averages\[0\] of torch.float32 with them"),
    (([A.half()], [P]), {"compensations": [A]}, r"compensations\[0\] must be torch.float16 as"),
    (([A.half()], [P]), {"compensations": [A.half()], "copies": [P]}, "together with compensat"),
]


@pytest.mark.parametrize(("lists", "options", "message"), REFUSALS)
def test_refusals(
    lists: tuple[list[Tensor], list[Tensor]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(*lists, **options)


def test_refusals_of_the_call() -> None:
    plan = Plan([A], [P])
    with pytest.raises(ValueError, match="weight must be one float32, got torch.float64"):
        weight_average_(plan, torch.tensor(0.5, dtype=torch.float64))
    with pytest.raises(ValueError, match="weight must be on cpu, got meta"):
        weight_average_(plan, torch.tensor(0.5, device="meta"))
    with pytest.raises(ValueError, match="averages must not be compensated to be exchanged"):
        weight_average_swap_(Plan([A.half()], [P], compensations=[A.half()]))
    with pytest.raises(ValueError, match=r"params\[0\] must have the dtype of its average, or be"):
        weight_average_swap_(Plan([A], [P.half()]))
