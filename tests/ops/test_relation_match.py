"""``relation_match`` against its reference, over every backend, and its API against the papers."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.backends import Backend
from helpers.budget import assert_same_direction, assert_within_budget
from torch import Tensor

import kdkernels
from kdkernels import attention_match_loss, relation_match_loss
from kdkernels.api import relations
from kdkernels.ops.relation_match import Kind, Spec, relation_match, relation_match_rows, tiles
from kdkernels.ops.relation_match.op import relation_match_forward, relation_match_grad

NAN = float("nan")
KINDS = [Kind.KL, Kind.MSE]


@pytest.fixture(autouse=True)
def _packs_short_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other backends cover what is done where packing does not pay."""
    monkeypatch.setattr(tiles, "_SCORES_SAVED", 0)


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


class Problem:
    """Float64 queries and keys of two models; padding is NaN."""

    def __init__(
        self, batch: int = 2, heads: int = 2, seq: int = 7, width: int = 4, *, keys: int | None = 2,
        teacher_heads: int = 2, teacher_keys: int | None = 2, teacher_width: int = 4,
        mask: Tensor | None = None, head_map: list[int] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def normal(heads: int | None, width: int) -> Tensor | None:
            """``None``: the keys are the queries."""
            if heads is None:
                return None
            x = 1.5 * torch.randn((batch, heads, seq, width), generator=g, dtype=torch.float64)
            return x if mask is None else x.masked_fill(~mask[:, None, :, None], NAN)

        self.student = normal(heads, width), normal(keys, width)
        self.teacher = normal(teacher_heads, teacher_width), normal(teacher_keys, teacher_width)
        self.mask, self.head_map = mask, head_map
        self.row_weights: Tensor | None = None
        self.denominator: Tensor | None = None

    def run(
        self, backend: str, device: str, dtype: torch.dtype, spec: Spec, *, wide: bool = False,
        rows: bool = False, teacher_dtype: torch.dtype | None = None, tile_bytes: int | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Loss (or rows) and gradients; ``wide``: the values of ``dtype``, in float64."""

        def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return (
                None if x is None else x.to(dtype).to(torch.float64 if wide else dtype).to(device)
            )

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        leaves = [cast(x, dtype) for x in self.student]
        leaves = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
        teacher = [cast(x, teacher_dtype or dtype) for x in self.teacher]
        args = (tuple(leaves), tuple(teacher), move(self.mask), move(self.row_weights))
        options: dict[str, Any] = {
            "head_map": self.head_map, "tile_bytes": tile_bytes, "backend": backend,
        }  # fmt: skip
        if rows:
            value = relation_match_rows(*args, spec, **options)
            upstream = torch.linspace(-1, 2, value.numel(), device=device).view(value.shape)
            value.backward(upstream.to(value))
        else:
            value = relation_match(*args, move(self.denominator), spec, **options)
            value.backward()
        return [value.detach(), *(x.grad for x in leaves if x is not None)]

    def check(
        self, backend: Backend, spec: Spec, dtype: torch.dtype = torch.float32, **options: Any
    ) -> list[Tensor]:
        """Loss and gradients are within the budget; returns them."""
        tile_bytes = options.pop("tile_bytes", None)
        actual = self.run(
            backend.name, backend.device, dtype, spec, tile_bytes=tile_bytes, **options
        )
        oracle = self.run("reference", "cpu", dtype, spec, wide=True, **options)
        same = self.run("reference", "cpu", dtype, spec, **options)
        for a, o, s in zip(actual, oracle, same, strict=True):
            assert a.dtype == s.dtype and a.shape == s.shape
            assert_within_budget(a, o, s, a.dtype)
        return actual


def padded(*lengths: int, seq: int = 7) -> Tensor:
    """Examples of these lengths."""
    return torch.arange(seq)[None] < torch.tensor(lengths)[:, None]


MASKS = ["padded", "holes", "an empty example", "nothing"]
HOLES = padded(7, 4).logical_and(torch.tensor([1, 0, 1, 1, 1, 0, 1]).bool())


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_matches_reference(backend: Backend, kind: Kind, dtype: torch.dtype, rows: bool) -> None:
    spec = Spec(int(kind), 0.5, 0.4, mean=True)
    Problem().check(backend, spec, dtype, rows=rows)
    # As MiniLM has them: the keys are the queries.
    Problem(keys=None, teacher_keys=None).check(backend, spec, dtype, rows=rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [padded(7, 4), HOLES, padded(0, 3), padded(0, 0)], ids=MASKS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_masks(backend: Backend, kind: Kind, mask: Tensor, causal: bool) -> None:
    spec = Spec(int(kind), 0.5, 0.5, causal=causal, mean=True)
    for rows in (False, True):
        actual = Problem(mask=mask).check(backend, spec, rows=rows)
        if not mask.any():
            assert all((x == 0).all() for x in actual)
        for grad in actual[1:]:
            assert (grad.cpu()[~mask[:, None].expand(2, 2, 7)] == 0).all()
        if rows:
            assert (actual[0].cpu()[~mask[:, None].expand(2, 2, 7)] == 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_causal(backend: Backend, kind: Kind) -> None:
    spec = Spec(int(kind), 0.5, 0.5, causal=True, mean=True)
    Problem().check(backend, spec, rows=True)
    Problem(keys=None, teacher_keys=None).check(backend, spec, tile_bytes=8 * 7 * 3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_packing_changes_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    native = Backend("native", "cpu")
    if "native" not in kdkernels.available_backends("relation_match"):
        pytest.skip("the native library was not built")
    mask = torch.arange(7) < torch.tensor([[3], [7], [0]])
    spec = Spec(int(kind), 0.5, 0.5, mean=True)
    problem = Problem(3, mask=mask)
    packed = problem.check(native, spec, rows=True)
    monkeypatch.setattr(tiles, "_SCORES_SAVED", 10**9)
    masked = problem.check(native, spec, rows=True)
    for a, b in zip(packed, masked, strict=True):
        assert_within_budget(a, b, b, torch.float32)


def test_causal_tiles_end_at_their_last_query() -> None:
    """More queries than a causal tile has: the keys of a tile differ."""
    native = Backend("native", "cpu")
    if "native" not in kdkernels.available_backends("relation_match"):
        pytest.skip("the native library was not built")
    for kind in KINDS:
        spec = Spec(int(kind), 0.2, 0.2, causal=True, mean=True)
        Problem(1, 2, 300, 8, teacher_width=8).check(native, spec)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_heads_and_widths(backend: Backend, kind: Kind) -> None:
    spec = Spec(int(kind), 0.5, 0.3, mean=True)
    grouped = {"heads": 4, "keys": 2, "teacher_heads": 6, "teacher_keys": 3, "teacher_width": 5}
    problem = Problem(**grouped, head_map=[5, 0, 0, 3], seq=5)
    problem.check(backend, spec)
    problem.check(backend, spec, rows=True, tile_bytes=200)
    problem = Problem(heads=4, keys=1, teacher_heads=4, teacher_keys=4, teacher_width=1, seq=5)
    problem.check(backend, spec)


# A head of one example has 8 * 7 * 7 bytes: of one query, of several, of one head, of several
# examples.
@pytest.mark.parametrize("tile_bytes", [1, 8 * 7 * 3, 8 * 7 * 7, 8 * 7 * 7 * 3, 8 * 7 * 7 * 4])
@pytest.mark.parametrize("mask", [None, padded(7, 7, 5)], ids=["whole", "padded"])
def test_tiles(backend: Backend, tile_bytes: int, mask: Tensor | None) -> None:
    for kind in KINDS:
        spec = Spec(int(kind), 0.5, 0.5, mean=True)
        problem = Problem(3, mask=mask)
        problem.row_weights = torch.linspace(0, 1, 21).view(3, 7)
        # Rows and the gradient for theirs: tiles of both primitives.
        problem.check(backend, spec, tile_bytes=tile_bytes, rows=True)
        if not backend.interpreted:
            problem.check(backend, spec, tile_bytes=tile_bytes)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_edges(backend: Backend, kind: Kind) -> None:
    spec = Spec(int(kind), 0.5, 0.5, mean=True)
    Problem(seq=1).check(backend, spec)
    Problem(1, 1, 1, 1, keys=1, teacher_heads=1, teacher_keys=1, teacher_width=1).check(
        backend, spec._replace(causal=True)
    )
    for shape in ((0, 2, 7), (2, 2, 0)):  # no examples, no tokens
        actual = Problem(*shape).check(backend, spec)
        assert actual[0] == 0 and actual[1].numel() == 0


def test_mixed_dtypes(backend: Backend) -> None:
    for kind in KINDS:
        spec = Spec(int(kind), 0.5, 0.5, mean=True)
        for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
            Problem().check(backend, spec, dtypes[0], teacher_dtype=dtypes[1])


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_weights_and_denominator(backend: Backend, kind: Kind) -> None:
    problem = Problem(mask=HOLES)
    problem.row_weights = torch.linspace(-1, 2, 14).view(2, 7)
    problem.row_weights[~HOLES] = NAN
    spec = Spec(int(kind), 0.5, 0.5)
    problem.check(backend, spec)
    for value in (3.0, 0.0):  # 0 counts as 1
        problem.denominator = torch.tensor(value)
        problem.check(backend, spec._replace(mean=True))


def test_equal_models_give_zero(backend: Backend) -> None:
    for kind in KINDS:
        problem = Problem(mask=HOLES)
        problem.teacher = problem.student
        loss, *grads = problem.run(
            backend.name, backend.device, torch.float32, Spec(int(kind), mean=True)
        )
        assert loss == 0
        assert all((grad == 0).all() for grad in grads) or backend.name == "reference"


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_direction_of_the_gradient(backend: Backend, kind: Kind) -> None:
    problem, spec = Problem(seed=3), Spec(int(kind), 0.5, 0.5, mean=True)
    actual = problem.run(backend.name, backend.device, torch.float32, spec)
    oracle = problem.run("reference", "cpu", torch.float32, spec, wide=True)
    for a, o in zip(actual[1:], oracle[1:], strict=True):
        assert_same_direction(a, o, torch.float32)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("same", [False, True])
def test_gradcheck_of_the_reference(kind: Kind, same: bool) -> None:
    problem = Problem(1, 2, 4, 3, teacher_width=3, mask=padded(3, seq=4))
    spec = Spec(int(kind), 0.5, 0.5, causal=True, mean=True)
    q, k = (torch.nan_to_num(x).requires_grad_() for x in problem.student)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        student = (q, None if same else k)
        return relation_match(
            student, problem.teacher, problem.mask, None, None, spec, backend="reference"
        )

    assert torch.autograd.gradcheck(loss, (q, k))
    if not same:
        assert torch.autograd.gradgradcheck(loss, (q, k))


def test_keys_that_are_the_queries_get_one_gradient(backend: Backend) -> None:
    """``None`` for keys is the same as the queries given twice."""
    g = torch.Generator().manual_seed(1)
    x, t = (torch.randn((2, 3, 5, 4), generator=g).to(backend.device) for _ in range(2))
    for kind in KINDS:
        found = []
        for twice in (False, True):
            leaf = x.clone().requires_grad_()
            student = (leaf, leaf if twice else None)
            loss = relation_match(
                student, (t, None), None, None, None, Spec(int(kind)), backend=backend.name
            )
            loss.backward()
            found.append((loss.detach(), leaf.grad))
        for once, both in zip(*found, strict=True):
            assert_within_budget(once, both.double(), both, torch.float32)


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_one_gradient_is_wanted(backend: Backend, wanted: int) -> None:
    problem = Problem()
    tensors = [x.float().to(backend.device) for x in problem.student]
    teacher = tuple(x.float().to(backend.device) for x in problem.teacher)
    expected = problem.run(backend.name, backend.device, torch.float32, Spec())
    tensors[wanted].requires_grad_()
    relation_match(
        tuple(tensors), teacher, None, None, None, Spec(), backend=backend.name
    ).backward()
    assert torch.equal(tensors[wanted].grad, expected[1 + wanted])
    assert tensors[1 - wanted].grad is None
    with torch.no_grad():
        loss = relation_match(
            tuple(tensors), teacher, None, None, None, Spec(), backend=backend.name
        )
    assert not loss.requires_grad
    assert_within_budget(loss, expected[0].double(), expected[0], torch.float32)


def test_noncontiguous(backend: Backend) -> None:
    """Views of one projection, as models make them; their gradient has the layout of the view."""
    device = backend.device
    qkv, teacher = torch.randn(2, 5, 3, 2, 4), torch.randn(2, 5, 3, 2, 4).to(device)

    def run(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        q, k, _ = (y.transpose(1, 2) for y in x.unbind(2))
        t = teacher.to(x.device, x.dtype)
        tq, tk, _ = (y.transpose(1, 2) for y in t.unbind(2))
        mask = padded(5, 3, seq=5).to(x.device)
        loss = relation_match((q, k), (tq, tk), mask, None, None, Spec(mean=True), backend=name)
        loss.backward()
        return loss.detach(), x.grad

    actual = run(qkv.to(device), backend.name)
    oracle, same = run(qkv.double(), "reference"), run(qkv, "reference")
    for a, o, s in zip(actual, oracle, same, strict=True):
        assert_within_budget(a, o, s, torch.float32)
    # Memory that overlaps itself, and heads apart.
    x = torch.randn(1, 1, 5, 4).to(device).expand(2, 3, 5, 4)
    relation_match((x, x.flip(1)), (x, None), None, None, None, Spec(), backend=backend.name)
    x = x.detach().requires_grad_()
    relation_match(
        (x, None), (x.detach() * 2, None), None, None, None, Spec(), backend=backend.name
    ).backward()
    assert x.grad.shape == (2, 3, 5, 4) and torch.isfinite(x.grad).all()


def test_upstream_factors(backend: Backend) -> None:
    """A factor, a graph that is kept, and float16 with a loss scale that its gradients need."""
    problem, spec = Problem(), Spec(int(Kind.KL), 0.5, 0.5, mean=True)
    q, k = (x.float().to(backend.device).requires_grad_() for x in problem.student)
    teacher = tuple(x.float().to(backend.device) for x in problem.teacher)
    loss = relation_match((q, k), teacher, None, None, None, spec, backend=backend.name)
    once = torch.autograd.grad(loss, (q, k), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (q, k))
    for a, b in zip(once, thrice, strict=True):
        assert_within_budget(b, 3 * a.double(), 3 * a, torch.float32)
    half = q.detach().half().requires_grad_()
    small = torch.tensor(2.0**24, device=backend.device)
    loss = relation_match(
        (half, None), (teacher[0].half(), None), None, None, small, spec, backend=backend.name
    )
    (loss * 2.0**20).backward()
    lost = (half.grad == 0).float().mean()
    assert lost < 0.01


def test_create_graph_is_refused(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference has second derivatives")
    q = torch.randn(1, 1, 3, 2, device=backend.device, requires_grad=True)
    loss = relation_match(
        (q, None), (q.detach(), None), None, None, None, Spec(), backend=backend.name
    )
    with pytest.raises(RuntimeError, match="backend must be 'reference' for create_graph=True"):
        torch.autograd.grad(loss, q, create_graph=True)


def test_same_bits_again(backend: Backend) -> None:
    for kind in KINDS:
        problem, spec = Problem(mask=HOLES), Spec(int(kind), 0.5, 0.5, mean=True)
        first = problem.run(backend.name, backend.device, torch.float32, spec, tile_bytes=200)
        again = problem.run(backend.name, backend.device, torch.float32, spec, tile_bytes=200)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_autocast_changes_nothing() -> None:
    """What is float32 is multiplied in float32."""
    problem, spec = Problem(), Spec(mean=True)
    (name, *_) = kdkernels.available_backends("relation_match")
    plain = problem.run(name, "cpu", torch.float32, spec)
    with torch.autocast("cpu", torch.bfloat16):
        inside = problem.run(name, "cpu", torch.float32, spec)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_a_teacher_of_inference_mode(backend: Backend) -> None:
    with torch.inference_mode():
        teacher = torch.randn(2, 5, 8, device=backend.device)
    student = torch.randn(2, 5, 8, device=backend.device, requires_grad=True)
    for reduction in ("mean", "none"):
        loss = relation_match_loss(
            student, teacher, num_relation_heads=2, reduction=reduction, backend=backend.name
        )
        loss.sum().backward()
    assert torch.isfinite(student.grad).all()


# ---- operators, torch.compile --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_opcheck(backend: Backend, kind: Kind) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is no operator")
    problem = Problem(mask=HOLES)
    for dtype in (torch.float32, torch.float16)[: 1 if backend.interpreted else 2]:
        tensors = [
            x.nan_to_num().to(backend.device, dtype) for x in (*problem.student, *problem.teacher)
        ]
        weights = torch.rand(2, 1, 7, device=backend.device)
        spec = [float(x) for x in Spec(int(kind), mean=True)]
        mask = HOLES.to(backend.device)
        rest = (mask, weights, None, [1, 0], spec, 0 if backend.interpreted else 300)
        forward, grad = (
            p.overload(backend.name) for p in (relation_match_forward, relation_match_grad)
        )
        torch.library.opcheck(forward, (*tensors, *rest))
        torch.library.opcheck(grad, (*tensors, *rest, [True, True]))
        torch.library.opcheck(grad, (*tensors, *rest, [False, True]))
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        one = (views[0], None, views[2], None, *rest)
        torch.library.opcheck(grad, (*one, [True, False]))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(backend: Backend, reduction: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    options = {"reduction": reduction, "backend": backend.name}

    def call(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        relation = relation_match_loss(2 * x, t, num_relation_heads=2, mask=mask, **options)
        attention = attention_match_loss(
            (x, 2 * x[..., :4]), (t, t), kind="kl", student_heads=2, teacher_heads=2, causal=True,
            mask=mask, **options,
        )  # fmt: skip
        return relation, attention

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, seq in ((1, 2), (2, 3)) if backend.interpreted else ((2, 5), (3, 6)):
        x = torch.randn(batch, seq, 8, device=backend.device)
        t = torch.randn(batch, seq, 8, device=backend.device)
        mask = torch.rand(batch, seq, device=backend.device) < 0.7
        results = []
        for function in (call, compiled):
            leaf = x.clone().requires_grad_()
            values = function(leaf, t, mask)
            sum(v.sum() for v in values).backward()
            results.append((*(v.detach() for v in values), leaf.grad))
        for plain, found in zip(*results, strict=True):
            assert_within_budget(found, plain.double(), plain, torch.float32)


# ---- what users call -----------------------------------------------------------------------------


def minilm(student: Tensor, teacher: Tensor, heads: int, mask: Tensor, causal: bool) -> Tensor:
    """MiniLMv2's relation loss, example by example, head by head."""
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for b in range(student.shape[0]):
        keep = mask[b]
        for h in range(heads):
            logs = []
            for x in (student, teacher):
                d = x.shape[2] // heads
                a = x[b, keep, h * d : (h + 1) * d].double()
                scores = a @ a.T / math.sqrt(d)
                if causal:
                    future = torch.arange(len(a))[:, None] < torch.arange(len(a))
                    scores = scores.masked_fill(future, -1e9)
                logs.append(F.log_softmax(scores, dim=-1))
            total = total + F.kl_div(logs[0], logs[1], log_target=True, reduction="sum")
            rows += int(keep.sum())
    return total / rows


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [torch.ones(2, 7).bool(), HOLES], ids=["whole", "holes"])
def test_minilmv2(backend: Backend, mask: Tensor, causal: bool) -> None:
    x, t = torch.randn(2, 7, 12), torch.randn(2, 7, 20)

    def run(x: Tensor, t: Tensor, device: str, **options: Any) -> list[Tensor]:
        leaf = x.to(device).clone().requires_grad_()
        if options:
            loss = relation_match_loss(
                leaf, t.to(device), num_relation_heads=4, mask=mask.to(device), causal=causal,
                **options,
            )  # fmt: skip
        else:
            loss = minilm(leaf, t, 4, mask, causal)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    actual = run(x, t, backend.device, backend=backend.name)
    oracle = run(x.double(), t.double(), "cpu")
    same = run(x, t, "cpu", backend="reference")
    for a, o, s in zip(actual, oracle, same, strict=True):
        assert_within_budget(a, o, s, torch.float32)


def tinybert(student: list[Tensor], teacher: list[Tensor], heads: int) -> Tensor:
    """TinyBERT's attention loss as its code has it: ``MSELoss`` of the scores."""

    def scores(q: Tensor, k: Tensor) -> Tensor:
        batch, seq, width = q.shape
        q, k = (x.view(batch, seq, heads, width // heads).permute(0, 2, 1, 3) for x in (q, k))
        return torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(width // heads)

    return F.mse_loss(scores(*student), scores(*teacher))


@pytest.mark.parametrize("maps", [False, True])
def test_tinybert(backend: Backend, maps: bool) -> None:
    widths = (8, 8, 12, 12)
    tensors = [torch.randn(2, 6, width) for width in widths]

    def run(tensors: list[Tensor], device: str, name: str | None) -> list[Tensor]:
        leaves = [x.to(device).clone().requires_grad_() for x in tensors[:2]]
        teacher = [x.to(device) for x in tensors[2:]]
        if name is None:
            loss = tinybert(leaves, teacher, 2)
        elif maps:

            def scores(q: Tensor, k: Tensor) -> Tensor:
                q, k = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in (q, k))
                return q @ k.transpose(2, 3) * q.shape[3] ** -0.5

            loss = attention_match_loss(scores(*leaves), scores(*teacher), backend=name)
        else:
            loss = attention_match_loss(
                tuple(leaves), tuple(teacher), student_heads=2, teacher_heads=2, backend=name
            )
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    actual = run(tensors, backend.device, backend.name)
    oracle = run([x.double() for x in tensors], "cpu", None)
    same = run(tensors, "cpu", "reference")
    for a, o, s in zip(actual, oracle, same, strict=True):
        assert_within_budget(a, o, s, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, HOLES, padded(0, 5)], ids=["whole", *MASKS[1:3]])
@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_maps_are_compared_like_queries_and_keys(
    backend: Backend, kind: str, mask: Tensor | None, causal: bool, reduction: str
) -> None:
    """Scores, or their softmax, give the loss and gradients of the queries and keys."""
    problem = Problem(teacher_heads=3, teacher_keys=3, mask=mask)
    weights = torch.tensor([0.5, 2.0])
    options: dict[str, Any] = {
        "kind": kind, "causal": causal, "head_map": [2, 0], "reduction": reduction,
    }  # fmt: skip
    hidden = torch.zeros(2, 1, 7, 7, dtype=torch.bool)
    if causal:
        hidden = hidden | torch.ones(7, 7).triu(1).bool()
    if mask is not None:
        hidden = hidden | ~mask[:, None, None, :]

    def run(dtype: torch.dtype, device: str, name: str, *, maps: bool) -> list[Tensor]:
        q, k, tq, tk = (x.to(device, dtype) for x in (*problem.student, *problem.teacher))
        q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
        student, teacher = (q, k), (tq, tk)
        if maps:
            pair = []
            for a, b in (student, teacher):
                scores = a @ b.transpose(2, 3) / 2
                if kind == "kl":
                    scores = scores.masked_fill(hidden.to(device), -torch.inf).softmax(3)
                pair.append(scores.detach())
            student, teacher = pair
            student.requires_grad_()
        loss = attention_match_loss(
            student, teacher, mask=None if mask is None else mask.to(device),
            row_weights=weights.to(device, dtype), backend=name, **options,
        )  # fmt: skip
        up = torch.linspace(1, 2, loss.numel(), device=device, dtype=loss.dtype).view(loss.shape)
        if not maps:
            return [loss.detach(), *torch.autograd.grad(loss, (q, k), up)]
        (grad,) = torch.autograd.grad(loss, student, up)
        assert torch.isfinite(grad).all()
        if kind == "kl":  # to the scores, through the softmax
            with torch.no_grad():
                p = student.nan_to_num()
                grad = p * (grad - (p * grad).sum(3, keepdim=True))
        with torch.no_grad():
            k_clean, q_clean = k.nan_to_num(), q.nan_to_num()
            return [loss.detach(), grad @ k_clean / 2, grad.transpose(2, 3) @ q_clean / 2]

    actual = run(torch.float32, backend.device, backend.name, maps=True)
    oracle = run(torch.float64, "cpu", "reference", maps=False)
    same = run(torch.float32, "cpu", "reference", maps=True)
    for a, o, s in zip(actual, oracle, same, strict=True):
        assert_within_budget(a, o, s, torch.float32)


def test_zeros_of_probabilities(backend: Backend) -> None:
    """Nothing where both are zero; infinite where only the student is; nothing where the teacher
    is.
    """
    t = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    s = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]])
    student = s[None, None].to(backend.device).requires_grad_()
    options = {"kind": "kl", "reduction": "none", "backend": backend.name}
    rows = attention_match_loss(student, t[None, None].to(backend.device), **options)
    expected = torch.tensor([0.5 * math.log(4 / 3), math.inf, math.log(2)])
    assert_within_budget(rows[0, 0], expected.double(), expected, torch.float32)
    rows[0, 0, 0].backward()
    # -t / s, and a constant of the row.
    grad = student.grad[0, 0, 0].cpu()
    expected = torch.tensor([1 - 2.0, 1 - 2 / 3, 0.0])
    assert_within_budget(grad, expected.double(), expected, torch.float32)
    assert (student.grad[0, 0, 1:] == 0).all()


@pytest.mark.parametrize("form", ["relation", "pair", "map"])
def test_an_example_s_weight_changes_its_gradient_only(backend: Backend, form: str) -> None:
    width = 7 if form == "map" else 8
    shape = (2, 2, 7, width) if form != "relation" else (2, 7, width)
    x, t = (torch.randn(shape, device=backend.device) for _ in range(2))

    def gradient(*weights: float) -> Tensor:
        leaf = x.clone().requires_grad_()
        row_weights = torch.tensor(weights, device=backend.device)
        options = {"row_weights": row_weights, "backend": backend.name}
        if form == "relation":
            loss = relation_match_loss(leaf, t, num_relation_heads=2, **options)
        elif form == "pair":
            loss = attention_match_loss((leaf, leaf), (t, t), **options)
        else:
            loss = attention_match_loss(leaf, t, **options)
        loss.backward()
        return leaf.grad

    one, other = gradient(1.0, 1.0), gradient(3.0, 1.0)
    assert torch.equal(one[1], other[1])
    assert_within_budget(other[0], 3 * one[0].double(), 3 * one[0], torch.float32)
    tokens = torch.tensor([[1.0] * 7, [3.0] * 7], device=backend.device)
    leaf = x.clone().requires_grad_()
    if form == "relation":
        relation_match_loss(
            leaf, t, num_relation_heads=2, row_weights=tokens, backend=backend.name
        ).backward()
        assert torch.equal(leaf.grad[0], one[0])


@pytest.mark.parametrize("form", ["relation", "pair", "map"])
def test_reductions(form: str) -> None:
    x = torch.randn(2, 2, 7, 7)
    t = torch.randn(2, 2, 7, 7)

    def call(**options: Any) -> Tensor:
        if form == "map":
            return attention_match_loss(x, t, mask=HOLES, **options)
        if form == "pair":
            return attention_match_loss((x, x), (t, t), kind="kl", mask=HOLES, **options)
        student, teacher = (y.transpose(1, 2).flatten(2) for y in (x, t))
        return relation_match_loss(student, teacher, num_relation_heads=2, mask=HOLES, **options)

    rows = call(reduction="none")
    assert rows.shape == (2, 2, 7)
    total, count = rows.double().sum(), 2 * HOLES.sum()
    for options, expected in (
        ({}, total / count),
        ({"reduction": "sum"}, total),
        ({"reduction": "batchmean"}, total / 2),
        ({"num_items_in_batch": 5}, total / 5),
        ({"num_items_in_batch": torch.tensor(5), "reduction": "sum"}, total / 5),
        ({"num_items_in_batch": 0}, total),
    ):
        found = call(**options)
        assert_within_budget(found, expected, expected.float(), torch.float32)


def test_forms_of_queries_and_keys() -> None:
    """Flat and split, grouped keys, an integer mask, scales."""
    q, k = torch.randn(2, 7, 4, 3), torch.randn(2, 7, 2, 3)
    tq = torch.randn(2, 7, 4, 5)
    split = attention_match_loss(
        (q.transpose(1, 2), k.transpose(1, 2)), (tq.transpose(1, 2), tq.transpose(1, 2)), mask=HOLES
    )
    flat = attention_match_loss(
        (q.flatten(2), k.flatten(2)), (tq.flatten(2), tq.flatten(2)), student_heads=4,
        teacher_heads=4, mask=HOLES.long(), scale=(3**-0.5, 5**-0.5),
    )  # fmt: skip
    assert torch.equal(split, flat)
    doubled = attention_match_loss(
        (q.transpose(1, 2), k.transpose(1, 2)), (tq.transpose(1, 2), tq.transpose(1, 2)),
        mask=HOLES, scale=1.0,
    )  # fmt: skip
    assert doubled > split
    module = kdkernels.AttentionMatchLoss(student_heads=4, teacher_heads=4, mask=HOLES)
    assert torch.equal(module((q.flatten(2), k.flatten(2)), (tq.flatten(2), tq.flatten(2))), split)
    relation = kdkernels.RelationMatchLoss(num_relation_heads=2)
    x, t = torch.randn(2, 7, 8), torch.randn(2, 7, 6)
    assert torch.equal(relation(x, t), relation_match_loss(x, t, num_relation_heads=2))


def test_examples_in_docstrings_run() -> None:
    found = doctest.testmod(relations)
    assert found.failed == 0 and found.attempted > 10


MEMORY = """
import resource
import torch, kdkernels
torch.manual_seed(0)
student, teacher = torch.randn(2, 2048, 256, requires_grad=True), torch.randn(2, 2048, 256)
def call(x, t):
    loss = kdkernels.relation_match_loss(x, t, num_relation_heads=8)
    return torch.autograd.grad(loss, x)
call(student[:, :64], teacher[:, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(student, teacher)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_that_of_a_tile() -> None:
    if "native" not in kdkernels.available_backends("relation_match"):
        pytest.skip("the native library was not built")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Tiles of 8 MB and gradients of 4; the scores of one model in full would be 268.
    assert int(done.stdout) < 32 * 1024


# ---- refusals ------------------------------------------------------------------------------------

X, T = torch.zeros(2, 3, 8), torch.zeros(2, 3, 12)
H, MAP = torch.zeros(2, 4, 3, 5), torch.zeros(2, 4, 3, 3)
RELATION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": [1.0]}, TypeError, "student must be a Tensor, got list"),
    ({"teacher": None}, TypeError, "teacher must be a Tensor, got NoneType"),
    ({"student": X[0]}, ValueError, r"student must be \[batch, seq, width\], got shape \[3, 8\]"),
    ({"teacher": T.long()}, TypeError, "teacher must be float32, bfloat16, float16 or float64, got "
     "int64"),
    ({"student": X.to_sparse()}, TypeError, "student must be a strided tensor, got "
     "torch.sparse_coo"),
    ({"teacher": T[:1]}, ValueError, r"teacher must have the batch and the tokens of student "
     r"\[2, 3\], got \[1, 3\]"),
    ({"teacher": T[:, :2]}, ValueError, r"teacher must have the batch and the tokens of student "
     r"\[2, 3\], got \[2, 2\]"),
    ({"teacher": T.clone().requires_grad_()}, ValueError, r"teacher must not require grad \(.*\), "
     "got requires_grad=True"),
    ({"num_relation_heads": 3}, ValueError, "student must have a width that num_relation_heads=3 "
     "divides, got 8"),
    ({"num_relation_heads": 8}, ValueError, "teacher must have a width that num_relation_heads=8 "
     "divides, got 12"),
    ({"num_relation_heads": 0}, ValueError, "num_relation_heads must be an integer of at least 1, "
     "got 0"),
    ({"num_relation_heads": 2.0}, ValueError, "num_relation_heads must be an integer of at least "
     "1, got 2.0"),
    ({"mask": torch.ones(2, 4)}, ValueError, r"mask must be \[2, 3\], got shape \[2, 4\]"),
    ({"mask": True}, ValueError, r"mask must be \[2, 3\], got bool"),
    ({"row_weights": torch.ones(3)}, ValueError, r"row_weights must be \[2\] or \[2, 3\], got "
     r"shape \[3\]"),
    ({"row_weights": torch.tensor([1.0, NAN])}, ValueError, "row_weights must be finite, got NaN "
     "or inf"),
    ({"row_weights": torch.ones(2).long()}, TypeError, "row_weights must be floating, got "
     "torch.int64"),
    ({"reduction": "max"}, ValueError, "reduction must be one of mean, batchmean, sum, none, got "
     "'max'"),
    ({"reduction": "none", "num_items_in_batch": 3}, ValueError, "reduction must not be 'none' "
     "with num_items_in_batch, got 'none'"),
    ({"num_items_in_batch": -1}, ValueError, "num_items_in_batch must be finite and 0 or more, "
     "got -1"),
]  # fmt: skip
ATTENTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kind": "cosine"}, ValueError, "kind must be one of mse, kl, got 'cosine'"),
    ({"teacher": MAP}, ValueError, r"teacher must be a \(q, k\) pair as student is, got shape "
     r"\[2, 4, 3, 3\]"),
    ({"student": MAP}, ValueError, "teacher must be a map as student is, got tuple"),
    ({"student": (H,)}, ValueError, r"student must be a \(q, k\) pair or a map, got tuple"),
    ({"student": None}, ValueError, r"student must be a \(q, k\) pair or a map, got NoneType"),
    ({"student": (H, None)}, TypeError, "student must be a Tensor, got NoneType"),
    ({"student": (X, X)}, ValueError, r"student_heads must be given for queries and keys \[batch, "
     r"seq, width\], got None"),
    ({"student_heads": 2}, ValueError, r"student must be \[batch, seq, heads \* width\], got shape "
     r"\[2, 4, 3, 5\]"),
    ({"student": (X, X), "student_heads": 3}, ValueError, "student must have a width that "
     "student_heads=3 divides, got 8"),
    ({"student": (X, X), "student_heads": 0}, ValueError, "student_heads must be an integer of at "
     "least 1, got 0"),
    ({"student": (X, X[..., :7]), "student_heads": 4}, ValueError, "student must have keys of some "
     "heads of width 2, got 7"),
    ({"student": (X, X[..., :6]), "student_heads": 4}, ValueError, "student must have keys like "
     r"its queries \[2, 4, 3, 2\], whose heads may be a multiple of the keys', got \[2, 3, 3, 2\]"),
    ({"student": (H, H[:, :, :2])}, ValueError, r"student must have keys like its queries \[2, 4, "
     r"3, 5\], whose heads may be a multiple of the keys', got \[2, 4, 2, 5\]"),
    ({"student": (H, H.half())}, TypeError, "student must have q and k of one dtype, got "
     "torch.float32, torch.float16"),
    ({"teacher": (H[:, :2], H[:, :2])}, ValueError, "head_map must be given where student has 4 "
     "heads and teacher 2, got None"),
    ({"head_map": [0, 1, 2]}, ValueError, r"head_map must be 4 integers in \[0, 4\), got \[0, 1, "
     r"2\]"),
    ({"head_map": [0, 1, 2, 4]}, ValueError, r"head_map must be 4 integers in \[0, 4\), got \[0, "
     r"1, 2, 4\]"),
    ({"teacher": (H[:, :, :2], H[:, :, :2])}, ValueError, "teacher must have the batch and the "
     r"tokens of student \[2, 3\], got \[2, 2\]"),
    ({"teacher": (H, H.clone().requires_grad_())}, ValueError, r"teacher must not require grad "
     r"\(.*\), got requires_grad=True"),
    ({"scale": "big"}, TypeError, "scale must be a number, got str"),
    ({"scale": (1.0,)}, ValueError, r"scale must be a number or a \(student, teacher\) pair, got "
     r"\(1.0,\)"),
    ({"student": H, "teacher": H}, ValueError, r"student must be \[batch, heads, seq, seq\], got "
     r"shape \[2, 4, 3, 5\]"),
    ({"student": MAP, "teacher": MAP, "scale": 2.0}, ValueError, "scale must not be given with "
     "maps, got 2.0"),
    ({"student": MAP, "teacher": MAP, "student_heads": 4}, ValueError, "student_heads must not be "
     "given with maps, got 4"),
    ({"student": MAP, "teacher": MAP[:, :2]}, ValueError, "head_map must be given where student "
     "has 4 heads and teacher 2, got None"),
    ({"mask": torch.ones(2, 4)}, ValueError, r"mask must be \[2, 3\], got shape \[2, 4\]"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "message"), RELATION, ids=str)
def test_relation_refusals(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    full = {"student": X, "teacher": T, "num_relation_heads": 4} | arguments
    with pytest.raises(kind, match=f"^relation_match_loss: {message}$"):
        relation_match_loss(**full)


@pytest.mark.parametrize(("arguments", "kind", "message"), ATTENTION, ids=str)
def test_attention_refusals(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    full = {"student": (H, H), "teacher": (H, H)} | arguments
    with pytest.raises(kind, match=f"^attention_match_loss: {message}$"):
        attention_match_loss(**full)


OP: list[tuple[dict[str, Any], str]] = [
    (
        {"student": (X, None)},
        r"student must be \[batch, heads, seq, width\], got shape \[2, 3, 8\]",
    ),
    ({"student": (H, H[..., :2])}, r"student must have keys of its queries' shape"),
    ({"teacher": (H[:1], None)}, r"teacher must have the batch and the tokens of student \[2, 3\]"),
    (
        {"teacher": (H[:, :1], None)},
        "head_map must be given for 4 heads of student and 1 of teacher",
    ),
    ({"head_map": [0]}, r"head_map must have 4 heads of teacher in \[0, 4\), got \[0\]"),
    ({"mask": torch.ones(2, 3)}, r"mask must be bool \[2, 3\], got torch.float32 \[2, 3\]"),
    ({"row_weights": torch.ones(2)}, r"row_weights must be \[2, 3\], got \[2\]"),
    ({"tile_bytes": 0}, "tile_bytes must be at least 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), OP, ids=str)
def test_refusals_of_the_op(arguments: dict[str, Any], message: str) -> None:
    full = {"student": (H, None), "teacher": (H, None), "mask": None, "row_weights": None}
    with pytest.raises(ValueError, match=f"^relation_match: {message}"):
        relation_match(**(full | {"denominator": None, "spec": Spec()} | arguments))


def test_what_a_backend_cannot_run(backend: Backend) -> None:
    wide = X.to(backend.device).double()
    if backend.name == "reference":
        loss = relation_match_loss(wide, wide, num_relation_heads=2, backend="reference")
        assert loss.dtype == torch.float64
        return
    with pytest.raises(NotImplementedError, match="float32, bfloat16 and float16, not float64"):
        relation_match_loss(wide, wide, num_relation_heads=2, backend=backend.name)


def test_the_choice_falls_back() -> None:
    wide = X.double()
    assert relation_match_loss(wide, wide, num_relation_heads=2).dtype == torch.float64
    assert kdkernels.explain("relation_match", H, H).startswith("relation_match on cpu: ")
