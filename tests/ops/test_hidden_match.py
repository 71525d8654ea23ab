"""``hidden_match`` against its reference, over every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from emulation import backend as emulation
from helpers.backends import Backend
from helpers.budget import assert_same_direction, assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdkernels.ops.hidden_match import Kind, Spec, hidden_match, hidden_match_rows, unsupported
from kdkernels.ops.hidden_match.op import hidden_match_forward, hidden_match_grad

INF, NAN = float("inf"), float("nan")
KINDS = list(Kind)
HALVES = (torch.bfloat16, torch.float16)


def layers(
    rows: int, *widths: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """States of students and teachers that are alike, as after some training."""
    teachers = [torch.randn(rows, width) for width in widths]
    students = [t + 0.5 * torch.randn_like(t) for t in teachers]
    return [s.to(dtype) for s in students], [t.to(dtype) for t in teachers]


class Result:
    """Of one call: the loss, its parts, the gradients."""

    def __init__(
        self,
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        spec: Spec,
        mask: Tensor | None,
        row_weights: Tensor | None,
        denominator: Tensor | None,
        weights: Sequence[float],
        backend: str,
        upstream: Tensor | float | None,
    ) -> None:
        leaves = [s.detach().requires_grad_() for s in students]
        if isinstance(upstream, Tensor):
            self.loss = hidden_match_rows(
                leaves, teachers, mask, row_weights, weights, spec, backend=backend
            )
            self.parts = self.loss.detach()
        else:
            self.loss, self.parts = hidden_match(
                leaves, teachers, mask, row_weights, denominator, weights, spec, backend=backend
            )
            upstream = torch.tensor(upstream or 1.0, dtype=self.loss.dtype)
        upstream = upstream.to(self.loss.device, self.loss.dtype)
        self.grads = torch.autograd.grad(self.loss, leaves, upstream)
        self.loss = self.loss.detach()

    @staticmethod
    def unit_vectors(
        student: Tensor,
        spec: Spec,
        mask: Tensor | None,
        row_weights: Tensor | None,
        denominator: Tensor | None,
        upstream: Tensor | float | None,
    ) -> float:
        """The largest component of the unit vectors that make up the gradient."""
        s = student.double()
        keep = torch.ones(len(s), dtype=torch.bool) if mask is None else mask
        factor = torch.ones(len(s)) if row_weights is None else row_weights.abs()
        factor = factor * (1.0 if upstream is None else torch.as_tensor(upstream).abs())
        if denominator is not None:
            factor = factor / denominator
        elif spec.mean and not isinstance(upstream, Tensor):
            factor = factor / keep.sum().clamp(min=1)
        if spec.kind == Kind.PKD:
            factor = factor * 2 / s.shape[1]
        norms = s.norm(dim=1)
        sizes = (factor / norms)[:, None] * (s / norms[:, None]).abs()
        sizes = sizes[keep & (norms > 0)]
        return sizes.max().item() if sizes.numel() else 0.0


def check(
    backend: Backend,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    spec: Spec,
    *,
    mask: Tensor | None = None,
    row_weights: Tensor | None = None,
    denominator: Tensor | None = None,
    weights: Sequence[float] | None = None,
    upstream: Tensor | float | None = None,
) -> Result:
    """Loss, parts and gradients within the budget of the reference in the same dtype."""
    weights = weights or [1.0] * len(students)

    def run(name: str, device: str, dtype: torch.dtype | None) -> Result:
        def move(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x.to(device) if x.stride() != () else x
            return x.to(dtype) if dtype is not None and x.is_floating_point() else x

        s, t = ([move(x) for x in xs] for xs in (students, teachers))
        others = (move(x) for x in (mask, row_weights, denominator))
        moved = move(upstream) if isinstance(upstream, Tensor) else upstream
        return Result(s, t, spec, *others, weights, name, moved)

    if upstream is None and students[0].dtype == torch.float16:
        upstream = 1024.0  # a GradScaler's: without it small gradients are no normal numbers
    actual = run(backend.name, backend.device, None)
    oracle, same = run("reference", "cpu", torch.float64), run("reference", "cpu", None)
    wide = students[0].dtype == torch.float64
    assert actual.loss.dtype == (torch.float64 if wide else torch.float32)
    # Unit vectors are so to eps, and the distance of two equal ones is the square of that.
    unit = 4 * torch.finfo(torch.float32).eps if spec.kind >= Kind.COSINE else 0.0
    assert_within_budget(actual.loss, oracle.loss, same.loss, actual.loss.dtype, unit=unit)
    assert_within_budget(actual.parts, oracle.parts, same.parts, actual.parts.dtype, unit=unit)
    for i, grads in enumerate(zip(students, actual.grads, oracle.grads, same.grads, strict=True)):
        student, grad, right, alike = grads
        assert grad.dtype == student.dtype and grad.shape == student.shape
        unit = 0.0
        if spec.kind >= Kind.COSINE:
            # The gradient is a difference of such vectors, which may cancel.
            ends = Result.unit_vectors(student, spec, mask, row_weights, denominator, upstream)
            unit = abs(weights[i]) * ends
        assert_within_budget(grad, right, alike, student.dtype, unit=unit)
        if right.numel() and right.abs().max() > unit / 4:
            assert_same_direction(grad, right, student.dtype)
    return actual


WIDTHS = [(3,), (7,), (16, 33), (64, 100, 8), (768,), (312, 2051)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_matches_reference(
    backend: Backend, kind: Kind, widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    if dtype == torch.float64 and backend.name != "reference":
        pytest.skip("the kernels take float32, bfloat16 and float16, not float64")
    students, teachers = layers(5, *widths, dtype=dtype)
    mask = torch.tensor([True, True, False, True, True])
    check(backend, students, teachers, Spec(kind, mean=True), mask=mask)
    check(backend, students, teachers, Spec(kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_weights_denominator_and_upstream(backend: Backend, kind: Kind, beta: float) -> None:
    if kind != Kind.SMOOTH_L1 and beta != 2.0:
        pytest.skip("beta is a number of smooth_l1")
    students, teachers = layers(6, 40, 24)
    check(
        backend,
        students,
        teachers,
        Spec(kind, beta, mean=True),
        mask=torch.arange(6) != 1,
        row_weights=torch.tensor([0.5, NAN, 2.0, 0.0, -1.0, 3.0]),
        denominator=torch.tensor(7.0),
        weights=[0.25, -2.0],
        upstream=3.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_rows_and_their_upstream(backend: Backend, kind: Kind, dtype: torch.dtype) -> None:
    students, teachers = layers(7, 30, 65, dtype=dtype)
    upstream = torch.randn(7)
    found = check(
        backend,
        students,
        teachers,
        Spec(kind, 0.5, mean=True),
        mask=torch.arange(7) != 3,
        row_weights=torch.rand(7),
        weights=[1.0, 0.5],
        upstream=upstream,
    )
    assert found.loss[3] == 0 and found.loss[2] != 0


def test_a_weight_changes_its_own_row_only(backend: Backend) -> None:
    students, teachers = layers(5, 20)
    one, other = torch.ones(5), torch.ones(5)
    other[2] = 4.0
    grads = [
        check(backend, students, teachers, Spec(mean=True), row_weights=w).grads[0].cpu()
        for w in (one, other)
    ]
    same = torch.arange(5) != 2
    assert torch.equal(grads[0][same], grads[1][same])
    assert_within_budget(grads[1][2], 4 * grads[0][2], 4 * grads[0][2], torch.float32)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_rows_that_do_not_count_are_never_read(backend: Backend, kind: Kind) -> None:
    students, teachers = layers(4, 20, 9)
    for x in (*students, *teachers):
        x[1], x[3] = NAN, INF
    mask = torch.tensor([True, False, True, False])
    found = check(backend, students, teachers, Spec(kind, mean=True), mask=mask)
    assert all((grad[[1, 3]] == 0).all() for grad in found.grads)
    assert found.parts[-1] == 2
    # Where one counts, nobody may hide it.
    loss, _ = hidden_match(
        [x.to(backend.device) for x in students],
        [x.to(backend.device) for x in teachers],
        None,
        None,
        None,
        [1.0, 1.0],
        Spec(kind, mean=True),
        backend=backend.name,
    )
    assert loss.isnan() or loss.isinf()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("rows", [0, 4])
def test_without_a_row_that_counts(backend: Backend, kind: Kind, rows: int) -> None:
    students, teachers = layers(rows, 12, 5)
    mask = torch.zeros(rows, dtype=torch.bool)
    for denominator in (None, torch.tensor(0.0)):
        found = check(
            backend,
            students,
            teachers,
            Spec(kind, mean=True),
            mask=mask,
            denominator=denominator,
        )
        assert found.loss == 0 and (found.parts == 0).all()
        assert all((grad == 0).all() for grad in found.grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Kind.COSINE, Kind.PKD], ids=lambda k: k.name)
def test_a_row_without_direction_matches_any(
    backend: Backend, kind: Kind, dtype: torch.dtype
) -> None:
    students, teachers = layers(5, 20, dtype=dtype)
    students[0][1] = 0
    teachers[0][2] = 0
    students[0][3] = teachers[0][3] = 0
    found = check(backend, students, teachers, Spec(kind, mean=True))
    assert (found.grads[0][1:4] == 0).all() and found.parts[-1] == 5
    rows = check(backend, students, teachers, Spec(kind), upstream=torch.ones(5)).loss
    assert (rows[1:4] == 0).all() and (rows[[0, 4]] > 0).all()


def test_a_small_distance_keeps_its_digits(backend: Backend) -> None:
    """1e-9: 1 minus a cosine would be 0 in float32."""
    teachers = [torch.randn(4, 300)]
    students = [teachers[0] * (1 + 3e-5 * torch.randn(4, 300))]
    call = [x.to(backend.device) for x in students], [x.to(backend.device) for x in teachers]
    others = (None, None, None, [1.0], Spec(Kind.COSINE, mean=True))
    loss, _ = hidden_match(*call, *others, backend=backend.name)
    oracle, _ = hidden_match(*([x[0].double().cpu()] for x in call), *others, backend="reference")
    assert 0 < oracle < 1e-8
    assert abs(loss.cpu() - oracle) < 1e-3 * oracle


@pytest.mark.parametrize("kind", [Kind.COSINE, Kind.PKD], ids=lambda k: k.name)
def test_one_column_is_a_sign(backend: Backend, kind: Kind) -> None:
    """The distance is 0 or that of opposite vectors; the gradient cancels to nothing."""
    s = torch.tensor([[2.0], [-0.3], [5.0]], device=backend.device, requires_grad=True)
    t = torch.tensor([[7.0], [0.2], [-1.0]], device=backend.device)
    rows = hidden_match_rows([s], [t], None, None, [1.0], Spec(kind), backend=backend.name)
    far = 2.0 if kind == Kind.COSINE else 4.0
    right = torch.tensor([0.0, far, far])
    assert_within_budget(rows.detach(), right, right, torch.float32)
    grad = torch.autograd.grad(rows.sum(), s)[0]
    assert_within_budget(grad, torch.zeros(3, 1), torch.zeros(3, 1), torch.float32, unit=8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Kind.MSE, Kind.COSINE], ids=lambda k: k.name)
def test_layouts(backend: Backend, kind: Kind, dtype: torch.dtype) -> None:
    wide = [torch.full((6, 83), NAN, dtype=dtype) for _ in range(4)]
    for x in wide:
        x[:, 3:70] = torch.randn(6, 67)
    cut = [x[:, 3:70] for x in wide]  # rows apart, off the 16-byte boundaries
    check(backend, cut[:2], cut[2:], Spec(kind, mean=True))
    check(backend, [x[::2] for x in cut[:2]], [x[1::2] for x in cut[2:]], Spec(kind))
    apart = [torch.randn(40, 6).to(dtype).T for _ in range(2)]  # columns apart
    check(backend, apart[:1], apart[1:], Spec(kind))
    repeated = [torch.randn(1, 40).to(dtype).expand(6, 40) for _ in range(2)]
    check(backend, repeated[:1], repeated[1:], Spec(kind))


@pytest.mark.parametrize("teacher", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("student", [torch.float32, *HALVES], ids=str)
def test_a_teacher_of_another_dtype(
    backend: Backend, student: torch.dtype, teacher: torch.dtype
) -> None:
    s, t = layers(5, 33, 64)
    s, t = [x.to(student) for x in s], [x.to(teacher) for x in t]
    reason = unsupported(backend.name, s[0], t[0], device=backend.device)
    if backend.name == "emulated" and student != teacher:
        reason = "the CUDA kernel takes students and teachers of one dtype"
    if reason:
        pytest.skip(reason)
    for kind in (Kind.MSE, Kind.PKD):
        check(backend, s, t, Spec(kind, mean=True), mask=torch.arange(5) != 2)


def test_many_layers_and_wide_ones(backend: Backend) -> None:
    """More layers than one launch takes, and rows wider than a block holds at once."""
    students, teachers = layers(2, *range(3, 73))
    weights = [0.1 * i for i in range(70)]
    check(backend, students, teachers, Spec(mean=True), weights=weights)
    for kind in (Kind.SMOOTH_L1, Kind.COSINE):
        check(backend, *layers(2, 9000, 5001), Spec(kind, mean=True))


def test_same_bits_again(backend: Backend) -> None:
    students, teachers = layers(9, 768, 100, dtype=torch.bfloat16)
    mask = torch.arange(9) != 4

    def bits() -> list[Tensor]:
        found = check(backend, students, teachers, Spec(Kind.COSINE, mean=True), mask=mask)
        return [found.loss, found.parts, *found.grads]

    first = bits()
    for seed in range(4):
        if backend.name == "emulated":  # any order of threads
            with emulation.device(seed=seed):
                again = bits()
        else:
            again = bits()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 6),
    widths=st.lists(st.integers(3, 70), min_size=1, max_size=4),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    masked=st.integers(0, 63),
    seed=st.integers(0, 2**20),
)
def test_any_shape(
    backend: Backend,
    rows: int,
    widths: list[int],
    kind: Kind,
    dtype: torch.dtype,
    masked: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    students, teachers = layers(rows, *widths, dtype=dtype)
    mask = torch.tensor([masked >> row & 1 == 0 for row in range(rows)])
    check(backend, students, teachers, Spec(kind, 0.4, mean=True), mask=mask)


def test_gradcheck() -> None:
    for kind in KINDS:
        students, teachers = layers(3, 4, 5, dtype=torch.float64)
        leaves = [s.requires_grad_() for s in students]

        def loss(*states: Tensor, kind: Kind = kind, teachers: list[Tensor] = teachers) -> Tensor:
            return hidden_match(
                states, teachers, None, None, None, [1.0, 2.0], Spec(kind, 0.3, True)
            )[0]

        assert torch.autograd.gradcheck(loss, leaves)


def test_create_graph_needs_the_reference(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("it can")
    students, teachers = layers(3, 8)
    leaf = students[0].to(backend.device).requires_grad_()
    for dtype in (torch.float32, torch.float16):
        loss, _ = hidden_match(
            [leaf.to(dtype)],
            [teachers[0].to(backend.device, dtype)],
            None,
            None,
            None,
            [1.0],
            Spec(),
            backend=backend.name,
        )
        with pytest.raises(RuntimeError, match="backend must be 'reference' for create_graph=True"):
            torch.autograd.grad(loss, leaf, create_graph=True)


def test_a_graph_that_is_kept_gives_the_same_again(backend: Backend) -> None:
    students, teachers = layers(3, 8)
    leaf = students[0].to(backend.device).requires_grad_()
    loss, _ = hidden_match(
        [leaf], [teachers[0].to(backend.device)], None, None, None, [1.0], Spec(),
        backend=backend.name,
    )  # fmt: skip
    first = torch.autograd.grad(2 * loss, leaf, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(2 * loss, leaf)[0])


def test_students_that_need_no_gradient(backend: Backend) -> None:
    students, teachers = layers(3, 8, 6)
    s = [x.to(backend.device) for x in students]
    t = [x.to(backend.device) for x in teachers]
    call = (t, None, None, None, [1.0, 1.0], Spec(mean=True))
    plain, _ = hidden_match(s, *call, backend=backend.name)
    assert not plain.requires_grad
    s[1].requires_grad_()
    loss, _ = hidden_match(s, *call, backend=backend.name)
    loss.backward()
    assert torch.equal(loss.detach(), plain) and s[1].grad is not None and s[0].grad is None


# ---- operators, torch.compile --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend: Backend, dtype: torch.dtype) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is no operator")
    students, teachers = layers(3, 30, 7, dtype=dtype)
    s = [x.to(backend.device) for x in students]
    t = [x.to(backend.device) for x in teachers]
    mask = torch.tensor([True, False, True], device=backend.device)
    for call in (
        (s, t, None, None, None, [1.0, 2.0], [0.0, 1.0, 1.0]),
        (s, t, mask, torch.rand(3, device=backend.device), None, [1.0, 2.0], [2.0, 1.0, 1.0]),
    ):
        torch.library.opcheck(hidden_match_forward.overload(backend.name), call)
        torch.library.opcheck(hidden_match_grad.overload(backend.name), call)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_compile(backend: Backend, per_row: bool, dynamic: bool) -> None:
    torch._dynamo.reset()

    def call(s: list[Tensor], t: list[Tensor], mask: Tensor) -> Tensor:
        s = [2 * x for x in s]
        spec = Spec(Kind.COSINE, mean=True)
        if per_row:
            rows = hidden_match_rows(s, t, mask, None, [1.0, 2.0], spec, backend=backend.name)
            return rows.square().sum()
        return hidden_match(s, t, mask, None, None, [1.0, 2.0], spec, backend=backend.name)[0]

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        students, teachers = layers(rows, 30, 12)
        leaves = [x.to(backend.device).requires_grad_() for x in students]
        others = [x.to(backend.device) for x in teachers], torch.arange(rows) != 1
        others = (others[0], others[1].to(backend.device))
        found, plain = compiled(leaves, *others), call(leaves, *others)
        assert_within_budget(found.detach(), plain.detach(), plain.detach(), torch.float32)
        for a, b in zip(
            torch.autograd.grad(found, leaves), torch.autograd.grad(plain, leaves), strict=True
        ):
            assert_within_budget(a, b, b, torch.float32)


def test_transforms_take_the_reference() -> None:
    students, teachers = layers(3, 8)

    def loss(s: Tensor) -> Tensor:
        return hidden_match([s], teachers, None, None, None, [1.0], Spec(mean=True))[0]

    leaf = students[0].requires_grad_()
    plain = torch.autograd.grad(loss(leaf), leaf)[0]
    assert_within_budget(torch.func.grad(loss)(leaf.detach()), plain, plain, torch.float32)


# ---- refusals ------------------------------------------------------------------------------------

S, T = torch.zeros(3, 8), torch.zeros(3, 8)
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"students": []}, ValueError, "students, teachers and weights must have one entry a layer"),
    ({"weights": [1.0, 1.0]}, ValueError, "one entry a layer, got 1, 1 and 2"),
    ({"students": [S[0]]}, ValueError, r"students\[0\] must be \[rows, width\], got shape \[8\]"),
    ({"students": [S.long()]}, TypeError, r"students\[0\] must be float32, .* got int64"),
    ({"teachers": [T[:2]]}, ValueError, r"teachers\[0\] must have the shape of its student"),
    ({"teachers": [T[:, :4]]}, ValueError, r"student \[3, 8\], got \[3, 4\]"),
    ({"teachers": [T.to("meta")]}, ValueError, r"teachers\[0\] must be on cpu, got meta"),
    (
        {"teachers": [T.clone().requires_grad_()]},
        ValueError,
        r"teachers\[0\] must not require grad",
    ),
    (
        {"students": [S, S[:2]], "teachers": [T, T], "weights": [1.0, 1.0]},
        ValueError,
        r"students\[1\] must have the 3 rows of the first layer, got 2",
    ),
    (
        {"students": [S, S.bfloat16()], "teachers": [T, T], "weights": [1.0, 1.0]},
        TypeError,
        r"students\[1\] must have the dtype of the first layer's torch.float32, got",
    ),
    ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask must be \[3\], got shape"),
    ({"mask": torch.ones(3)}, TypeError, "mask must be bool, got float32"),
    ({"row_weights": torch.ones(4)}, ValueError, r"row_weights must be \[3\], got shape \[4\]"),
    ({"row_weights": torch.ones(3, requires_grad=True)}, ValueError, "must not require grad"),
    ({"backend": "fast"}, ValueError, "backend must be one of native, triton, reference"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {
        "students": [S], "teachers": [T], "mask": None, "row_weights": None,
        "denominator": None, "weights": [1.0], "spec": Spec(), **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        hidden_match(**call)


def test_the_kernels_check_for_themselves() -> None:
    call = ([S], [T], None, None, None, [1.0])
    for arguments, message in (
        ((*call, [0.0, 1.0]), "spec must have 3 numbers, got 2"),
        ((*call, [9.0, 1.0, 0.0]), r"kind must be in \[0, 4\), got 9"),
        (([S], [T[:, :4]], *call[2:], [0.0, 1.0, 0.0]), "teachers must have the shape"),
        (([S], [T, T], *call[2:], [0.0, 1.0, 0.0]), "one entry a layer, got 1, 2 and 1"),
        (([S], [T], torch.ones(3), *call[3:], [0.0, 1.0, 0.0]), "mask must have dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            hidden_match_grad("native", *arguments)
