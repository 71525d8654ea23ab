"""``interchange`` against loops over positions and its reference, over every backend."""

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
from torch.utils.checkpoint import checkpoint

import kdkernels
from kdkernels.ops.interchange import Mode, unsupported
from kdkernels.ops.interchange import interchange as op_interchange
from kdkernels.ops.interchange.index import map_of_pairs, map_of_spans, readers_of_map
from kdkernels.ops.interchange.op import (
    interchange_,
    interchange_forward,
    interchange_grad_base,
    interchange_grad_source,
)

NAN = float("nan")
MODES = ("swap", "add", "subtract")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Spans = dict[str, Tensor]


def spans(
    base: list[int], source: list[int], length: list[int], row: list[int] | None = None
) -> Spans:
    found = {
        "base_start": torch.tensor(base, dtype=torch.int64),
        "source_start": torch.tensor(source, dtype=torch.int64),
        "length": torch.tensor(length, dtype=torch.int64),
    }
    if row is not None:
        found["source_row"] = torch.tensor(row)
    return found


def pairs(index: Spans) -> list[tuple[int, int, int, int]]:
    """Base row, base position, source row, source position; in Python, for the expectation."""
    found = []
    for b, (start, source_start, length) in enumerate(
        zip(*(index[k].tolist() for k in ("base_start", "source_start", "length")), strict=True)
    ):
        row = int(index["source_row"][b]) if "source_row" in index else b
        found += [(b, start + k, row, source_start + k) for k in range(length)]
    return found


def by_hand(
    base: Tensor, source: Tensor, index: list[tuple[int, int, int, int]], mode: str, dims: slice
) -> Tensor:
    """One position after the other."""
    out = base.clone()
    for b, p, r, q in index:
        value = source[r, q, dims]
        if mode != "swap":
            value = base[b, p, dims] + value if mode == "add" else base[b, p, dims] - value
        out[b, p, dims] = value
    return out


def gradients_by_hand(
    grad: Tensor, source: Tensor, index: list[tuple[int, int, int, int]], mode: str, dims: slice
) -> tuple[Tensor, Tensor]:
    """In float64."""
    grad_base, grad_source = grad.double().clone(), torch.zeros_like(source, dtype=torch.float64)
    for b, p, r, q in index:
        if mode == "swap":
            grad_base[b, p, dims] = 0
        grad_source[r, q, dims] += (-1 if mode == "subtract" else 1) * grad[b, p, dims].double()
    return grad_base, grad_source


def states(
    batch: int, seq: int, rows: int, positions: int, hidden: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shapes = (batch, seq, hidden), (rows, positions, hidden)
    first, second = (torch.randn(shape).to(dtype) for shape in shapes)
    return first, second


def moved(index: Spans, backend: Backend) -> Spans:
    return {name: x.to(backend.device) for name, x in index.items()}


def check(
    backend: Backend,
    base: Tensor,
    source: Tensor,
    index: Spans | tuple[Tensor, Tensor],
    mode: str = "swap",
    dims: slice | tuple[int, int] | None = None,
    inplace: bool = False,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result and both gradients; exact where nothing is computed."""
    columns = slice(None) if dims is None else dims if isinstance(dims, slice) else slice(*dims)
    upstream = torch.randn(base.shape).to(base.dtype) if upstream is None else upstream
    leaves = [x.detach().requires_grad_() for x in (base, source)]
    given = [x.to(backend.device) if x.device.type != backend.device else x for x in leaves]
    if inplace:
        given[0] = given[0] * 1.0  # no leaf; keeps no output
    options: dict[str, Any] = {"mode": mode, "dims": dims, "inplace": inplace}
    if isinstance(index, dict):
        where = pairs(index)
        out = kdkernels.interchange(
            *given, **moved(index, backend), **options, backend=backend.name
        )
    else:
        # Of pairs with one base position the last counts.
        both = [x.tolist() for x in index]
        last = {tuple(b): tuple(s) for b, s in zip(*both, strict=True) if b[0] >= 0}
        where = [(*b, *s) for b, s in sorted(last.items())]
        out = kdkernels.interchange_at(
            *given, *(x.to(backend.device) for x in index), **options, backend=backend.name
        )
    if inplace:
        assert out is given[0]
    found = torch.autograd.grad(out, leaves, upstream.to(backend.device))
    expected = by_hand(base, source, where, mode, columns)
    out = out.detach()
    assert out.dtype == base.dtype and out.shape == base.shape
    if mode == "swap":
        assert torch.equal(out.cpu(), expected)
    else:
        oracle = by_hand(base.double(), source.double(), where, mode, columns)
        assert_within_budget(out, oracle, expected, base.dtype)
    wide = gradients_by_hand(upstream, source, where, mode, columns)
    assert torch.equal(found[0].cpu().double(), wide[0])
    assert found[1].shape == source.shape
    assert_within_budget(found[1], wide[1], wide[1].to(base.dtype), base.dtype)
    return out, found[0], found[1]


# Hidden sizes: one, less than a vector, odd, some vectors, more than a piece of a warp in bf16.
@pytest.mark.parametrize("hidden", [1, 3, 33, 64, 1100])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_loops(backend: Backend, dtype: torch.dtype, mode: str, hidden: int) -> None:
    if dtype not in backend.dtypes:
        pytest.skip("the GPU kernels take float32, bfloat16 and float16, not float64")
    base, source = states(4, 6, 3, 7, hidden, dtype)
    # The whole row, the first position, the last one, none; sources that overlap.
    index = spans([0, 0, 5, 2], [1, 6, 2, 0], [6, 1, 1, 0], [1, 2, 1, 0])
    check(backend, base, source, index, mode)


@pytest.mark.parametrize("dims", [(0, 8), (8, 32), (3, 29), (5, 6), (17, 33), (4, 4), (0, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns(backend: Backend, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    base, source = states(3, 5, 3, 5, 33, dtype)
    index = spans([1, 0, 3], [0, 2, 3], [3, 2, 2], [0, 0, 2])
    for mode in MODES:
        check(backend, base, source, index, mode, dims)
        check(backend, base, source, index, mode, slice(*dims), inplace=True)


def test_columns_by_slices(backend: Backend) -> None:
    base, source = states(1, 3, 1, 3, 12, torch.float32)
    for dims in (slice(-4, None), slice(None, 4), slice(9, 2), slice(None)):
        check(backend, base, source, spans([0], [1], [2]), dims=dims)


@pytest.mark.parametrize("mode", MODES)
def test_positions(backend: Backend, mode: str) -> None:
    base, source = states(2, 5, 3, 4, 20, torch.float32)
    where = torch.tensor([[0, 4], [0, 1], [1, 0], [0, 1], [-1, 0], [1, 3]])
    taken = torch.tensor([[2, 3], [0, 0], [2, 3], [1, 2], [9, 9], [2, 3]])
    check(backend, base, source, (where, taken), mode)
    check(backend, base, source, (where.int(), taken.int()), mode, (3, 13), inplace=True)
    none = torch.zeros(0, 2, dtype=torch.int64)
    out, _, grad_source = check(backend, base, source, (none, none), mode)
    assert torch.equal(out.cpu(), base) and not grad_source.any()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend: Backend, dtype: torch.dtype, inplace: bool) -> None:
    index = spans([1, 0, 2], [0, 1, 1], [3, 2, 2], [2, 2, 0])
    wide = torch.full((3, 8, 50), NAN, dtype=dtype)
    wide[:, ::2, 7:40] = torch.randn(3, 4, 33).to(dtype)
    base, source = wide[:, ::2, 7:40], torch.randn(4, 3, 33).to(dtype).transpose(0, 1)
    if not inplace:
        check(backend, base, source, index)
        # Columns apart; repeated rows, as of an expanded state; a gradient that is one number.
        check(backend, base, torch.randn(33, 3, 4).to(dtype).permute(1, 2, 0), index, "add")
        check(backend, base[:1].expand(3, 4, 33), source[:1].expand(3, 4, 33), index, "subtract")
        one = torch.ones((), dtype=dtype).expand(3, 4, 33)
        check(backend, base, source, index, upstream=one)
        return
    wide = wide.to(backend.device)
    before = wide.clone()
    view = wide[:, ::2, 7:40]
    out = kdkernels.interchange(
        view, source.to(backend.device), **moved(index, backend), inplace=True, backend=backend.name
    )
    assert out is view
    right = by_hand(before[:, ::2, 7:40].cpu(), source, pairs(index), "swap", slice(None))
    assert torch.equal(view.cpu(), right)
    view.copy_(before[:, ::2, 7:40])  # nothing else was touched
    assert torch.equal(wide.isnan(), before.isnan())


def test_identities(backend: Backend) -> None:
    base, source = states(3, 5, 3, 5, 24, torch.bfloat16)
    index = spans([1, 0, 2], [1, 0, 2], [3, 5, 1])
    assert torch.equal(check(backend, base, base.clone(), index)[0].cpu(), base)
    everything = spans([0] * 3, [0] * 3, [5] * 3)
    out, grad_base, _ = check(backend, base, source, everything)
    assert torch.equal(out.cpu(), source) and not grad_base.any()
    nothing = spans([0, 4, 5], [0, 5, 1], [0] * 3, [0, 7, -1])
    out, _, grad_source = check(backend, base, source, nothing)
    assert torch.equal(out.cpu(), base) and not grad_source.any()


@pytest.mark.parametrize("shape", [(0, 3, 2, 3, 8), (2, 0, 2, 3, 8), (2, 3, 0, 3, 8)])
def test_empty(backend: Backend, shape: tuple[int, int, int, int, int]) -> None:
    base, source = states(*shape, torch.float32)
    zeros = [0] * shape[0]
    check(backend, base, source, spans(zeros, zeros, zeros))


def test_what_is_overwritten_is_not_read(backend: Backend) -> None:
    """Nor is a source that nobody asks for, in either direction."""
    base, source = states(2, 4, 2, 4, 16, torch.float32)
    base[0, 1:3], source[0, :2], source[1] = NAN, NAN, NAN
    upstream = torch.randn(2, 4, 16)
    index = spans([1, 0], [2, 0], [2, 0])
    out, _, grad_source = check(backend, base, source, index, upstream=upstream)
    assert not out.isnan().any() and not grad_source.isnan().any()
    upstream[0, 1] = NAN  # goes to the source alone, to one position
    leaf, other = (x.to(backend.device).requires_grad_() for x in (base, source))
    out = kdkernels.interchange(leaf, other, **moved(index, backend), backend=backend.name)
    grads = torch.autograd.grad(out, (leaf, other), upstream.to(backend.device))
    assert not grads[0].isnan().any()
    assert grads[1].isnan().any(-1).nonzero().tolist() == [[0, 2]]


def test_overlapping_sources_sum_in_float32(backend: Backend) -> None:
    """256 + 256 ones: a sum in bfloat16 would stop at 256. More rows than lanes of a warp."""
    batch = 70
    base, source = states(batch, 2, 2, 3, 8, torch.bfloat16)
    index = spans([b % 2 for b in range(batch)], [1] * batch, [1] * batch, [1] * batch)
    upstream = torch.ones(batch, 2, 8, dtype=torch.bfloat16)
    upstream[0] = 256.0
    _, _, grad_source = check(backend, base, source, index, upstream=upstream)
    assert (grad_source[1, 1] == 256 + batch - 1).logical_or(grad_source[1, 1] == 324).all()
    where = torch.stack((torch.arange(batch), torch.zeros(batch, dtype=torch.int64)), 1)
    taken = torch.tensor([[1, 2]]).expand(batch, 2)
    check(backend, base, source, (where, taken), upstream=upstream)


def test_same_bits_again(backend: Backend) -> None:
    base, source = states(9, 4, 2, 4, 40, torch.float32)
    index = spans([0] * 9, [0, 1] * 4 + [0], [3] * 9, [1] * 9)
    upstream = torch.randn(base.shape)
    first = check(backend, base, source, index, upstream=upstream)
    for seed in range(4):
        if backend.name == "emulated":  # any order of threads
            with emulation.device(seed=seed):
                again = check(backend, base, source, index, upstream=upstream)
        else:
            again = check(backend, base, source, index, upstream=upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(*(st.integers(1, 4) for _ in range(4)), st.integers(1, 40)),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    dims=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    inplace=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_spans(
    backend: Backend,
    sizes: tuple[int, int, int, int, int],
    mode: str,
    dtype: torch.dtype,
    dims: tuple[int, int],
    inplace: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch, seq, rows, positions, hidden = sizes
    base, source = states(*sizes, dtype)
    length = torch.randint(0, min(seq, positions) + 1, (batch,))
    index = {
        "base_start": (torch.rand(batch) * (seq - length + 1)).long(),
        "source_start": (torch.rand(batch) * (positions - length + 1)).long(),
        "length": length,
        "source_row": torch.randint(0, rows, (batch,)),
    }
    columns = min(min(dims), hidden), min(max(dims), hidden)
    check(backend, base, source, index, mode, columns, inplace)


# ---- the index -----------------------------------------------------------------------------------


def test_out_of_range_leaves_the_base_alone(backend: Backend) -> None:
    """As the op finds it, where nobody looks at the index first."""
    base, source = states(5, 4, 3, 3, 10, torch.float32)
    raw = spans([-1, 3, 1, 0, 2**40], [0, 0, 2, 0, 0], [3, 4, 2, 2, 3], [0, 1, 2, 3, -(2**40)])
    inside = [p for p in pairs(raw) if 0 <= p[1] < 4 and 0 <= p[2] < 3 and 0 <= p[3] < 3]
    assert 0 < len(inside) < len(pairs(raw))
    leaves = [x.to(backend.device).requires_grad_() for x in (base, source)]
    upstream = torch.randn(base.shape)
    index = [x.to(backend.device) for x in raw.values()]
    for form in (index, [map_of_spans(index, 4, 3, 3)]):
        out = op_interchange(*leaves, form, backend=backend.name)
        assert torch.equal(out.detach().cpu(), by_hand(base, source, inside, "swap", slice(None)))
        grads = torch.autograd.grad(out, leaves, upstream.to(backend.device))
        right = gradients_by_hand(upstream, source, inside, "swap", slice(None))
        for grad, expected in zip(grads, right, strict=True):
            assert torch.equal(grad.cpu().double(), expected)
    pair = torch.tensor([[0, 9], [7, 0], [1, 1]]), torch.tensor([[0, 0], [0, 0], [-2, 1]])
    assert (map_of_pairs(*pair, base.shape, source.shape) == -1).all()


def test_a_map_turned_round() -> None:
    sources = torch.tensor([[3, -1, 0], [3, 5, 3]])
    order, first = readers_of_map(sources, 2, 3)
    readers = [order[first[i] : first[i + 1]].tolist() for i in range(6)]
    assert readers == [[2], [], [], [0, 3, 5], [], [4]]


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_only_what_is_needed(backend: Backend, inplace: bool) -> None:
    base, source = (x.to(backend.device) for x in states(2, 3, 2, 3, 8, torch.float32))
    index = moved(spans([0, 1], [1, 0], [2, 2]), backend)
    options = {**index, "inplace": inplace, "backend": backend.name}
    assert not kdkernels.interchange(base.clone(), source, **options).requires_grad
    for which in (0, 1):
        given = [base.clone(), source.clone()]
        leaf = given[which].requires_grad_()
        given[0] = given[0] * 1.0
        out = kdkernels.interchange(*given, **options)
        out.sum().backward()
        assert leaf.grad is not None and leaf.grad.sum() == (16 if which == 0 else 32)
        assert given[1 - which].grad is None if which == 0 else True


@pytest.mark.parametrize("function", [torch.relu, torch.tanh])
def test_out_of_place_after_what_keeps_its_output(backend: Backend, function: Any) -> None:
    base, source = (x.to(backend.device) for x in states(2, 3, 2, 3, 8, torch.float32))
    leaf = base.requires_grad_()
    index = moved(spans([0, 1], [1, 0], [2, 2]), backend)
    out = kdkernels.interchange(function(leaf), source, **index, backend=backend.name)
    grad = torch.autograd.grad(out.sum(), leaf)[0]
    assert (grad[0, :2] == 0).all() and (grad[1, 0] != 0).any()
    out = kdkernels.interchange(function(leaf), source, **index, backend=backend.name, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_in_place_without_gradients_is_seen_by_autograd(backend: Backend) -> None:
    base, source = (x.to(backend.device) for x in states(1, 3, 1, 3, 8, torch.float32))
    leaf = torch.ones(8, device=backend.device, requires_grad=True)
    product = leaf * base  # keeps the base
    index = moved(spans([0], [1], [2]), backend)
    with torch.no_grad():
        kdkernels.interchange(base, source, **index, inplace=True, backend=backend.name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        own = base * 1.0
        assert (
            kdkernels.interchange(own, source, **index, inplace=True, backend=backend.name) is own
        )


def test_in_place_from_the_other_half_of_a_batch(backend: Backend) -> None:
    both = torch.randn(4, 3, 8).to(backend.device)
    before = both.cpu().clone()
    index = spans([0, 1], [1, 0], [2, 2])
    kdkernels.interchange(
        both[:2], both[2:], **moved(index, backend), inplace=True, backend=backend.name
    )
    right = by_hand(before[:2], before[2:], pairs(index), "swap", slice(None))
    assert torch.equal(both.cpu(), torch.cat((right, before[2:])))


def test_in_place_after_a_linear_layer(backend: Backend) -> None:
    layer = torch.nn.Linear(8, 8).to(backend.device)
    states_, source = (x.to(backend.device) for x in states(2, 4, 2, 4, 8, torch.float32))
    index = moved(spans([0, 1], [1, 0], [2, 2], [1, 0]), backend)
    grads = []
    for inplace in (False, True):
        hidden = layer(states_)
        # As a layer does whose input is also the source.
        out = kdkernels.interchange(
            hidden, layer(source), **index, inplace=inplace, backend=backend.name
        )
        grads.append(torch.autograd.grad(out.square().sum(), list(layer.parameters())))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(backend: Backend, mode: str) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip("the GPU kernels take float32, bfloat16 and float16, not float64")
    base, source = states(2, 3, 2, 3, 4, torch.float64)
    leaves = [x.to(backend.device).requires_grad_() for x in (base, source)]
    index = moved(spans([0, 1], [1, 0], [2, 2], [1, 1]), backend)

    def call(*given: Tensor) -> Tensor:
        return kdkernels.interchange(
            *given, **index, dims=(1, 3), mode=mode, backend=backend.name
        ).sin()

    assert torch.autograd.gradcheck(call, leaves)


def test_create_graph_needs_the_reference(backend: Backend) -> None:
    base, source = (x.to(backend.device) for x in states(1, 3, 1, 3, 8, torch.float32))
    base.requires_grad_()
    index = moved(spans([0], [1], [2]), backend)
    out = kdkernels.interchange(base, source, **index, backend=backend.name).square().sum()
    if backend.name == "reference":
        (grad,) = torch.autograd.grad(out, base, create_graph=True)
        assert torch.autograd.grad(grad.sum(), base)[0].sum() == 2 * 8
        return
    with pytest.raises(RuntimeError, match="backend must be 'reference' for create_graph=True"):
        torch.autograd.grad(out, base, create_graph=True)


def test_checkpointing_and_autocast(backend: Backend) -> None:
    layer = torch.nn.Linear(8, 8).to(backend.device)
    states_, source = (x.to(backend.device) for x in states(2, 4, 2, 4, 8, torch.float32))
    index = moved(spans([0, 1], [1, 0], [2, 2], [1, 0]), backend)

    def block(base: Tensor, other: Tensor) -> Tensor:
        return layer(
            kdkernels.interchange(layer(base), layer(other), **index, backend=backend.name)
        )

    with torch.autocast(backend.device, dtype=torch.bfloat16):
        plain = block(states_, source)
        again = checkpoint(block, states_, source, use_reentrant=False)
    assert plain.dtype == torch.bfloat16 and torch.equal(plain, again)
    grads = [torch.autograd.grad(x.sum(), list(layer.parameters())) for x in (plain, again)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_transforms_take_the_reference() -> None:
    base, source = states(1, 3, 1, 3, 8, torch.float32)
    index = spans([0], [1], [2])

    def loss(x: Tensor) -> Tensor:
        return kdkernels.interchange(x, source, **index).square().sum()

    leaf = base.clone().requires_grad_()
    assert torch.equal(torch.func.grad(loss)(base), torch.autograd.grad(loss(leaf), leaf)[0])


# ---- subspaces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subspace(backend: Backend, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip("the GPU kernels take float32, bfloat16 and float16, not float64")
    base, source = states(3, 5, 4, 6, 16, dtype)
    index = spans([1, 0, 2], [0, 1, 3], [3, 0, 2], [2, 0, 2])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    basis = torch.linalg.qr(torch.randn(16, 3, dtype=torch.float64))[0]
    upstream = torch.randn(base.shape).to(dtype)

    def rotated(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        """Both runs into the basis, its columns swapped, and back."""
        out = x.clone()
        for b, p, row, q in pairs(index):
            full = torch.linalg.qr(torch.cat((r, torch.eye(16, dtype=r.dtype)), 1))[0]
            full = torch.cat((r, full[:, 3:]), 1)
            turned = torch.cat((y[row, q] @ full[:, :3], x[b, p] @ full[:, 3:]))
            out[b, p] = full @ turned
        return out

    def projected(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        out = x.clone()
        for b, p, row, q in pairs(index):
            out[b, p] = x[b, p] + (y[row, q] - x[b, p]) @ r @ r.T
        return out

    given = [base, source, basis.to(wide)]
    oracle = [x.double().requires_grad_() for x in given]
    right = projected(*oracle)
    assert torch.allclose(right, rotated(*(x.detach() for x in oracle)), atol=1e-6)
    right_grads = torch.autograd.grad(right, oracle, upstream.double())
    leaves = [x.detach().to(backend.device).requires_grad_() for x in given]
    same = [x.detach().clone().requires_grad_() for x in given]
    for options in ({}, {"max_length": 4}):
        out = kdkernels.interchange_subspace(
            *leaves, **moved(index, backend), **options, backend=backend.name
        )
        grads = torch.autograd.grad(out, leaves, upstream.to(backend.device))
        alike = projected(*(x.to(wide) for x in same)).to(dtype)
        alike_grads = torch.autograd.grad(alike, same, upstream)
        assert_within_budget(out.detach(), right.detach(), alike.detach(), dtype)
        for i, (a, b, c) in enumerate(zip(grads, right_grads, alike_grads, strict=True)):
            # Whatever the dtype of the states, products are those of the basis'.
            assert_within_budget(a, b, c, dtype if i < 2 else wide, unit=float(i == 2) * 16)
    unswapped = torch.ones(3, 5, dtype=torch.bool)
    for b, p, _, _ in pairs(index):
        unswapped[b, p] = False
    assert torch.equal(out.detach().cpu()[unswapped], base[unswapped])


def test_subspaces_of_all_and_nothing(backend: Backend) -> None:
    base, source = states(2, 4, 2, 4, 8, torch.float32)
    index = moved(spans([0, 1], [1, 0], [3, 2]), backend)
    call = [x.to(backend.device) for x in (base, source)]
    everything = torch.eye(8, device=backend.device)
    plain = kdkernels.interchange(*call, **index, backend=backend.name)
    out = kdkernels.interchange_subspace(*call, everything, **index, backend=backend.name)
    assert_within_budget(out, plain.double(), plain, torch.float32)
    nothing = kdkernels.interchange_subspace(
        *call, everything[:, :0], **index, backend=backend.name
    )
    assert torch.equal(nothing.cpu(), base)
    same = kdkernels.interchange_subspace(
        call[0], call[0], everything[:, :3], base_start=index["base_start"],
        source_start=index["base_start"], length=index["length"], backend=backend.name,
    )  # fmt: skip
    assert torch.equal(same.cpu(), base)
    index["length"] = torch.zeros_like(index["length"])
    own = call[0].clone()
    options = {**index, "backend": backend.name}
    assert torch.equal(kdkernels.interchange_subspace(own, call[1], everything, **options), own)
    out = kdkernels.interchange_subspace(own, call[1], everything, **options, inplace=True)
    assert out is own


# ---- operators, torch.compile --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend: Backend, dtype: torch.dtype) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is no operator")
    base, source = (x.to(backend.device) for x in states(2, 3, 2, 4, 10, dtype))
    index = list(moved(spans([0, 1], [1, 0], [2, 2]), backend).values())
    row = torch.tensor([1, 1], device=backend.device)
    for form in (index, [*index, row], [map_of_spans(index, 3, 2, 4)]):
        inverse = readers_of_map(form[0], 2, 4) if len(form) == 1 else form
        for primitive, call in (
            (interchange_forward, (base, source, form, 1, 2, 9)),
            (interchange_, (base.clone(), source, form, 0, 0, 10)),
            (interchange_grad_base, (base, form, 2, 4, 2, 9)),
            (interchange_grad_source, (base, inverse, 2, 4, True, 2, 9)),
        ):
            torch.library.opcheck(primitive.overload(backend.name), call)


@pytest.mark.parametrize("form", ["spans", "inplace", "positions", "subspace"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend: Backend, dynamic: bool, form: str) -> None:
    torch._dynamo.reset()

    def call(base: Tensor, source: Tensor, basis: Tensor, index: Spans) -> Tensor:
        base, options = base * 2.0, {"backend": backend.name}
        if form == "positions":
            where = torch.stack((torch.arange(2, device=base.device), index["base_start"]), 1)
            return kdkernels.interchange_at(base, source, where, where, **options).sin()
        if form == "subspace":
            return kdkernels.interchange_subspace(base, source, basis, **index, **options).sin()
        inplace = form == "inplace"
        return kdkernels.interchange(base, source, **index, **options, inplace=inplace).sin()

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seq in (4, 6):
        given = [*states(2, seq, 3, 5, 12, torch.float32), torch.eye(12)[:, :2]]
        leaves = [x.to(backend.device).requires_grad_() for x in given]
        used = leaves if form == "subspace" else leaves[:2]
        index = moved(spans([0, 2], [1, 2], [2, 1], [2, 0]), backend)
        found, plain = compiled(*leaves, index), call(*leaves, index)
        assert_within_budget(found.detach(), plain.detach(), plain.detach(), torch.float32)
        for a, b in zip(
            torch.autograd.grad(found.sum(), used),
            torch.autograd.grad(plain.sum(), used),
            strict=True,
        ):
            assert_within_budget(a, b, b, torch.float32)


# ---- refusals ------------------------------------------------------------------------------------

B, S = torch.zeros(2, 6, 8), torch.zeros(3, 5, 8)
START = torch.tensor([0, 1])
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"base": B[0]}, ValueError, r"base must be \[rows, positions, hidden\], got shape \[6, 8\]"),
    ({"source": S[..., :4]}, ValueError, "source must have the 8 columns of the base, got 4"),
    ({"source": S.bfloat16()}, TypeError, "source must have the dtype of the base torch.float32"),
    ({"base": B.long()}, TypeError, "base must be float32, bfloat16, float16 or float64, got"),
    ({"source": S.to("meta")}, ValueError, "source must be on cpu, got meta"),
    ({"base_start": 0}, ValueError, r"base_start must be a tensor \[2\], got int"),
    ({"length": torch.tensor([1])}, ValueError, r"length must be a tensor \[2\], got shape \[1\]"),
    ({"length": torch.ones(2)}, TypeError, "length must be int64 or int32, got torch.float32"),
    ({"length": START.to("meta")}, ValueError, "length must be on cpu, got meta"),
    ({"length": torch.tensor([1, -3])}, ValueError, "length must be 0 or more, got -3 in row 1"),
    (
        {"base_start": torch.tensor([0, 5])},
        ValueError,
        r"base_start must begin a span inside of \[0, 6\), got \[5, 7\) in row 1",
    ),
    (
        {"source_start": torch.tensor([-1, 0])},
        ValueError,
        r"source_start must begin a span inside of \[0, 5\), got \[-1, 1\) in row 0",
    ),
    ({"source_row": torch.tensor([1, 3])}, ValueError, r"source_row must be in \[0, 3\), got 3 in"),
    ({"source": S[:1]}, ValueError, r"source_row must be in \[0, 1\), got 1 in row 1"),
    ({"dims": (2, 9)}, ValueError, r"dims must be in \[0, 8\], got \(2, 9\)"),
    ({"dims": slice(0, 8, 2)}, ValueError, "dims must be a slice of step 1, got step 2"),
    ({"mode": "multiply"}, ValueError, "mode must be one of swap, add, subtract, got 'multiply'"),
    ({"backend": "fast"}, ValueError, "backend must be one of native, triton, reference"),
    (
        {"base": B.clone().requires_grad_(), "inplace": True},
        ValueError,
        "base must not be a leaf that requires grad with inplace=True",
    ),
    (
        {"base": B[:, :1].expand(2, 6, 8), "inplace": True},
        ValueError,
        "base must not repeat its memory with inplace=True",
    ),
    (
        {"base": B.transpose(1, 2).contiguous().transpose(1, 2), "inplace": True},
        ValueError,
        "base must have unit column stride with inplace=True, got 6",
    ),
    (
        {"source": B, "inplace": True},
        ValueError,
        "source must not share the memory of the base with inplace=True",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {
        "base": B, "source": S, "base_start": START, "source_start": START,
        "length": torch.tensor([2, 2]), **change,
    }  # fmt: skip
    with pytest.raises(error, match=f"interchange: {message}"):
        kdkernels.interchange(**call)


def test_refusals_of_positions_and_subspaces() -> None:
    one = torch.zeros(1, 2, dtype=torch.int64)
    for where, taken, error, message in (
        (one[0], one, ValueError, r"base_index must be \[n, 2\] with one n for both, got shape"),
        (one, one.expand(3, 2), ValueError, r"source_index must be \[n, 2\] with one n"),
        (one.float(), one, TypeError, "base_index must be int64 or int32, got torch.float32"),
        (one + 6, one, ValueError, r"base_index must be rows and .* got \[6, 6\] in row 0"),
        (one, one - 1, ValueError, r"in \[0, 3\) and \[0, 5\), got \[-1, -1\] in row 0"),
    ):
        with pytest.raises(error, match=f"interchange_at: .*{message}"):
            kdkernels.interchange_at(B, S, where, taken)
    index = {"base_start": START, "source_start": START, "length": START + 1}
    for basis, options, error, message in (
        (torch.eye(4), {}, ValueError, r"basis must be \[8, k\], got shape \[4, 4\]"),
        (torch.eye(8).double(), {}, TypeError, "basis must be torch.float32, got torch.float64"),
        (torch.eye(8), {"max_length": 1}, ValueError, "length must be at most max_length 1, got 2"),
        (torch.eye(8), {"max_length": -1}, ValueError, "max_length must be 0 or more, got -1"),
    ):
        with pytest.raises(error, match=f"interchange_subspace: {message}"):
            kdkernels.interchange_subspace(B, S, basis, **index, **options)


def test_the_kernels_check_for_themselves() -> None:
    index = [START, START, START]
    for call, message in (
        ((B, S[..., :4], index, 0, 0, 8), "source must have dtype and columns of the base, 8"),
        ((B, S, index[:2], 0, 0, 8), "index must be 1, 3 or 4 tensors, got 2"),
        ((B, S, [START[:1]] * 3, 0, 0, 8), "index must be contiguous int64 of 2 elements"),
        ((B, S, index, 3, 0, 8), r"mode must be in \[0, 3\), got 3"),
        ((B, S, index, 0, 5, 9), r"dims must be in \[0, 8\], got \(5, 9\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            interchange_forward("native", *call)


def test_the_op_checks_its_index() -> None:
    with pytest.raises(ValueError, match=r"index\[1\] must be \[2\] int64 on cpu, got \[2\] torch"):
        op_interchange(B, S, [START, START.int(), START], Mode.SWAP)
    assert "float64" in str(unsupported("triton", B.double()))


def test_examples_in_docstrings_run() -> None:
    # By name: as an attribute of its package the function stands before the module.
    found = doctest.testmod(sys.modules["kdkernels.api.interchange"])
    assert found.attempted > 10 and found.failed == 0
