"""``linear_kd_loss`` against the logits in full, over every backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.backends import Backend
from helpers.budget import assert_within_budget
from torch import Tensor

import kdkernels
from kdkernels.ops._shared import chunks
from kdkernels.ops.kd_loss import Divergence, Spec
from kdkernels.ops.linear_kd_loss import (
    Heads,
    linear_kd_loss,
    linear_kd_loss_rows,
    plan_chunk_rows,
)
from kdkernels.ops.linear_kd_loss import op as linear_op
from kdkernels.ops.linear_kd_loss.reference import linear_kd_loss_reference

ROWS, VOCAB, WIDTH, TEACHER_WIDTH = 7, 53, 12, 20
D = Divergence


class Problem:
    """Inputs in float64, and their copies on a backend's device in a dtype."""

    def __init__(self, seed: int = 0, *, bias: bool = True, vocab: int = VOCAB) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        self.hidden, self.teacher = normal(ROWS, WIDTH), normal(ROWS, TEACHER_WIDTH)
        self.weight, self.teacher_weight = normal(vocab, WIDTH), normal(vocab, TEACHER_WIDTH)
        self.bias, self.teacher_bias = (normal(vocab), normal(vocab)) if bias else (None, None)
        self.labels = torch.randint(vocab, (ROWS,), generator=g)
        self.labels[2] = -100
        self.row_weights: Tensor | None = None
        self.denominator: Tensor | None = None

    def leaves(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor | None]:
        """Hidden states, weight and bias, to be differentiated."""
        return [
            None if x is None else x.detach().to(device, dtype, copy=True).requires_grad_()
            for x in (self.hidden, self.weight, self.bias)
        ]

    def others(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor | None]:
        """Of the teacher: hidden states, weight, bias."""
        return [
            None if x is None else x.to(device, dtype)
            for x in (self.teacher, self.teacher_weight, self.teacher_bias)
        ]


def run(
    backend: Backend, problem: Problem, spec: Spec, dtype: torch.dtype, **options: Any
) -> list[Tensor | None]:
    """Loss and gradients by a backend."""
    hidden, weight, bias = leaves = problem.leaves(dtype, backend.device)
    teacher, teacher_weight, teacher_bias = problem.others(dtype, backend.device)
    assert hidden is not None and weight is not None
    if not spec.needs_teacher:
        teacher = teacher_weight = teacher_bias = None

    def move(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(backend.device)

    loss, _ = linear_kd_loss(
        hidden,
        teacher,
        move(problem.labels),
        move(problem.row_weights),
        move(problem.denominator),
        spec,
        heads=Heads(weight, bias, teacher_weight, teacher_bias),
        backend=backend.name,
        **options,
    )
    loss.backward()
    return [loss.detach(), *(None if x is None else x.grad for x in leaves)]


def expected(
    problem: Problem, spec: Spec, dtype: torch.dtype, *, wide: bool
) -> list[Tensor | None]:
    """Loss and gradients by the reference: inputs rounded to ``dtype``, arithmetic in float64."""
    leaves = problem.leaves(dtype)
    others = problem.others(dtype)
    if wide:
        leaves = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
        others = [None if x is None else x.double() for x in others]
    if not spec.needs_teacher:
        others = [None] * 3
    loss, _, _ = linear_kd_loss_reference(
        *leaves, *others, problem.labels, problem.row_weights, problem.denominator, spec
    )
    loss.backward()
    return [loss.detach(), *(None if x is None else x.grad for x in leaves)]


def check(
    backend: Backend, problem: Problem, spec: Spec, dtype: torch.dtype, **options: Any
) -> None:
    actual = run(backend, problem, spec, dtype, **options)
    oracle = expected(problem, spec, dtype, wide=True)
    same = expected(problem, spec, dtype, wide=False)
    for a, o, s in zip(actual, oracle, same, strict=True):
        if o is None:
            assert a is None
            continue
        assert a is not None and s is not None
        assert_within_budget(a, o, s, a.dtype)


@pytest.mark.parametrize("divergence", list(D), ids=lambda d: d.name)
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_matches_reference(
    backend: Backend, divergence: Divergence, chunk_rows: int | None
) -> None:
    spec = Spec(divergence.value, 0.3, 2.0, 0.4, 2.4, 0.1, 1e-3)
    check(backend, Problem(), spec, torch.float32, chunk_rows=chunk_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend} does not take {dtype}")
    for bias in (True, False):
        spec = Spec(D.FORWARD_KL.value, ce_weight=0.5, kd_weight=0.5, student_softcap=5.0)
        check(backend, Problem(1, bias=bias), spec, dtype, chunk_rows=4)


def test_options_of_the_caller(backend: Backend) -> None:
    problem = Problem(2)
    problem.row_weights = torch.rand(ROWS, dtype=torch.float64).float()
    problem.denominator = torch.tensor(3.0)
    spec = Spec(D.JSD.value, 0.5, 1.5, 0.5, 0.5, student_scale=0.5, teacher_softcap=3.0)
    check(backend, problem, spec, torch.float32, chunk_rows=2)
    # Padded heads: only the first classes count.
    problem.labels %= 40
    problem.labels[2] = -100
    check(backend, problem, spec._replace(classes=41), torch.float32, chunk_rows=2)


def test_without_a_teacher_it_is_cross_entropy(backend: Backend) -> None:
    problem = Problem(3)
    loss, *_ = run(backend, problem, Spec(ce_weight=1.0), torch.float32)
    hidden, weight, bias = problem.leaves(torch.float64)
    assert hidden is not None and weight is not None and bias is not None
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, problem.labels)
    assert loss is not None
    assert_within_budget(loss, wanted.detach(), wanted.detach().float(), torch.float32)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_input_gets_no_gradient(backend: Backend, frozen: str) -> None:
    problem = Problem(4)
    leaves = dict(
        zip(
            ("hidden", "weight", "bias"), problem.leaves(torch.float32, backend.device), strict=True
        )
    )
    full = run(backend, problem, Spec(ce_weight=1.0), torch.float32)
    x = leaves[frozen]
    assert x is not None
    x.requires_grad_(False)
    hidden, weight = leaves["hidden"], leaves["weight"]
    assert hidden is not None and weight is not None
    loss, _ = linear_kd_loss(
        hidden, None, problem.labels.to(backend.device), None, None, Spec(ce_weight=1.0),
        heads=Heads(weight, leaves["bias"]), backend=backend.name,
    )  # fmt: skip
    loss.backward()
    for (name, leaf), grad in zip(leaves.items(), full[1:], strict=True):
        assert leaf is not None
        if name == frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, grad)  # type: ignore[arg-type]


def test_rows_and_their_gradient(backend: Backend) -> None:
    problem = Problem(5)
    spec = Spec(D.REVERSE_KL.value, ce_weight=0.5, kd_weight=0.5, mean=False)
    upstream = torch.rand(ROWS)
    results = []
    for name, dtype in ((backend.name, torch.float32), ("reference", torch.float64),
                        ("reference", torch.float32)):  # fmt: skip
        device = backend.device if name == backend.name else "cpu"
        hidden, weight, bias = leaves = problem.leaves(dtype, device)
        teacher, *teacher_head = problem.others(dtype, device)
        assert hidden is not None and weight is not None
        rows = linear_kd_loss_rows(
            hidden, teacher, problem.labels.to(device), None, spec,
            heads=Heads(weight, bias, *teacher_head), chunk_rows=3, backend=name,
        )  # fmt: skip
        assert rows[2] == 0
        rows.backward(upstream.to(device, rows.dtype))
        results.append([rows.detach(), *(x.grad for x in leaves if x is not None)])
    for actual, oracle, same in zip(*results, strict=True):
        assert_within_budget(actual, oracle, same, torch.float32)


def test_ignored_rows_may_hold_nan(backend: Backend) -> None:
    problem = Problem(6)
    wanted = run(
        backend, problem, Spec(D.FORWARD_KL.value, ce_weight=0.5, kd_weight=0.5), torch.float32
    )
    problem.hidden[2], problem.teacher[2] = torch.nan, torch.nan
    spec = Spec(D.FORWARD_KL.value, ce_weight=0.5, kd_weight=0.5)
    got = run(backend, problem, spec, torch.float32)
    for a, b in zip(got, wanted, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    assert got[1] is not None and (got[1][2] == 0).all()
    problem.labels[:] = -100
    for x in run(backend, problem, spec, torch.float32):
        assert x is not None and (x == 0).all()


def test_chunks_change_nothing_but_rounding(backend: Backend) -> None:
    problem = Problem(7)
    spec = Spec(D.TVD.value, ce_weight=0.5, kd_weight=0.5)
    for chunk_rows in (1, 2, 6, 100):
        check(backend, problem, spec, torch.float32, chunk_rows=chunk_rows)


def test_equal_models_get_no_gradient_from_the_divergence(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("autograd's terms cancel up to rounding only")
    problem = Problem(8)
    problem.teacher, problem.teacher_weight = problem.hidden, problem.weight
    problem.teacher_bias = problem.bias
    for divergence in (D.FORWARD_KL, D.JSD, D.REVERSE_KL, D.TVD):
        got = run(backend, problem, Spec(divergence.value, kd_weight=1.0), torch.float32)
        assert all(x is not None and (x == 0).all() for x in got)


def test_bf16_logits_are_not_rounded(backend: Backend) -> None:
    """Teacher close to student: rounded logits would drown the gradient."""
    torch.manual_seed(0)
    vocab, width = 500, 64
    hidden, weight = torch.randn(6, width).bfloat16(), torch.randn(vocab, width).bfloat16()
    teacher_weight = (weight.float() * (1 + 0.01 * torch.randn(vocab, width))).bfloat16()
    spec = Spec(D.FORWARD_KL.value, kd_weight=1.0)

    def gradient(name: str, dtype: torch.dtype, device: str, logits: torch.dtype | None) -> Tensor:
        x = hidden.to(device, dtype).requires_grad_()
        w, tw = weight.to(device, dtype), teacher_weight.to(device, dtype)
        if logits is not None:  # as peers do it: a linear layer, its result rounded
            s, t = (x.to(logits) @ w.to(logits).T), (x.detach().to(logits) @ tw.to(logits).T)
            loss, *_ = kdkernels.ops.kd_loss.kd_loss(
                s, t, None, None, None, spec, backend="reference"
            )
        else:
            loss, _ = linear_kd_loss(
                x, x.detach(), None, None, None, spec, heads=Heads(w, None, tw), backend=name
            )
        return torch.autograd.grad(loss, x)[0].double().cpu()

    oracle = gradient("reference", torch.float64, "cpu", None)

    def error(grad: Tensor) -> float:
        return ((grad - oracle).norm() / oracle.norm()).item()

    ours = error(gradient(backend.name, torch.bfloat16, backend.device, None))
    exact = error(gradient("reference", torch.bfloat16, "cpu", torch.float32))
    rounded = error(gradient("reference", torch.bfloat16, "cpu", torch.bfloat16))
    assert ours <= 2 * exact < rounded / 4


def test_gemms_of_a_gpu_that_keep_float32(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of 16-bit heads on CUDA, its GEMMs (``out_dtype``) replaced by float32 ones."""
    if backend.device != "cpu" or backend.name == "reference":
        pytest.skip("on a GPU the dtype tests take this path; the reference has none")
    multiply, opened = torch.mm, chunks.Head.__init__

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        return multiply(a.to(out_dtype), b.to(out_dtype))

    def init(self: Any, *args: Any) -> None:
        opened(self, *args)
        self._mixed = True

    problem, spec = Problem(10), Spec(D.FORWARD_KL.value, ce_weight=0.5, kd_weight=0.5)
    oracle = expected(problem, spec, torch.bfloat16, wide=True)
    same = expected(problem, spec, torch.bfloat16, wide=False)
    monkeypatch.setattr(chunks.Head, "__init__", init)
    monkeypatch.setattr(torch, "mm", mm)
    actual = run(backend, problem, spec, torch.bfloat16, chunk_rows=3)
    for a, o, s in zip(actual, oracle, same, strict=True):
        assert a is not None and o is not None and s is not None
        assert_within_budget(a, o, s, a.dtype)


def test_the_function_folds_everything(backend: Backend) -> None:
    torch.manual_seed(1)
    hidden = torch.randn(2, 5, WIDTH, device=backend.device, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, device=backend.device, requires_grad=True)
    teacher = torch.randn(2, 5, TEACHER_WIDTH, device=backend.device)
    teacher_weight = torch.randn(VOCAB, TEACHER_WIDTH, device=backend.device)
    labels = torch.randint(VOCAB, (2, 5), device=backend.device)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]], device=backend.device)
    options = {"temperature": 2.0, "alpha": 0.7, "shift": 1, "mask": mask, "return_parts": True}
    fused = kdkernels.linear_kd_loss(
        hidden, weight, teacher, teacher_weight, labels, **options, chunk_bytes=4 * VOCAB * 2 * 2,
        backend=backend.name,
    )  # fmt: skip
    results = [[*(x.detach() for x in fused), *torch.autograd.grad(fused.loss, (hidden, weight))]]
    for dtype in (torch.float64, torch.float32):
        x, w = (leaf.detach().cpu().to(dtype).requires_grad_() for leaf in (hidden, weight))
        logits = teacher.cpu().to(dtype) @ teacher_weight.cpu().to(dtype).T
        plain = options | {"mask": mask.cpu()}
        eager = kdkernels.kd_loss(x @ w.T, logits, labels.cpu(), **plain, backend="reference")
        grads = torch.autograd.grad(eager.loss, (x, w))
        results.append([*(part.detach() for part in eager), *grads])
    for actual, oracle, same in zip(*results, strict=True):
        assert_within_budget(actual, oracle, same, torch.float32)
    rows = kdkernels.linear_kd_loss(
        hidden, weight, teacher, teacher_weight, labels, reduction="none", backend=backend.name
    )
    assert rows.shape == (2, 5)


def test_upstream_gradient_tied_weight_and_second_backward() -> None:
    if "native" not in kdkernels.available_backends("linear_kd_loss"):
        pytest.skip("no compiled kernels here")
    torch.manual_seed(2)
    embeddings = torch.randn(VOCAB, WIDTH)
    tokens = torch.randint(VOCAB, (6,))
    results = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64),
                           ("reference", torch.float32)):  # fmt: skip
        table = embeddings.to(dtype, copy=True).requires_grad_()
        loss = kdkernels.linear_kd_loss(table[tokens], table, None, None, tokens, backend=backend)
        (first,) = torch.autograd.grad(3.0 * loss, table, retain_graph=True)
        (second,) = torch.autograd.grad(3.0 * loss, table)
        assert torch.equal(first, second)
        results.append(first)
    assert_within_budget(*results, torch.float32)


def test_autocast_and_compile() -> None:
    torch.manual_seed(3)
    hidden, weight = torch.randn(6, WIDTH), torch.randn(VOCAB, WIDTH, requires_grad=True)
    labels = torch.randint(VOCAB, (6,))

    def loss(x: Tensor) -> Tensor:
        result: Tensor = kdkernels.linear_kd_loss(x, weight, None, None, labels, chunk_rows=4)
        return result

    with torch.autocast("cpu", torch.bfloat16):
        auto = loss(hidden)
    cast = kdkernels.linear_kd_loss(hidden.bfloat16(), weight.bfloat16(), None, None, labels)
    assert torch.equal(auto, cast)
    eager = loss(hidden)
    (wanted,) = torch.autograd.grad(eager, weight)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    again = compiled(hidden)
    (got,) = torch.autograd.grad(again, weight)
    assert torch.equal(eager, again) and torch.equal(wanted, got)


def test_opcheck() -> None:
    problem = Problem(9)
    tensors = [*problem.leaves(torch.float32), *problem.others(torch.float32)]
    args = [None if x is None else x.detach() for x in tensors]
    spec = [float(x) for x in Spec(D.FORWARD_KL.value, ce_weight=0.5, kd_weight=0.5)]
    if "native" not in kdkernels.available_backends("linear_kd_loss"):
        pytest.skip("no compiled kernels here")
    forward = linear_op.linear_kd_loss_forward.overload("native")
    torch.library.opcheck(forward, (*args, problem.labels, None, None, spec, 3))
    grad = linear_op.linear_kd_loss_grad.overload("native")
    wanted = [True, True, False]
    torch.library.opcheck(grad, (*args, problem.labels, None, None, spec, 3, wanted))


PEAK = """
import sys
import torch
import kdkernels
from kdkernels.bench.memory import resident_peak

rows = int(sys.argv[1])
weight = torch.randn(32000, 32, requires_grad=True)


def step(rows):
    hidden, labels = torch.randn(rows, 32, requires_grad=True), torch.randint(32000, (rows,))
    kdkernels.linear_kd_loss(hidden, weight, None, None, labels, chunk_rows=64).backward()


step(64)
print(resident_peak(lambda: step(rows)) / 2**20)
"""


def test_memory_is_that_of_a_chunk() -> None:
    """Eight times the rows in the same chunks: a fraction of the logits' memory, as before."""
    if "native" not in kdkernels.available_backends("linear_kd_loss"):
        pytest.skip("no compiled kernels here")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell the peak of a process")
    peaks = []
    for rows in (256, 2048):
        command = [sys.executable, "-c", PEAK, str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout))
    logits = 2048 * 32000 * 4 / 2**20
    # malloc keeps a few freed chunks of 8 MB in its heap.
    assert peaks[1] < 0.25 * logits, peaks
    assert peaks[1] < peaks[0] + 0.2 * logits, peaks


def test_chunk_plan() -> None:
    # 64 MB at least, a quarter of the logits, 512 MB at most.
    assert plan_chunk_rows(100, 1000) == 100
    assert plan_chunk_rows(1024, 32000) == 256
    assert plan_chunk_rows(512, 128256) == 128
    assert plan_chunk_rows(8192, 151936) * 151936 * 8 <= 512 << 20
    assert plan_chunk_rows(1000, 32000, 1, 32000 * 4 * 300) == 250  # four about equal chunks
    assert plan_chunk_rows(0, 10) == 1 and plan_chunk_rows(5, 10**9) == 1


MATRIX, LABELS = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
HEAD = torch.randn(10, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"student_weight": torch.randn(10, 9)}, ValueError,
         r"linear_kd_loss: student_weight must be \[vocab, 8\] for hidden states \[4, 8\], "
         r"got \[10, 9\]"),
        ({"teacher_weight": torch.randn(11, 8)}, ValueError,
         "linear_kd_loss: teacher_weight must have the vocabulary of student_weight, 10, got 11; "
         "if the rest is padding, pass vocab_size=10 or less"),
        ({"teacher_weight": None}, ValueError,
         "linear_kd_loss: teacher_hidden and teacher_weight must be given together"),
        ({"student_weight": HEAD.bfloat16()}, TypeError,
         "linear_kd_loss: student_weight must have the dtype of the hidden states float32, got "
         "bfloat16"),
        ({"teacher_hidden": torch.randn(3, 8)}, ValueError,
         "linear_kd_loss: teacher must have the rows of student, 4, got 3"),
        ({"teacher_hidden": torch.randn(4, 8, requires_grad=True)}, ValueError,
         "linear_kd_loss: teacher must not require grad"),
        ({"student_bias": torch.zeros(9)}, ValueError,
         r"linear_kd_loss: student_bias must be \[10\], got \[9\]"),
        ({"labels": torch.full((4,), 10)}, ValueError,
         r"linear_kd_loss: labels must be in \[0, 10\) or ignore_index -100, got 10 in row 0"),
        ({"chunk_rows": 0}, ValueError,
         "linear_kd_loss: chunk_rows must be an integer of at least 1, got 0"),
        ({"chunk_bytes": -1}, ValueError, "linear_kd_loss: chunk_bytes must be positive, got -1"),
        ({"chunk_bytes": 9, "chunk_rows": 9}, ValueError,
         "linear_kd_loss: chunk_rows must not be given together with chunk_bytes"),
        ({"temperature": 0.0}, ValueError, "linear_kd_loss: temperature must be positive, got 0.0"),
        ({"vocab_size": 11}, ValueError,
         "linear_kd_loss: student_weight must have at least 11 rows, got 10"),
        ({"student_weight": torch.zeros(3)}, ValueError,
         r"linear_kd_loss: student_weight must be \[vocab, width\], got shape \[3\]"),
    ],
)  # fmt: skip
def test_refusals(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    full = {"student_hidden": MATRIX, "student_weight": HEAD, "teacher_hidden": MATRIX,
            "teacher_weight": HEAD, "labels": LABELS} | arguments  # fmt: skip
    with pytest.raises(error, match=message):
        kdkernels.linear_kd_loss(**full)


def test_create_graph_is_refused() -> None:
    weight = HEAD.clone().requires_grad_()
    loss = kdkernels.linear_kd_loss(MATRIX, weight, None, None, LABELS)
    if "native" not in kdkernels.available_backends("linear_kd_loss"):
        pytest.skip("no compiled kernels here")
    with pytest.raises(RuntimeError, match="linear_kd_loss: backend must be 'reference'"):
        torch.autograd.grad(loss, weight, create_graph=True)
