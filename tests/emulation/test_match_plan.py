"""The launch plan of the CUDA kernel of ``hidden_match``, and that kernel where the plan varies.

The op tests cover its numerics at the layouts of one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from emulation import backend
from emulation.cases import SEEDS
from helpers.budget import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdkernels import _native
from kdkernels.ops.hidden_match.op import (
    _split,
    gradient_offsets,
    hidden_match_forward,
    hidden_match_grad,
)
from kdkernels.ops.hidden_match.reference import hidden_match_reference
from kdkernels.ops.hidden_match.spec import Kind, Spec

host: Any = _native.host()
REASON = backend.load()
planned = pytest.mark.skipif(
    not hasattr(host, "match_plan"), reason="kdkernels._host was not built"
)
emulated = pytest.mark.skipif(REASON is not None, reason=str(REASON))

WARPS = 8  # of a block
HELD = 4  # vectors that a thread keeps of each row
MOST_LAYERS = 64


def plan(rows: int, widths: Sequence[int], element_size: int = 2) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = host.match_plan(rows, list(widths), element_size)
    return layers


@planned
@pytest.mark.parametrize(
    ("width", "element_size", "warps", "once"),
    [
        (312, 2, 1, True),
        (768, 2, 1, True),
        (1024, 2, 1, True),
        (2560, 2, 4, True),
        (4096, 2, 4, True),
        (8192, 2, 8, True),
        (8200, 2, 8, False),
        (768, 4, 2, True),
        (4096, 4, 8, True),
        (4097, 4, 8, False),
    ],
)
def test_real_widths(width: int, element_size: int, warps: int, once: bool) -> None:
    (layer,) = plan(8192, [width], element_size)
    assert (layer["warps_a_row"], layer["once"]) == (warps, once)
    assert layer["blocks"] == 8192 * warps // WARPS


@planned
def test_32_layers_are_one_launch() -> None:
    layers = plan(8192, [4096] * 32)
    assert {layer["launch"] for layer in layers} == {0}
    assert layers[-1]["first_block"] + layers[-1]["blocks"] == 32 * 4096


@planned
@given(
    st.integers(0, (1 << 31) - 1),
    st.lists(st.integers(1, 1 << 29), min_size=1, max_size=200),
    st.sampled_from([2, 4]),
)
def test_every_plan_is_sound(rows: int, widths: list[int], element_size: int) -> None:
    layers = plan(rows, widths, element_size)
    assert len(layers) == len(widths)
    launch, blocks, count = 0, 0, 0
    for layer, width in zip(layers, widths, strict=True):
        if layer["launch"] != launch:
            assert layer["launch"] == launch + 1
            assert count == MOST_LAYERS or blocks + layer["blocks"] >= 1 << 31
            launch, blocks, count = layer["launch"], 0, 0
        warps = layer["warps_a_row"]
        assert warps in (1, 2, 4, 8) and layer["rows_a_block"] == WARPS // warps
        assert layer["first_block"] == blocks
        assert 0 <= layer["blocks"] * layer["rows_a_block"] - rows < layer["rows_a_block"]
        vectors = -(-width * element_size // 16)
        assert layer["once"] == (vectors <= 32 * warps * HELD)
        assert layer["once"] or warps == WARPS
        blocks, count = blocks + layer["blocks"], count + 1
        assert blocks < 1 << 31 and count <= MOST_LAYERS


# ---- the kernel ----------------------------------------------------------------------------------


def states(
    rows: int, width: int, dtype: torch.dtype, *, shift: int = 0, stride: int | None = None
) -> Tensor:
    """Rows that begin ``shift`` elements behind a 16-byte boundary, in a buffer full of NaN."""
    stride = stride or width
    buffer = torch.full((rows * stride + shift + 8,), torch.nan, dtype=dtype)
    x = buffer[shift:].as_strided((rows, width), (stride, 1))
    return x.copy_(torch.randn(rows, width))


def check(
    students: list[Tensor],
    teachers: list[Tensor],
    mask: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    weights: list[float],
    spec: Spec,
) -> tuple[Tensor, ...]:
    """Both operators against the reference; returns all results."""
    others = (mask, row_weights, denominator, weights, spec)
    wanted = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in students]
        loss, parts, rows = hidden_match_reference(leaves, [x.to(dtype) for x in teachers], *others)
        slopes = torch.autograd.grad(loss, leaves)
        if dtype == torch.float32:
            slopes = tuple(x.to(students[0].dtype) for x in slopes)
        wanted.append((loss.detach(), parts, rows.detach(), *slopes))
    loss, parts, rows = hidden_match_forward("emulated", students, teachers, *others)
    again, parts_again, flat = hidden_match_grad("emulated", students, teachers, *others)
    assert torch.equal(loss, again) and torch.equal(parts, parts_again)
    grads = _split(flat, [x.shape for x in students], gradient_offsets(students))
    got = (loss, parts, rows, *grads)
    for actual, wide, same in zip(got, *wanted, strict=True):
        assert_within_budget(actual, wide, same, actual.dtype)
    if mask is not None:
        assert all((x[~mask] == 0).all() for x in (rows, *grads))
    return got


@emulated
@pytest.mark.parametrize("kind", list(Kind), ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts_in_one_launch(kind: Kind, dtype: torch.dtype) -> None:
    """Every number of warps a row, and more columns than registers hold, aligned and not."""
    torch.manual_seed(int(kind))
    scale = 4 // dtype.itemsize
    widths = [n * scale for n in (8, 156, 516, 1028, 2052, 4096, 4100, 9000)]
    widths += [3, 157 * scale + 1, 4100 * scale + 1]
    rows = 5  # no multiple of the rows of a block
    students = [states(rows, width, dtype) for width in widths]
    teachers = [states(rows, width, dtype) for width in widths]
    mask = torch.tensor([True, False, True, True, False])
    for x in students:
        x[~mask] = torch.nan
    row_weights = torch.rand(rows)
    row_weights[1] = torch.nan  # of a row that does not count
    weights = [0.25 * (layer + 1) for layer in range(len(widths))]
    spec = Spec(int(kind), 0.7, True)
    check(students, teachers, mask, row_weights, None, weights, spec)
    check(students, teachers, mask, None, torch.tensor(3.0), weights, spec)


@emulated
@pytest.mark.parametrize("kind", list(Kind), ids=lambda k: k.name)
@pytest.mark.parametrize(
    ("student", "teacher", "stride", "width"),
    [
        (0, 0, 264, 264),
        (3, 3, 264, 264),  # off the boundaries alike: the gradient is not
        (3, 5, 264, 264),
        (0, 1, 264, 264),
        (0, 0, 271, 264),  # each row otherwise
        (0, 0, 272, 261),
        (1, 1, 2051, 2049),
    ],
)
def test_rows_off_the_boundaries(
    kind: Kind, student: int, teacher: int, stride: int, width: int
) -> None:
    torch.manual_seed(width)
    for dtype in (torch.bfloat16, torch.float32):
        s = states(3, width, dtype, shift=student, stride=stride)
        t = states(3, width, dtype, shift=teacher, stride=stride)
        check([s], [t], None, None, None, [1.0], Spec(int(kind), 0.5, True))


@emulated
def test_more_layers_than_a_launch_takes() -> None:
    torch.manual_seed(0)
    count = 2 * MOST_LAYERS + 5
    widths = [8 + 8 * (layer % 5) for layer in range(count)]
    students = [states(3, width, torch.bfloat16) for width in widths]
    teachers = [states(3, width, torch.bfloat16) for width in widths]
    weights = torch.rand(count).tolist()
    mask = torch.tensor([True, False, True])
    for kind in (Kind.SMOOTH_L1, Kind.PKD):
        check(students, teachers, mask, None, None, weights, Spec(int(kind), 0.5, True))


@emulated
@pytest.mark.parametrize("kind", [Kind.MSE, Kind.PKD], ids=lambda k: k.name)
def test_order_of_threads_changes_no_bit(kind: Kind) -> None:
    torch.manual_seed(1)
    widths = [24, 2056, 4096, 8264, 515]
    students = [states(5, width, torch.bfloat16) for width in widths]
    teachers = [states(5, width, torch.bfloat16) for width in widths]
    weights = torch.rand(len(widths)).tolist()
    results = []
    for seed in (*SEEDS, 5, 6, 7):
        with backend.device(seed=seed):
            results.append(
                check(students, teachers, None, None, None, weights, Spec(int(kind), 0.5))
            )
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@emulated
def test_equal_states_have_no_loss_and_rows_of_zeros_no_direction() -> None:
    torch.manual_seed(2)
    for width in (264, 4096, 8264):
        s = states(4, width, torch.float32)
        for kind in Kind:
            spec = Spec(int(kind), 0.5, True)
            args = (None, None, None, [1.0], spec)
            loss, _, grad = hidden_match_grad("emulated", [s], [s.clone()], *args)
            assert loss == 0 and (grad[: s.numel()] == 0).all()
        t = states(4, width, torch.float32)
        t[1], s[2] = 0.0, 0.0
        for kind in (Kind.COSINE, Kind.PKD):
            got = check([s], [t], None, None, None, [1.0], Spec(int(kind), 0.5, True))
            assert (got[2][1:3] == 0).all() and (got[3][1:3] == 0).all()


@emulated
@pytest.mark.parametrize("kind", list(Kind), ids=lambda k: k.name)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_states_that_nearly_agree(kind: Kind, size: float) -> None:
    """The gradient is a small difference of large terms, and no error of a norm may show in it."""
    torch.manual_seed(0)
    for width in (261, 4096, 8264):
        for apart in (1e-2, 1e-4, 1e-6):
            s = states(3, width, torch.float32) * size
            t = s * (1 + apart * torch.randn(3, width))
            check([s], [t], None, None, None, [1.0], Spec(int(kind), 0.5, True))


@emulated
@pytest.mark.parametrize("rows", [0, 1, 2, 1030])
def test_numbers_of_rows(rows: int) -> None:
    torch.manual_seed(rows)
    students, teachers = ([states(rows, 16, torch.float32) for _ in range(2)] for _ in range(2))
    for mask in (None, torch.zeros(rows, dtype=torch.bool), torch.rand(rows) < 0.5):
        spec = Spec(Kind.COSINE, mean=True)
        check(students, teachers, mask, None, None, [0.5, 2.0], spec)


@emulated
def test_a_gpu_without_clusters() -> None:
    torch.manual_seed(3)
    s, t = (states(3, 4100, torch.float16) for _ in range(2))
    with backend.device(major=8, shared=48 * 1024):
        check([s], [t], None, None, None, [1.0], Spec(Kind.COSINE))


@emulated
def test_dtypes_must_be_one() -> None:
    s, t = states(2, 8, torch.bfloat16), states(2, 8, torch.float32)
    with pytest.raises(RuntimeError, match="teachers must have the dtype of students, got dtype"):
        hidden_match_forward("emulated", [s], [t], None, None, None, [1.0], Spec())
