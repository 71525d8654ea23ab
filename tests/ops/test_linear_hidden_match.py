"""``linear_hidden_match`` against its reference, over every backend."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.backends import Backend
from helpers.budget import assert_same_direction, assert_within_budget
from torch import Tensor

from kdkernels.ops.hidden_match import Kind, Spec
from kdkernels.ops.linear_hidden_match import linear_hidden_match, linear_hidden_match_rows
from kdkernels.ops.linear_hidden_match.op import (
    linear_hidden_match_forward,
    linear_hidden_match_grad,
)

NAN = float("nan")
ROWS, WIDTH, COLUMNS = 7, 24, 40


def tensors(dtype: torch.dtype, bias: bool = True) -> list[Tensor | None]:
    """Student, weight, bias, teacher."""
    weight = torch.randn(COLUMNS, WIDTH) / WIDTH**0.5
    found = [torch.randn(ROWS, WIDTH), weight, torch.randn(COLUMNS), torch.randn(ROWS, COLUMNS)]
    if not bias:
        found[2] = None  # type: ignore[call-overload]
    return [None if x is None else x.to(dtype) for x in found]


def check(
    backend: Backend,
    inputs: list[Tensor | None],
    spec: Spec,
    *,
    upstream: Tensor | float = 1.0,
    chunk_rows: int | None = 3,
    **others: Any,
) -> list[Tensor]:
    """Loss and gradients of student, weight and bias."""

    def run(name: str, device: str, dtype: torch.dtype | None) -> list[Tensor]:
        def move(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.to(device)
            return x.to(dtype) if dtype is not None and x.is_floating_point() else x

        student, weight, bias, teacher = (move(x) for x in inputs)
        leaves = [
            x.detach().clone().requires_grad_() for x in (student, weight, bias) if x is not None
        ]
        head = (leaves[1], leaves[2] if bias is not None else None)
        given = {"mask": None, "row_weights": None, "denominator": None, **others}
        call = [teacher, *(move(x) for x in given.values())]
        options: Any = {"head": head, "chunk_rows": chunk_rows, "backend": name}
        if isinstance(upstream, Tensor):
            loss = linear_hidden_match_rows(leaves[0], *call[:-1], spec, **options)
        else:
            loss, _ = linear_hidden_match(leaves[0], *call, spec, **options)
        back = torch.as_tensor(upstream).to(loss.device, loss.dtype).expand(loss.shape)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, back)]

    results = (
        run(backend.name, backend.device, None),
        run("reference", "cpu", torch.float64),
        run("reference", "cpu", None),
    )
    for actual, oracle, same in zip(*results, strict=True):
        assert actual.dtype == same.dtype
        assert_within_budget(actual, oracle, same, same.dtype)
    for grad, oracle in zip(results[0][1:], results[1][1:], strict=True):
        assert_same_direction(grad, oracle, grad.dtype)
    return results[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", list(Kind), ids=lambda k: k.name)
def test_matches_reference(backend: Backend, kind: Kind, dtype: torch.dtype) -> None:
    mask = torch.arange(ROWS) != 4
    upstream = 1024.0 if dtype == torch.float16 else 1.0
    for bias in (True, False):
        check(
            backend, tensors(dtype, bias), Spec(kind, 0.5, mean=True), mask=mask, upstream=upstream
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(backend: Backend, dtype: torch.dtype) -> None:
    mask, weights = torch.arange(ROWS) != 2, torch.rand(ROWS)
    for spec, chunk in itertools.product((Spec(mean=True), Spec(Kind.COSINE)), (1, 5, 100, None)):
        check(
            backend,
            tensors(dtype),
            spec,
            mask=mask,
            row_weights=weights,
            denominator=torch.tensor(5.0),
            upstream=-2.0,
            chunk_rows=chunk,
        )
        check(
            backend,
            tensors(dtype),
            spec,
            mask=mask,
            row_weights=weights,
            upstream=torch.randn(ROWS),
            chunk_rows=chunk,
        )


def test_rows_that_do_not_count_are_never_read(backend: Backend) -> None:
    student, weight, bias, teacher = tensors(torch.float32)
    assert student is not None and teacher is not None
    student[3], teacher[5] = NAN, NAN
    mask = torch.tensor([True, True, True, False, True, False, True])
    found = check(backend, [student, weight, bias, teacher], Spec(mean=True), mask=mask)
    assert (found[1][[3, 5]] == 0).all()
    none = torch.zeros(ROWS, dtype=torch.bool)
    for upstream in (1.0, torch.ones(ROWS)):
        for grad in torch_grads(backend, student, weight, bias, teacher, none, upstream):
            assert (grad == 0).all()


def torch_grads(backend: Backend, *call: Any) -> list[Tensor]:
    student, weight, bias, teacher, mask, upstream = call
    inputs = [x.to(backend.device) for x in (student, weight, bias)]
    leaves = [x.requires_grad_() for x in inputs]
    options: Any = {"head": (leaves[1], leaves[2]), "backend": backend.name}
    others = teacher.to(backend.device), mask.to(backend.device), None
    spec = Spec(Kind.PKD, mean=True)
    if isinstance(upstream, Tensor):
        loss = linear_hidden_match_rows(leaves[0], *others, spec, **options).sum()
    else:
        loss, _ = linear_hidden_match(leaves[0], *others, None, spec, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_teacher_of_another_dtype_and_no_rows(backend: Backend) -> None:
    student, weight, bias, teacher = tensors(torch.bfloat16)
    assert teacher is not None and student is not None
    check(backend, [student, weight, bias, teacher.float()], Spec(mean=True))
    loss, parts = linear_hidden_match(
        student[:0].to(backend.device),
        teacher[:0].to(backend.device),
        None,
        None,
        None,
        Spec(mean=True),
        head=(weight.to(backend.device), None),  # type: ignore[union-attr]
        backend=backend.name,
    )
    assert loss == 0 and (parts == 0).all()


def test_autocast_casts_the_projection() -> None:
    student, weight, bias, teacher = tensors(torch.float32)
    head = (weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = linear_hidden_match(
            student, teacher, None, None, None, Spec(mean=True), head=head
        )
    cast = (weight.bfloat16(), bias.bfloat16())  # type: ignore[union-attr]
    plain, _ = linear_hidden_match(
        student.bfloat16(), teacher, None, None, None, Spec(mean=True), head=cast
    )
    assert torch.equal(found, plain)


def test_opcheck(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is no operator")
    inputs = [x.to(backend.device) for x in tensors(torch.float32)]  # type: ignore[union-attr]
    call = (*inputs, None, None, None, [2.0, 1.0, 1.0], 3)
    torch.library.opcheck(linear_hidden_match_forward.overload(backend.name), call)
    for wanted in ([True, True, True], [True, False, False]):
        torch.library.opcheck(linear_hidden_match_grad.overload(backend.name), (*call, wanted))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend: Backend, dynamic: bool) -> None:
    torch._dynamo.reset()
    _, weight, bias, _ = tensors(torch.float32)
    leaves = [x.to(backend.device).requires_grad_() for x in (weight, bias)]  # type: ignore[union-attr]

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        return linear_hidden_match(
            2 * student, teacher, None, None, None, Spec(Kind.COSINE, mean=True),
            head=(leaves[0], leaves[1]), backend=backend.name,
        )[0]  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, WIDTH, device=backend.device, requires_grad=True)
        teacher = torch.randn(rows, COLUMNS, device=backend.device)
        found, plain = compiled(x, teacher), call(x, teacher)
        wanted = [x, *leaves]
        for a, b in zip(
            torch.autograd.grad(found, wanted), torch.autograd.grad(plain, wanted), strict=True
        ):
            assert_within_budget(a, b, b, torch.float32)


S, T, W = torch.zeros(3, 8), torch.zeros(3, 6), torch.zeros(6, 8)
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": S[0]}, ValueError, r"student must be \[rows, width\], got shape \[8\]"),
    ({"teacher": T[:2]}, ValueError, r"teacher must be \[3, 6\], got \[2, 6\]"),
    ({"teacher": T.clone().requires_grad_()}, ValueError, "teacher must not require grad"),
    ({"teacher": T.to("meta")}, ValueError, "teacher must be on cpu, got meta"),
    ({"head": (W[:, :5], None)}, ValueError, r"projection_weight must be \[vocab, 8\]"),
    ({"head": (W, torch.zeros(5))}, ValueError, r"projection_bias must be \[6\], got \[5\]"),
    ({"head": (W.bfloat16(), None)}, TypeError, "projection_weight must have the dtype of"),
    ({"mask": torch.ones(3)}, TypeError, "mask must be bool, got float32"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {
        "student": S, "teacher": T, "mask": None, "row_weights": None, "denominator": None,
        "spec": Spec(), "head": (W, None), **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        linear_hidden_match(**call)
