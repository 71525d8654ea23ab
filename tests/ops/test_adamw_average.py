"""``adamw_average`` against its reference, over every backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from emulation import backend as emulation
from helpers.backends import Backend
from helpers.budget import assert_within_budget
from torch import Tensor

from kdkernels.ops._shared.multi_tensor import CHUNK, HALVES
from kdkernels.ops.adamw_average import Plan, adamw_average_, unsupported
from kdkernels.ops.adamw_average.op import adamw_average_grads, adamw_average_update

INF, NAN = float("inf"), float("nan")
# Scalars, no elements, odd sizes, more than a chunk.
SHAPES = [(), (5,), (0, 3), (70, 33), (CHUNK + 13,), (2, 3, 4)]
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


@dataclass
class Lists:
    """What a plan is made of."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    averages: list[Tensor]
    masters: list[Tensor]
    grads: list[Tensor]

    def plan(self) -> Plan:
        return Plan(
            self.params,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            averages=self.averages,
            masters=self.masters,
        )

    def all(self) -> Iterator[tuple[str, int, Tensor]]:
        for field in fields(self):
            for i, x in enumerate(getattr(self, field.name)):
                yield field.name, i, x

    def like(self, dtype: torch.dtype | None = None) -> Lists:
        """A copy; in another dtype but for the steps."""
        copies = {}
        for field in fields(self):
            to = None if field.name == "steps" else dtype
            xs = getattr(self, field.name)
            copies[field.name] = [x.detach().to(to or x.dtype, copy=True) for x in xs]
        return Lists(**copies)


def lists(
    device: str,
    param: torch.dtype = torch.float32,
    grad: torch.dtype | None = None,
    *,
    average: bool = True,
    master: bool = False,
    shapes: Sequence[Any] = SHAPES,
    step: int = 3,
) -> Lists:
    def some(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape).to(device, dtype) for shape in shapes]

    masters = some() if master else []
    params = [x.to(param) for x in masters] if master else some(param)
    return Lists(
        params=params,
        exp_avgs=some(),
        exp_avg_sqs=[x.square() for x in some()],
        steps=[torch.tensor(float(step + i), device=device) for i in range(len(shapes))],
        averages=some() if average else [],
        masters=masters,
        grads=some(grad or param),
    )


@contextmanager
def reach(backend: Backend, given: Lists) -> Iterator[None]:
    """The emulation must be told what is reached by addresses."""
    if backend.name != "emulated":
        yield
        return
    written = [x for name, _, x in given.all() if name not in ("grads", "steps")]
    with emulation.reachable([*given.grads, *given.steps], written):
        yield


def scalar(backend: Backend, value: float | None) -> Tensor | None:
    return None if value is None else torch.tensor(value, device=backend.device)


def step(
    backend: Backend,
    given: Lists,
    *,
    plan: Plan | None = None,
    lr: float = 0.01,
    factor: float = 1.0,
    weight: float | None = 0.3,
    found_inf: float | None = None,
    name: str | None = None,
    **options: Any,
) -> None:
    with reach(backend, given):
        adamw_average_(
            plan or given.plan(),
            given.grads,
            lr=scalar(backend, lr),
            factor=scalar(backend, factor),
            weight=scalar(backend, weight),
            found_inf=scalar(backend, found_inf),
            backend=name or backend.name,
            **{**OPTIONS, **options},
        )


def check(backend: Backend, given: Lists, **options: Any) -> None:
    """A step against the reference, in float64 and in the same dtypes."""
    oracle, same, kept = given.like(torch.float64), given.like(), given.like()
    if given.masters:  # float64 params need none
        oracle.params, oracle.masters = oracle.masters, []
    step(backend, oracle, name="reference", **options)
    step(backend, same, name="reference", **options)
    step(backend, given, **options)
    for (name, i, actual), (_, _, alike) in zip(given.all(), same.all(), strict=True):
        if name in ("grads", "steps"):
            right = (kept.grads if name == "grads" else same.steps)[i]
            assert torch.equal(actual, right)
            continue
        if name == "averages":
            # Of what the param or master is now, to the bit.
            now, old = (given.masters or given.params)[i], kept.averages[i]
            weight = options.get("weight", 0.3) or 0.0
            right = old.double() + weight * (now.double() - old.double())
            alike = old + weight * (now.float() - old)
        else:
            right = (oracle.params if name == "masters" else getattr(oracle, name))[i]
        assert_within_budget(actual, right, alike, actual.dtype)


DTYPES = [
    (torch.float32, torch.float32, False),
    *((half, grad, master) for half in HALVES for grad in (half, torch.float32)
      for master in (False, True)),
]  # fmt: skip


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("param", "grad", "master"), DTYPES, ids=str)
def test_matches_reference(
    backend: Backend, param: torch.dtype, grad: torch.dtype, master: bool, average: bool
) -> None:
    given = lists(backend.device, param, grad, average=average, master=master)
    check(backend, given, weight=0.3 if average else None)
    if not (backend.name == "triton" and backend.interpreted):  # whose bfloat16 is truncated
        pairs = zip(given.params, given.masters, strict=False)
        assert all(torch.equal(p, m.to(param)) for p, m in pairs)


@pytest.mark.parametrize(
    "options",
    [
        {"factor": 0.125},
        {"maximize": True},
        {"weight": 0.0},
        {"weight": None},
        {"weight_decay": 0.0, "eps": 0.0},
        {"betas": (0.0, 0.999)},
        {"betas": (0.9, 0.0)},
        {"found_inf": 0.0},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_numbers(backend: Backend, options: dict[str, Any]) -> None:
    check(backend, lists(backend.device, torch.bfloat16, master=True), **options)
    check(backend, lists(backend.device), **options)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99, 0.99999)])
@pytest.mark.parametrize("t", [0, 1, 2, 30, 1000, 10_000_000])
def test_bias_corrections_keep_their_digits(
    backend: Backend, t: int, betas: tuple[float, float]
) -> None:
    """``1 - beta^t`` in float32 would have three digits at the first steps."""
    given = lists(backend.device, shapes=[(9,)], step=t)
    given.params[0].zero_()
    given.exp_avgs[0].fill_(0.5)
    given.exp_avg_sqs[0].fill_(0.25)
    given.grads[0].fill_(0.5)
    step(backend, given, lr=1.0, eps=0.0, weight_decay=0.0, betas=betas)
    right = -((1 - betas[1] ** (t + 1)) ** 0.5) / (1 - betas[0] ** (t + 1))
    error = (given.params[0].double() / right - 1).abs().max()
    assert error < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("master", [False, True])
def test_found_inf_writes_nothing(backend: Backend, master: bool) -> None:
    given = lists(backend.device, torch.bfloat16, master=master)
    given.grads[3][5] = INF
    before = given.like()
    step(backend, given, found_inf=2.0)
    for (name, _, now), (_, _, was) in zip(given.all(), before.all(), strict=True):
        assert torch.equal(now, was), name


@pytest.mark.parametrize("master", [False, True])
def test_a_weight_of_one_copies(backend: Backend, master: bool) -> None:
    given = lists(backend.device, torch.bfloat16, master=master)
    given.averages[1].fill_(INF)
    given.averages[3].fill_(NAN)
    step(backend, given, weight=1.0)
    sources = given.masters or given.params
    assert all(torch.equal(a, x.float()) for a, x in zip(given.averages, sources, strict=True))


def test_an_average_that_is_left_alone(backend: Backend) -> None:
    given = lists(backend.device)
    before = given.like()
    step(backend, given, weight=None)
    assert all(torch.equal(a, b) for a, b in zip(given.averages, before.averages, strict=True))
    assert not torch.equal(given.params[0], before.params[0])


def test_layouts(backend: Backend) -> None:
    """Any order of dimensions, and addresses off the boundaries of vectors."""
    given = lists(backend.device, torch.bfloat16, shapes=[(5, 7), (100,)])
    for field in fields(given):
        if field.name == "steps" or not (xs := getattr(given, field.name)):
            continue
        xs[0] = xs[0].t().contiguous().t()
        shifted = xs[1].new_zeros(103)[3:]
        xs[1] = shifted.copy_(xs[1])
    check(backend, given)


def test_many_tensors_of_mixed_dtypes_and_ages(backend: Backend) -> None:
    given = lists(backend.device, shapes=[(1 + i % 37,) for i in range(300)])
    kinds = (torch.float32, *HALVES)
    given.params = [p.to(kinds[i % 3]) for i, p in enumerate(given.params)]
    given.grads = [g.to(p.dtype) for g, p in zip(given.grads, given.params, strict=True)]
    assert len(given.plan().groups(given.grads)) == 3
    check(backend, given)


def test_gradients_that_moved_are_found(backend: Backend) -> None:
    """More of them than go into a launch."""
    given = lists(backend.device, shapes=[(1 + i % 7,) for i in range(600)])
    plan, other = given.plan(), given.like()
    step(backend, given, plan=plan)
    step(backend, other, name="reference")
    table = plan.groups(given.grads)[0].table
    for new in (True, False):
        if new:
            given.grads = [torch.randn_like(g) for g in given.grads]
            other.grads = [g.clone() for g in given.grads]
        step(backend, given, plan=plan)
        step(backend, other, name="reference")
        assert plan.groups(given.grads)[0].table is table
    for actual, right in zip(given.params, other.params, strict=True):
        assert_within_budget(actual, right, right, torch.float32, unit=1.0)


def test_what_else_moved_makes_a_new_table(backend: Backend) -> None:
    given = lists(backend.device, torch.bfloat16, shapes=[(9,)])
    plan = given.plan()
    step(backend, given, plan=plan)
    table = plan.groups(given.grads)[0].table
    given.grads = [g.float() for g in given.grads]
    assert plan.groups(given.grads)[0].table is not table
    step(backend, given, plan=plan)
    plan.params[0] = given.params[0] = torch.randn(8, device=backend.device).bfloat16()
    with pytest.raises(ValueError, match=r"grads\[0\] must have the shape and strides of its para"):
        step(backend, given, plan=plan)
    given.grads = [torch.randn(8, device=backend.device)]
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] must have the shape and strides of its"):
        step(backend, given, plan=plan)


def test_saved_tensors_notice_the_step(backend: Backend) -> None:
    given = lists(backend.device)
    versions = [p._version for p in given.params]
    step(backend, given)
    assert all(p._version > v for p, v in zip(given.params, versions, strict=True))


def test_equals_torch_and_weight_average() -> None:
    """20 steps of torch's fused kernel and a mean, in float64."""
    start = torch.randn(50, dtype=torch.float64)
    param = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([param], lr=0.01, weight_decay=0.1)
    given = lists("cpu", torch.float64, shapes=[(50,)])
    given = given.like(torch.float64)
    given.params = [start.clone()]
    for x in (given.exp_avgs[0], given.exp_avg_sqs[0], given.steps[0]):
        x.zero_()
    plan, models = given.plan(), []
    for n in range(20):
        given.grads = [torch.randn(50, dtype=torch.float64)]
        param.grad = given.grads[0].clone()
        optimizer.step()
        models.append(param.detach().clone())
        adamw_average_(
            plan,
            given.grads,
            lr=torch.tensor(0.01),
            factor=torch.tensor(1.0),
            weight=torch.tensor(1 / (n + 1)),
            weight_decay=0.1,
        )
    # lr and the weight are float32.
    torch.testing.assert_close(given.params[0], param.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(given.averages[0], torch.stack(models).mean(0), rtol=1e-6, atol=1e-7)


def test_float64_runs_by_the_reference() -> None:
    given = lists("cpu", torch.float64).like(torch.float64)
    numbers = {"lr": torch.tensor(0.1), "factor": torch.tensor(1.0)}
    adamw_average_(given.plan(), given.grads, **numbers)
    with pytest.raises(NotImplementedError, match="float16, not float64"):
        adamw_average_(given.plan(), given.grads, **numbers, backend="native")
    assert unsupported("reference", given.params[0]) is None


def test_nothing_to_do(backend: Backend) -> None:
    given = lists(backend.device, shapes=[])
    step(backend, given)
    assert given.plan().groups([]) == []


ONE = torch.tensor(1.0)
BETAS = [0.9, 0.999, 1e-8, 0.01, 0.0]


@pytest.mark.parametrize("backend_name", ["native", "emulated"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(2, 6)}, r"table must be contiguous int64 \[tensors, 9\]"),
        ({"dtypes": [0, 0, 0]}, "dtypes must be four numbers, got 3"),
        ({"dtypes": [3, 0, 0, -1]}, r"dtypes must be in \[0, 3\), got 3"),
        ({"dtypes": [1, 2, 0, -1]}, "dtypes must have a gradient of float32 or of its param's"),
        ({"dtypes": [0, 0, 0, 0]}, "dtypes must have masters of 16-bit params only"),
        ({"constants": [0.9]}, "constants must be five numbers, got 1"),
        ({"lr": torch.ones(2)}, "lr must be one float32, got 2"),
        ({"weight": torch.ones((), dtype=torch.float64)}, "weight must be one float32, got 1"),
        ({"factor": torch.ones((), dtype=torch.int32)}, "factor must be one float32"),
        ({"found_inf": torch.ones(3)}, "found_inf must be one float32, got 3"),
    ],
)
def test_the_operators_check_their_arguments(
    backend_name: str, change: dict[str, Any], message: str
) -> None:
    if backend_name not in adamw_average_update.backends:
        pytest.skip("the emulation could not be built")
    arguments = {
        "table": torch.zeros(0, 9, dtype=torch.int64),
        "weight": ONE,
        "lr": ONE,
        "factor": ONE,
        "found_inf": None,
        "constants": BETAS,
        "dtypes": [0, 0, 0, -1],
        "chunks": 1,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        adamw_average_update(backend_name, *arguments.values())


def test_the_gradients_operator_checks_its_arguments() -> None:
    table = torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="addresses must be as many as the rows of the table, 2"):
        adamw_average_grads("native", table, [1])
    with pytest.raises(RuntimeError, match="table must be contiguous int64"):
        adamw_average_grads("native", table[:, :8], [1, 2])
    for name in adamw_average_grads.backends:
        adamw_average_grads(name, table, [7, 9])
        assert table[:, 1].tolist() == [7, 9] and table.sum() == 16


A = torch.zeros(4, 3)
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"exp_avgs": []}, "exp_avgs must be as many as params, 1, got 0"),
    ({"averages": [A, A]}, "averages must be as many as params, 1, got 2"),
    ({"exp_avg_sqs": [A.t()]}, r"exp_avg_sqs\[0\] must have the shape and strides of its param"),
    ({"exp_avgs": [A.bfloat16()]}, r"exp_avgs\[0\] must be float32 with a param of float32, got b"),
    ({"averages": [A.double()]}, r"averages\[0\] must be float32 with a param of float32, got flo"),
    ({"masters": [A]}, r"masters must be of 16-bit params, got params\[0\] of float32"),
    ({"params": [A.long()]}, r"params\[0\] must be float32, bfloat16, float16 or float64, got int"),
    ({"params": [torch.zeros(4, 6)[:, ::2]]}, r"params\[0\] must be dense, got strides \[6, 2\]"),
    ({"exp_avgs": [A.to("meta")]}, r"exp_avgs\[0\] must be on cpu, got meta"),
    ({"steps": [torch.zeros(2)]}, r"steps\[0\] must be one float32, got float32 of shape \[2\]"),
    ({"steps": [torch.zeros((), dtype=torch.int64)]}, r"steps\[0\] must be one float32, got int64"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refusals(change: dict[str, Any], message: str) -> None:
    given = {"params": [A], "exp_avgs": [A], "exp_avg_sqs": [A], "steps": [ONE], **change}
    with pytest.raises(ValueError, match=message):
        Plan(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "grads must be as many as params, 1, got 0"),
        ({"grads": [A.half()]}, r"grads\[0\] must be float32 as its param, or float32, got float1"),
        ({"grads": [A.t()]}, r"grads\[0\] must have the shape and strides of its param \[4, 3\]"),
        ({"grads": [A.to("meta")]}, r"grads\[0\] must be on cpu, got meta"),
        ({"lr": ONE.double()}, "lr must be one float32, got torch.float64"),
        ({"factor": torch.ones(2)}, r"factor must be one float32, got torch.float32 of shape \[2"),
        ({"found_inf": ONE.to("meta")}, "found_inf must be on cpu, got meta"),
        ({"weight": ONE}, "weight must be None for a plan without averages, got a tensor"),
    ],
)
def test_refusals_of_the_call(change: dict[str, Any], message: str) -> None:
    plan = Plan([A.clone()], [A.clone()], [A.clone()], [ONE.clone()])
    with pytest.raises(ValueError, match=message):
        adamw_average_(plan, **{"grads": [A], "lr": ONE, "factor": ONE, **change})
    assert plan.steps[0] == 1  # refused before anything was written
