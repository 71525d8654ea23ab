"""``gate_scores`` against gradients of explicit gates and its reference, over every backend."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulation import backend as emulation
from helpers.backends import Backend
from helpers.budget import assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdkernels
from kdkernels.ops.gate_scores import gate_scores as op_gate_scores
from kdkernels.ops.gate_scores import unsupported
from kdkernels.ops.gate_scores.op import gate_scores_forward
from kdkernels.ops.gate_scores.reference import gate_scores_reference

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensors(rows: int, columns: int, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    return [torch.randn(rows, columns).to(dtype) for _ in range(count)]


def check(
    backend: Backend,
    given: Sequence[Tensor],
    width: int = 1,
    examples: int = 1,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """The scores, found to be right; tensors are moved as they are, with their strides."""
    activation, *grads = given
    found = op_gate_scores(
        *(_moved(activation, backend), [_moved(x, backend) for x in grads]),
        None if mask is None else mask.to(backend.device),
        width,
        examples,
        backend=backend.name,
    )
    wide = torch.float64 if activation.dtype == torch.float64 else torch.float32
    others = (mask, width, examples)
    terms = activation.shape[0] // examples * width  # of a sum, which may cancel
    oracle = gate_scores_reference(activation.double(), [x.double() for x in grads], *others)
    same = gate_scores_reference(activation, grads, *others)
    for actual, right, alike in zip(found, oracle, same, strict=True):
        assert actual.shape == (activation.shape[1] // width,) and actual.dtype == wide
        assert_within_budget(actual, right, alike, wide, unit=terms**0.5)
    return found


def _moved(x: Tensor, backend: Backend) -> Tensor:
    if x.device.type == backend.device:
        return x
    size = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1
    flat = x.as_strided((size,), (1,)).to(backend.device)
    return flat.as_strided(x.shape, x.stride())


# Rows, columns, width, examples.
SHAPES = [
    (1, 1, 1, 1),
    (7, 5, 1, 1),
    (6, 24, 8, 3),
    (12, 33, 3, 12),  # an example a row, odd rows
    (150, 264, 1, 1),  # more than a piece of rows on the CPU; tiles of columns
    (260, 40, 20, 2),  # the same in each example
    (70, 300, 100, 5),  # wider than a warp
    (2, 2600, 1300, 1),  # a group wider than a strip of columns
    (3, 1100, 1, 3),  # more than a strip
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    if dtype not in backend.dtypes:
        pytest.skip("the GPU kernels take float32, bfloat16 and float16, not float64")
    rows, columns, width, examples = shape
    activation, *grads = tensors(rows, columns, dtype)
    first, second = check(backend, [activation, *grads], width, examples)
    for grad, of_pair in zip(grads, (first, second), strict=True):
        (alone,) = check(backend, [activation, grad], width, examples)
        if backend.name != "triton":  # whose last sums are PyTorch's
            assert torch.equal(alone, of_pair)
    check(backend, [activation, *grads], width, examples, torch.rand(rows) < 0.7)


def test_long_sums_keep_their_digits(backend: Backend) -> None:
    """Terms of one sign, of which a running float32 sum would lose the last digits."""
    check(backend, [torch.rand(5000, 8) + 0.5 for _ in range(2)])


# ---- gates ---------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """Self-attention and a feed-forward layer, with gates on heads and neurons."""

    def __init__(self, hidden: int = 12, heads: int = 3, neurons: int = 20) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(hidden, 3 * hidden)
        self.out = torch.nn.Linear(hidden, hidden)
        self.up, self.down = torch.nn.Linear(hidden, neurons), torch.nn.Linear(neurons, hidden)
        self.classify = torch.nn.Linear(hidden, 2)

    def forward(
        self, x: Tensor, keep: Tensor, head_gates: Tensor, neuron_gates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``[batch]`` sizes of gates, so that each example has gradients of its own."""
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])
        context = context.transpose(1, 2).flatten(2)
        gated = context.unflatten(-1, (self.heads, -1)) * head_gates[:, None, :, None]
        x = x + self.out(gated.flatten(2))
        neurons = F.gelu(self.up(x))
        x = x + self.down(neurons * neuron_gates[:, None])
        return self.classify(x[:, 0]), context, neurons


@pytest.mark.parametrize("per", ["batch", "example"])
def test_equals_gradients_of_gates(backend: Backend, per: str) -> None:
    dtype = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    block, x = Block().double(), torch.randn(4, 6, 12, dtype=torch.float64)
    keep = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    gates = [torch.ones(4, n, dtype=torch.float64, requires_grad=True) for n in (3, 20)]
    logits, context, neurons = block(x, keep, *gates)
    losses = [F.cross_entropy(logits, torch.tensor([0, 1, 1, 0])), logits.softmax(-1)[:, 1].sum()]
    for i, (width, states) in enumerate(((4, context), (1, neurons))):
        grads = [torch.autograd.grad(loss, states, retain_graph=True)[0] for loss in losses]
        cast = [y.detach().to(backend.device, dtype) for y in (states, *grads)]
        options: dict[str, Any] = {"width": width, "per": per, "backend": backend.name}
        pair = kdkernels.gate_scores(cast[0], cast[1:], **options)
        alone = kdkernels.gate_scores(cast[0], cast[2], **options)
        for scores, loss in zip((*pair, alone), (*losses, losses[1]), strict=True):
            of_gates = torch.autograd.grad(loss, gates[i], retain_graph=True)[0]
            right = of_gates.sum(0).abs() if per == "batch" else of_gates.abs().sum(0)
            assert_within_budget(scores, right, right.to(dtype), dtype, unit=1.0)


def test_examples_and_the_batch_differ(backend: Backend) -> None:
    """Gradients of opposite examples cancel in the batch's only."""
    half = torch.randint(-8, 9, (1, 5, 6)).float().to(backend.device)  # exact sums
    activation, grad = torch.cat((half, half)), torch.cat((half, -half))
    options = {"width": 3, "backend": backend.name}
    assert not kdkernels.gate_scores(activation, grad, **options).any()
    scores = kdkernels.gate_scores(activation, grad, per="example", **options)
    right = 2 * half.double().square().sum((0, 1)).view(2, 3).sum(1)
    assert_within_budget(scores, right, right.float(), torch.float32)
    with torch.no_grad():  # a row is an example where there is nothing else
        rows = kdkernels.gate_scores(activation[:, 0], grad[:, 0], per="example", **options)
        assert (rows > 0).all()


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_masked_is_not_read(backend: Backend, dtype: torch.dtype) -> None:
    activation, *grads = tensors(40, 24, dtype)
    mask = torch.rand(40) < 0.5
    mask[20:30] = False  # all of an example
    for x in (activation, *grads):
        x[~mask] = NAN
    zeros = [torch.where(mask[:, None], x, 0.0) for x in (activation, *grads)]
    found = check(backend, zeros, 8, 4)
    given = [x.to(backend.device).view(4, 10, 24) for x in (activation, *grads)]
    for form in (mask.view(4, 10), mask.view(4, 10).long()):
        scores = kdkernels.gate_scores(
            given[0],
            given[1:],
            width=8,
            per="example",
            mask=form.to(backend.device),
            backend=backend.name,
        )
        for a, b in zip(scores, found, strict=True):
            assert_within_budget(a, b.double(), b, torch.float32)
    none = torch.zeros_like(mask).to(backend.device)
    scores = op_gate_scores(
        given[0].flatten(0, 1), [given[1].flatten(0, 1)], none, 1, 1, backend=backend.name
    )
    assert not scores[0].any()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_layouts(backend: Backend, dtype: torch.dtype) -> None:
    """Slices of columns on and off the boundaries of vectors, rows apart, columns apart."""
    wide = torch.randn(18, 80).to(dtype)
    for columns in (slice(16, 64), slice(5, 53), slice(0, 48)):
        activation, first = wide[::2, columns], torch.randn(9, 48).to(dtype)
        second = torch.randn(48, 9).to(dtype).t()
        check(backend, [activation, first, second], 12, 3)
        check(backend, [first, activation], 12, 3)
    row = torch.randn(1, 48).to(dtype).expand(9, 48)
    check(backend, [wide[:9, :48], row, torch.randn(9, 1).to(dtype).expand(9, 48)], 1, 3)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 3, 8)])
@pytest.mark.parametrize("per", ["batch", "example"])
def test_no_rows(backend: Backend, per: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=backend.device)
    scores = kdkernels.gate_scores(x, (x, x), width=4, per=per, backend=backend.name)
    assert all(y.tolist() == [0.0, 0.0] for y in scores)


def test_not_finite(backend: Backend) -> None:
    activation, grad = tensors(40, 6, torch.float32, 2)
    activation[3, 1], activation[5, 2] = NAN, float("inf")
    (scores,) = op_gate_scores(
        activation.to(backend.device), [grad.to(backend.device)], None, 1, 1, backend=backend.name
    )
    assert scores.isnan().tolist() == [False, True, False, False, False, False]
    assert scores[2] == float("inf")


# ---- the scores ----------------------------------------------------------------------------------


def test_accumulates(backend: Backend) -> None:
    activation, *grads = (x.to(backend.device) for x in tensors(12, 8, torch.bfloat16))
    options = {"width": 2, "backend": backend.name}
    found = kdkernels.gate_scores(activation, grads, **options)
    before = [torch.rand(4, device=backend.device) for _ in range(2)]
    scores = [x.clone() for x in before]
    again = kdkernels.gate_scores(activation, grads, accumulate_into=scores, **options)
    assert all(a is b for a, b in zip(again, scores, strict=True))
    assert all(torch.equal(s, b + f) for s, b, f in zip(scores, before, found, strict=True))
    whole = torch.zeros(3, 4, device=backend.device)  # of three layers: a row of a table
    out = kdkernels.gate_scores(activation, grads[0], accumulate_into=whole[1], **options)
    assert out.data_ptr() == whole[1].data_ptr() and torch.equal(whole[1], found[0])
    assert not whole[0].any() and not whole[2].any()


def test_same_bits_again(backend: Backend) -> None:
    given = tensors(300, 40, torch.float32)
    first = check(backend, given, 4, 2)
    threads = torch.get_num_threads()
    try:
        for seed in range(3):
            torch.set_num_threads(1 + seed % 2)
            if backend.name == "emulated":  # any order of threads
                with emulation.device(seed=seed):
                    again = check(backend, given, 4, 2)
            else:
                again = check(backend, given, 4, 2)
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
    sizes=st.tuples(*(st.integers(1, n) for n in (4, 30, 12, 10))),
    count=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES[:3]),
    masked=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(
    backend: Backend,
    sizes: tuple[int, int, int, int],
    count: int,
    dtype: torch.dtype,
    masked: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    examples, rows, groups, width = sizes
    given = tensors(examples * rows, groups * width, dtype, 1 + count)
    check(backend, given, width, examples, torch.rand(examples * rows) < 0.5 if masked else None)


# ---- operators, torch.compile --------------------------------------------------------------------


def test_opcheck(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is no operator")
    for dtype, masked in ((torch.float32, True), (torch.bfloat16, False)):
        activation, *grads = (x.to(backend.device) for x in tensors(6, 12, dtype))
        mask = torch.ones(6, dtype=torch.bool, device=backend.device) if masked else None
        call = (activation, grads, mask, 3, 2)
        torch.library.opcheck(gate_scores_forward.overload(backend.name), call)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend: Backend, dynamic: bool) -> None:
    torch._dynamo.reset()

    def call(activation: Tensor, grads: list[Tensor], into: Tensor) -> Tensor:
        kdkernels.gate_scores(
            activation, grads[0], width=3, accumulate_into=into, backend=backend.name
        )
        first, second = kdkernels.gate_scores(
            activation * 2.0, grads, width=3, per="example", backend=backend.name
        )
        return first + second + into

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for examples in (3, 5):
        activation, *grads = torch.randn(3, examples, 4, 12).to(backend.device).unbind(0)
        into = torch.ones(2, 4, device=backend.device)
        found, plain = compiled(activation, grads, into[0]), call(activation, grads, into[1])
        assert torch.equal(found, plain) and torch.equal(into[0], into[1])


def test_transforms_take_the_reference() -> None:
    x = torch.randn(3, 4, 6)
    found = torch.func.vmap(lambda y: kdkernels.gate_scores(y, y, width=2))(x)
    right = torch.stack([kdkernels.gate_scores(y, y, width=2) for y in x])
    assert_within_budget(found, right.double(), right, torch.float32)


def test_inside_of_a_backward_pass() -> None:
    """As it is used: in a hook, where tensors of the graph require grad."""
    layer, scores = torch.nn.Linear(6, 8), torch.zeros(8)
    hidden = layer(torch.randn(5, 6)).relu()

    def hook(grad: Tensor) -> None:
        kdkernels.gate_scores(hidden, grad, accumulate_into=scores)

    hidden.register_hook(hook)
    hidden.square().sum().backward()
    right = 2 * hidden.detach().double().square().sum(0)
    assert_within_budget(scores, right, right.float(), torch.float32)


# ---- refusals ------------------------------------------------------------------------------------

A = torch.zeros(4, 6)
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"activation": A[0, 0]}, ValueError, r"activation must be \[..., groups \* width\], got"),
    ({"activation": A.long(), "grads": A.long()}, TypeError, "activation must be float32, bfloat"),
    ({"activation": [A]}, TypeError, "activation must be a Tensor, got list"),
    ({"grads": A[:, :3]}, ValueError, r"grads must have the shape of activation \[4, 6\], got \["),
    ({"grads": (A, A, A)}, ValueError, "grads must be a tensor or a pair, got 3 tensors"),
    ({"grads": (A, 1.0)}, TypeError, "grads must be tensors, got float"),
    ({"grads": A.half()}, TypeError, r"grads\[0\] must have the dtype of activation torch.float32"),
    ({"grads": A.to("meta")}, ValueError, r"grads\[0\] must be on cpu, got meta"),
    ({"width": 4}, ValueError, "width must divide the 6 columns, got 4"),
    ({"width": 0}, ValueError, "width must divide the 6 columns, got 0"),
    ({"width": 1.5}, TypeError, "width must be an int, got float"),
    ({"per": "token"}, ValueError, "per must be one of batch, example, got 'token'"),
    ({"mask": torch.ones(3)}, ValueError, r"mask must have the leading shape of activation \[4\]"),
    ({"accumulate_into": A[0, :3]}, ValueError, r"accumulate_into must be \[6\], got shape \[3\]"),
    ({"accumulate_into": A[0].half()}, TypeError, "accumulate_into must be float32, got float16"),
    ({"accumulate_into": (A[0], A[1])}, ValueError, "one gradient and a pair for a pair, got 2"),
    ({"activation": A.clone().requires_grad_()}, ValueError, "activation must not require grad"),
    ({"grads": A.clone().requires_grad_()}, ValueError, r"grads\[0\] must not require grad"),
    ({"backend": "fast"}, ValueError, "backend must be one of native, triton, reference"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"activation": A, "grads": A, **change}
    with pytest.raises(error, match=f"gate_scores: .*{message}"):
        kdkernels.gate_scores(call.pop("activation"), call.pop("grads"), **call)


def test_the_op_and_the_kernels_check_for_themselves(backend: Backend) -> None:
    with pytest.raises(ValueError, match="examples must divide the 4 rows, got 3"):
        op_gate_scores(A, [A], None, 1, 3)
    with pytest.raises(ValueError, match="grads must be one or two tensors, got 0"):
        op_gate_scores(A, [], None, 1, 1)
    with pytest.raises(ValueError, match="accumulate_into must have a tensor for each of the 1"):
        op_gate_scores(A, [A], None, 1, 1, accumulate_into=[])
    assert "float64" in str(unsupported("triton", A.double()))
    if backend.name not in ("native", "emulated"):
        pytest.skip("only compiled kernels are handed unchecked tensors")
    x = A.to(backend.device)
    for call, message in (
        ((x, [x, x, x], None, 1, 1), "grads must be one or two tensors, got 3"),
        ((x, [x[:, :5]], None, 1, 1), r"grads must have shape and dtype of activation, \[4, 6\]"),
        ((x, [x.half()], None, 1, 1), "grads must have shape and dtype of activation"),
        ((x, [x], None, 4, 1), "width must divide the 6 columns, got 4"),
        ((x, [x], None, 1, 0), "examples must divide the 4 rows, got 0"),
        ((x, [x], torch.ones(3, dtype=torch.bool, device=x.device), 1, 1), "mask must be contig"),
        ((x.t(), [x.t()], None, 1, 1), "activation must have unit column stride, got 6"),
        ((x.long(), [x.long()], None, 1, 1), "activation must be float32, bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            gate_scores_forward(backend.name, *call)


def test_examples_in_docstrings_run() -> None:
    # By name: as an attribute of its package the function stands before the module.
    found = doctest.testmod(sys.modules["kdkernels.api.gate_scores"])
    assert found.attempted > 5 and found.failed == 0
