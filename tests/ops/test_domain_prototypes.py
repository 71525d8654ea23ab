"""``domain_prototypes`` against loops over examples and its reference, over every backend."""

from __future__ import annotations

import doctest
import sys
from typing import Any

import pytest
import torch
from emulation import backend as emulation
from helpers.backends import Backend
from helpers.budget import assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdkernels
from kdkernels.ops.domain_prototypes import domain_prototypes as op_domain_prototypes
from kdkernels.ops.domain_prototypes import unsupported
from kdkernels.ops.domain_prototypes.op import domain_prototypes_forward
from kdkernels.ops.domain_prototypes.reference import domain_prototypes_reference

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Result = tuple[Tensor, Tensor, Tensor]


def check(
    backend: Backend, hidden: Tensor, groups: Tensor, n_groups: int, mask: Tensor | None = None
) -> Result:
    """The results, found to be right; tensors are moved as they are, with their strides."""
    found = op_domain_prototypes(
        _moved(hidden, backend),
        groups.to(backend.device),
        None if mask is None else mask.to(backend.device),
        n_groups,
        backend=backend.name,
    )
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    oracle = domain_prototypes_reference(hidden.double(), groups, mask, n_groups)
    same = domain_prototypes_reference(hidden, groups, mask, n_groups)
    assert found[0].shape == (hidden.shape[0], hidden.shape[2])
    assert found[1].shape == (n_groups, hidden.shape[2])
    for actual, right, alike in zip(found[:2], oracle, same, strict=False):
        assert actual.dtype == wide
        assert_within_budget(actual, right, alike, wide, unit=1.0)
    assert torch.equal(found[2].cpu(), oracle[2]) and found[2].dtype == torch.int64
    return found


def _moved(x: Tensor, backend: Backend) -> Tensor:
    if x.device.type == backend.device:
        return x
    size = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1
    flat = x.as_strided((size,), (1,)).to(backend.device)
    return flat.as_strided(x.shape, x.stride())


# Batch, positions, columns, groups.
SHAPES = [
    (1, 1, 1, 1),
    (5, 7, 5, 3),
    (6, 4, 24, 2),
    (3, 33, 264, 2),  # more than a part on a GPU; tiles of columns
    (2, 150, 40, 4),  # more than a part on a CPU; groups without an example
    (300, 2, 16, 2),  # more examples than a run of a sum
    (2, 3, 1100, 1),  # more than a strip of columns
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    if dtype not in backend.dtypes:
        pytest.skip("the GPU kernels take float32, bfloat16 and float16, not float64")
    batch, seq, columns, n_groups = shape
    hidden, groups = torch.randn(batch, seq, columns).to(dtype), torch.randint(n_groups, (batch,))
    check(backend, hidden, groups, n_groups)
    groups[::3] = -1 - groups[::3]
    check(backend, hidden, groups, n_groups, torch.rand(batch, seq) < 0.7)


def test_equals_a_loop_over_examples(backend: Backend) -> None:
    """By another way than the reference's; whole numbers, whose sums are exact."""
    hidden = torch.randint(-8, 9, (6, 8, 5)).float()
    groups = torch.tensor([1, 0, -1, 1, 0, 1])
    positions = [4, 8, 2, 0, 1, 2]  # powers of two divide exactly
    mask = torch.arange(8) < torch.tensor(positions)[:, None]
    means, sums, counts = check(backend, hidden, groups, 3, mask)
    right = torch.zeros(3, 5)
    for i, (group, n) in enumerate(zip(groups.tolist(), positions, strict=True)):
        mean = hidden[i, :n].sum(0) / max(n, 1)
        assert torch.equal(means[i].cpu(), mean)
        if group >= 0:
            right[group] += mean
    assert torch.equal(sums.cpu(), right) and counts.tolist() == [2, 2, 0]


def test_long_sums_keep_their_digits(backend: Backend) -> None:
    """Terms of one sign, of which a running float32 sum would lose the last digits."""
    check(backend, torch.rand(1, 5000, 8) + 0.5, torch.zeros(1, dtype=torch.int64), 1)
    check(backend, torch.rand(5000, 1, 8) + 0.5, torch.zeros(5000, dtype=torch.int64), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_masked_is_not_read(backend: Backend, dtype: torch.dtype) -> None:
    hidden, groups = torch.randn(4, 10, 24).to(dtype), torch.tensor([0, 1, 1, -1])
    mask = torch.rand(4, 10) < 0.5
    mask[2] = False  # all of an example, which is in no count
    mask[0, 3] = True
    found = check(backend, torch.where(mask[..., None], hidden, 0.0), groups, 2, mask)
    hidden[~mask] = NAN
    hidden[0, 4:][~mask[0, 4:]] = float("inf")
    for form in (mask, mask.long(), mask.float()):
        again = kdkernels.domain_prototypes(
            hidden.to(backend.device),
            groups.to(backend.device),
            2,
            mask=form.to(backend.device),
            backend=backend.name,
        )
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not found[0][2].any() and found[2].tolist() == [1, 1]


def test_what_is_not_finite_stays_in_its_group(backend: Backend) -> None:
    hidden = torch.randn(4, 3, 6)
    hidden[1, 2, 3], hidden[2, 0, 1] = NAN, float("inf")
    means, sums, counts = op_domain_prototypes(
        hidden.to(backend.device),
        torch.tensor([0, 1, -1, 0]).to(backend.device),
        None,
        2,
        backend=backend.name,
    )
    assert means.isnan().nonzero().tolist() == [[1, 3]] and means[2, 1] == float("inf")
    assert sums.isnan().nonzero().tolist() == [[1, 3]] and not sums.isinf().any()
    assert counts.tolist() == [2, 1]


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_layouts(backend: Backend, dtype: torch.dtype) -> None:
    """Without the first position, columns on and off the boundaries of vectors, other orders."""
    wide = torch.randn(4, 9, 80).to(dtype)
    groups, mask = torch.tensor([1, 0, 1, 1]), torch.rand(4, 9) < 0.7
    for columns in (slice(16, 64), slice(5, 53), slice(0, 48)):
        check(backend, wide[:, 1:, columns], groups, 2, mask[:, 1:])
    check(backend, wide[:, ::2, :48], groups, 2, mask[:, ::2])
    check(backend, wide.transpose(0, 1)[:4], groups, 2)
    check(backend, wide.transpose(1, 2)[:, :, :8], groups, 2)
    check(backend, wide[:1].expand(4, 9, 80), groups.flip(0), 2, mask.t().contiguous().t())


@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8), (0, 0, 8)])
def test_nothing_to_read(backend: Backend, shape: tuple[int, int, int]) -> None:
    hidden = torch.zeros(shape, device=backend.device)
    groups = torch.zeros(shape[0], dtype=torch.int64, device=backend.device)
    means, sums, counts = kdkernels.domain_prototypes(hidden, groups, 2, backend=backend.name)
    assert means.shape == (shape[0], 8) and not means.any()
    assert not sums.any() and counts.tolist() == [0, 0]


# ---- the sums ------------------------------------------------------------------------------------


def test_accumulates(backend: Backend) -> None:
    hidden = torch.randn(6, 4, 8).bfloat16().to(backend.device)
    groups = torch.tensor([0, 2, 1, 0, -1, 2]).to(backend.device)
    means, sums, counts = kdkernels.domain_prototypes(hidden, groups, 3, backend=backend.name)
    into = (torch.rand(3, 8, device=backend.device), torch.tensor([5, 0, 1]).to(backend.device))
    before = [x.clone() for x in into]
    again, first, second = kdkernels.domain_prototypes(
        hidden, groups, 3, accumulate_into=into, backend=backend.name
    )
    assert first is into[0] and second is into[1] and torch.equal(again, means)
    assert torch.equal(into[0], before[0] + sums) and torch.equal(into[1], before[1] + counts)


def test_batches_add_up_to_the_whole(backend: Backend) -> None:
    hidden, groups = torch.randint(-8, 9, (12, 4, 8)).float(), torch.randint(-1, 3, (12,))
    hidden, groups = hidden.to(backend.device), groups.to(backend.device)
    into = (torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64))
    into = (into[0].to(backend.device), into[1].to(backend.device))
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        kdkernels.domain_prototypes(
            hidden[part], groups[part], 3, accumulate_into=into, backend=backend.name
        )
    _, sums, counts = kdkernels.domain_prototypes(hidden, groups, 3, backend=backend.name)
    assert torch.equal(into[0], sums) and torch.equal(into[1], counts)


def test_same_bits_again(backend: Backend) -> None:
    hidden, groups = torch.randn(40, 70, 40), torch.randint(-1, 3, (40,))
    mask = torch.rand(40, 70) < 0.8
    first = check(backend, hidden, groups, 3, mask)
    threads = torch.get_num_threads()
    try:
        for seed in range(3):
            torch.set_num_threads(1 + seed % 2)
            if backend.name == "emulated":  # any order of threads
                with emulation.device(seed=seed):
                    again = check(backend, hidden, groups, 3, mask)
            else:
                again = check(backend, hidden, groups, 3, mask)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (6, 40, 60, 4))),
    dtype=st.sampled_from(DTYPES[:3]),
    masked=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(
    backend: Backend,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    masked: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch, seq, columns, n_groups = sizes
    hidden = torch.randn(batch, seq, columns).to(dtype)
    groups = torch.randint(-1, n_groups, (batch,))
    check(backend, hidden, groups, n_groups, torch.rand(batch, seq) < 0.5 if masked else None)


# ---- operators, torch.compile --------------------------------------------------------------------


def test_opcheck(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is no operator")
    groups = torch.tensor([1, -1, 0], device=backend.device)
    for dtype, masked in ((torch.float32, True), (torch.bfloat16, False)):
        hidden = torch.randn(3, 4, 12, device=backend.device).to(dtype)
        mask = torch.ones(3, 4, dtype=torch.bool, device=backend.device) if masked else None
        call = (hidden, groups, mask, 2)
        torch.library.opcheck(domain_prototypes_forward.overload(backend.name), call)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend: Backend, dynamic: bool) -> None:
    torch._dynamo.reset()

    def call(hidden: Tensor, groups: Tensor, mask: Tensor, into: Tensor, counts: Tensor) -> Tensor:
        means, sums, _ = kdkernels.domain_prototypes(
            hidden * 2.0,
            groups,
            2,
            mask=mask,
            accumulate_into=(into, counts),
            backend=backend.name,
        )
        return means.sum() + sums.sum()

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (3, 5):
        given = torch.randn(batch, 4, 12), torch.arange(batch) % 3 - 1, torch.rand(batch, 4) < 0.6
        found = []
        for run in (compiled, call):
            into = torch.ones(2, 12), torch.zeros(2, dtype=torch.int64)
            tensors = [x.to(backend.device) for x in (*given, *into)]
            found.append((run(*tensors), *tensors[3:]))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_transforms_take_the_reference() -> None:
    x, groups = torch.randn(3, 4, 5, 6), torch.tensor([0, 1, 1, -1])
    found = torch.func.vmap(lambda y: kdkernels.domain_prototypes(y, groups, 2)[1])(x)
    right = torch.stack([kdkernels.domain_prototypes(y, groups, 2)[1] for y in x])
    assert_within_budget(found, right.double(), right, torch.float32)


def test_under_no_grad_and_inference_mode(backend: Backend) -> None:
    hidden = torch.randn(2, 3, 4, device=backend.device, requires_grad=True)
    groups = torch.zeros(2, dtype=torch.int64, device=backend.device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            means, _, _ = kdkernels.domain_prototypes(hidden, groups, 1, backend=backend.name)
        assert not means.requires_grad


# ---- refusals ------------------------------------------------------------------------------------

H, G = torch.zeros(4, 3, 6), torch.tensor([0, 1, 1, 0])
SUMS, COUNTS = torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": H[0]}, ValueError, r"hidden must be \[batch, seq, hidden\], got shape \[3, 6\]"),
    ({"hidden": H.long()}, TypeError, "hidden must be float32, bfloat16, float16 or float64, got"),
    ({"hidden": [H]}, TypeError, "hidden must be a Tensor, got list"),
    ({"hidden": H.to_sparse()}, TypeError, "hidden must be a strided tensor, got"),
    ({"hidden": H.clone().requires_grad_()}, ValueError, "hidden must not require grad"),
    ({"groups": G[:3]}, ValueError, r"groups must be \[4\], got shape \[3\]"),
    ({"groups": G.int()}, TypeError, "groups must be int64, got int32"),
    ({"groups": [0, 1]}, TypeError, "groups must be a Tensor, got list"),
    ({"groups": G.to("meta")}, ValueError, "groups must be on cpu, got meta"),
    ({"groups": G + 1}, ValueError, r"groups must be in \[0, 2\) or negative, got 2 in row 1"),
    ({"n_groups": 0}, ValueError, "n_groups must be at least 1, got 0"),
    ({"n_groups": 2.0}, TypeError, "n_groups must be an int, got float"),
    ({"mask": torch.ones(4)}, ValueError, r"mask must be \[4, 3\], got shape \[4\]"),
    ({"mask": [1]}, TypeError, "mask must be a Tensor, got list"),
    ({"accumulate_into": (SUMS,)}, ValueError, r"must be \(sums, counts\), got 1 tensors"),
    (
        {"accumulate_into": (SUMS[:1], COUNTS)},
        ValueError,
        r"sums must be \[2, 6\] of torch.fl",
    ),
    ({"accumulate_into": (SUMS.half(), COUNTS)}, ValueError, "got .* of torch.float16"),
    (
        {"accumulate_into": (SUMS, COUNTS.int())},
        ValueError,
        r"counts must be \[2\] of torch.int",
    ),
    ({"backend": "fast"}, ValueError, "backend must be one of native, triton, reference"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"hidden": H, "groups": G, "n_groups": 2, **change}
    with pytest.raises(error, match=f"domain_prototypes: .*{message}"):
        kdkernels.domain_prototypes(**call)


def test_the_op_and_the_kernels_check_for_themselves(backend: Backend) -> None:
    with pytest.raises(TypeError, match="mask must be bool, got torch.int64"):
        op_domain_prototypes(H, G, torch.ones(4, 3, dtype=torch.int64), 2)
    assert "float64" in str(unsupported("triton", H.double()))
    if backend.name not in ("native", "emulated"):
        pytest.skip("only compiled kernels are handed unchecked tensors")
    hidden, groups = H.to(backend.device), G.to(backend.device)
    for call, message in (
        ((hidden[0], groups, None, 2), r"hidden must be \[batch, seq, hidden\], got 2 dimensions"),
        ((hidden.transpose(1, 2), groups, None, 2), "hidden must have unit column stride, got 6"),
        ((hidden.long(), groups, None, 2), "hidden must be float32, bfloat16"),
        ((hidden, groups[:3], None, 2), r"groups must be contiguous \[4\]"),
        ((hidden, groups.int(), None, 2), "groups must have dtype"),
        ((hidden, groups, hidden[..., 0], 2), r"mask must be contiguous bool \[4, 3\]"),
        ((hidden, groups, None, 0), "n_groups must be at least 1, got 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            domain_prototypes_forward(backend.name, *call)
    # What the layers above cannot see on a GPU: a group that is none.
    _, sums, counts = domain_prototypes_forward(backend.name, hidden + 1.0, groups + 1, None, 2)
    assert counts.tolist() == [0, 2] and sums.tolist() == [[0.0] * 6, [2.0] * 6]


def test_examples_in_docstrings_run() -> None:
    # By name: as an attribute of its package the function stands before the module.
    found = doctest.testmod(sys.modules["kdkernels.api.domain_prototypes"])
    assert found.attempted > 4 and found.failed == 0
