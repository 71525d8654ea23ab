"""``topk_logprobs`` against its reference, over every backend."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from emulation import backend as emulation
from helpers.backends import Backend
from helpers.budget import assert_within_budget
from torch import Tensor

import kdkernels
from kdkernels.ops.topk_logprobs.op import MOST_ON_GPU, topk_logprobs_linear, topk_logprobs_rows

INF, NAN = float("inf"), float("nan")


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape)).to(dtype)


def check(backend: Backend, x: Tensor, k: int, **options: Any) -> kdkernels.TopK:
    """Same ids; log-probabilities and the logarithm of the tail within the budget."""
    actual = kdkernels.topk_logprobs(x.to(backend.device), k, backend=backend.name, **options)

    def reference(dtype: torch.dtype) -> kdkernels.TopK:
        wide = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in options.items()}
        return kdkernels.topk_logprobs(x.to(dtype), k, backend="reference", **wide)

    oracle, same = reference(torch.float64), reference(torch.float32)
    assert torch.equal(actual.ids.cpu(), oracle.ids)
    result = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert actual.logprobs.dtype == actual.tail.dtype == result
    assert_within_budget(actual.logprobs, oracle.logprobs, same.logprobs, result)
    # Errors of the logarithm: e^a has the relative error that a has absolutely.
    tails = (t.cpu().double().log() for t in (actual.tail, oracle.tail, same.tail))
    assert_within_budget(*tails, result, unit=1.0)
    return actual


# One class; fewer than a vector; all of them; many; over blocks of 1024 and 2048, off 16 bytes.
SHAPES = [(5, 1, 1), (4, 17, 3), (4, 17, 17), (3, 1000, 5), (2, 1024, 200), (3, 5003, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(
    backend: Backend, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    if dtype == torch.float64 and backend.name != "reference":
        pytest.skip("the kernels take float32, bfloat16 and float16, not float64")
    rows, classes, k = shape
    check(backend, logits(rows, classes, dtype=dtype), k)


OPTIONS = [
    {"temperature": 3.0},
    {"temperature": 0.5, "logit_scale": 0.25},
    {"softcap": 4.0},
    {"softcap": 30.0, "logit_scale": 2.0, "temperature": 2.0},
    {"vocab_size": 1200},
    {"vocab_size": 40, "softcap": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(backend: Backend, options: dict[str, Any]) -> None:
    x = logits(3, 1301)
    x[:, options.get("vocab_size", 1301) :] = NAN  # never read, never chosen
    found = check(backend, x, 40, **options)
    assert (found.ids < options.get("vocab_size", 1301)).all()


def test_probabilities_sum_to_one(backend: Backend) -> None:
    found = check(backend, logits(8, 700), 10)
    total = found.logprobs.double().exp().sum(1) + found.tail.double()
    assert_within_budget(total, torch.ones(8), torch.ones(8), torch.float32, unit=10.0)
    assert (found.logprobs.diff(dim=1) <= 0).all()


def test_ties_go_to_the_smaller_id(backend: Backend) -> None:
    for x in (torch.zeros(2, 3000), logits(2, 3000).round(), logits(2, 5000).div(9).round()):
        check(backend, x, 70)
    x = torch.zeros(1, 2500)
    x[0, ::2] = -0.0  # both zeros are one value
    assert torch.equal(check(backend, x, 9).ids.cpu()[0], torch.arange(9))
    x[0, 2000:] = 1.0
    assert check(backend, x, 500).ids.cpu()[0, 0] == 2000
    # A cap rounds large logits to one value; their order stays.
    x = torch.tensor([[40.0, 50.0, 60.0, 1.0]])
    assert check(backend, x, 3, softcap=1.0).ids.tolist() == [[2, 1, 0]]


def test_order_of_classes_does_not_matter(backend: Backend) -> None:
    """Rows in which the largest logits are neighbours, or only ever grow: candidates abound."""
    ramp = torch.arange(6000.0) / 500
    for x in (ramp, ramp.flip(0), torch.cat((ramp[3000:], ramp[:3000]))):
        check(backend, x[None], 100)
    comb = torch.zeros(1, 6144)
    comb[0, ::512] = 5 + torch.arange(12.0)
    comb[0, 1::512] = 5.5 + torch.arange(12.0)
    check(backend, comb, 20)


@pytest.mark.parametrize("live", [0, 1, 6, 7, 40])
def test_masked_classes_never_appear(backend: Backend, live: int) -> None:
    x = torch.full((3, 1100), -INF)
    for row in range(3):
        x[row, torch.randperm(1100)[:live]] = logits(live)
    for options in ({}, {"softcap": 3.0}):
        found = check(backend, x, 7, **options)
        entries = min(live, 7)
        assert (found.ids[:, entries:] == -1).all()
        assert (found.logprobs[:, entries:] == -INF).all()
        assert (found.ids[:, :entries] >= 0).all()
        if live <= 7:
            assert (found.tail == 0).all()


@pytest.mark.parametrize("k", [1, 3])
def test_a_small_tail_keeps_its_digits(backend: Backend, k: int) -> None:
    """1e-9 and less: 1 minus the sum of the others would be 0 in float32."""
    x = torch.randn(4, 3000) - 29.0
    x[:, 7], x[:, 2100], x[:, 2999] = 8.0, 7.0, 6.0
    x[:, 3] = 5.0 if k == 1 else -30.0
    if k == 1:
        x[:, [3, 2100, 2999]] = -14.0
    found = check(backend, x, k)
    assert (found.tail > 0).all() and (found.tail < 1e-8).all()


def test_a_row_of_nan_is_nan(backend: Backend) -> None:
    x = logits(5, 2100)
    x[0, 1500] = NAN
    x[1] = NAN
    x[2, 3] = INF
    x[3, :2000] = -NAN
    found = kdkernels.topk_logprobs(x.to(backend.device), 30, backend=backend.name)
    assert found.tail[:4].isnan().all()
    assert not found.logprobs[:4].isfinite().any()
    assert (found.ids >= -1).all() and (found.ids < 2100).all()
    alone = kdkernels.topk_logprobs(x[4:].to(backend.device), 30, backend=backend.name)
    assert torch.equal(found.ids[4:], alone.ids)
    assert torch.equal(found.logprobs[4:], alone.logprobs)
    # A cap makes a large logit of an infinite one.
    assert check(backend, x[2:3], 1, softcap=5.0).ids.item() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend: Backend, dtype: torch.dtype) -> None:
    wide = torch.full((6, 1203), NAN, dtype=dtype)
    wide[:, 2:1103] = logits(6, 1101, dtype=dtype)
    check(backend, wide[:, 2:1103], 9)  # rows apart, off the 16-byte boundaries
    check(backend, wide[::2, 2:1103], 9)
    check(backend, logits(300, 5, dtype=dtype).T, 9)  # columns apart
    check(backend, logits(1, 300, dtype=dtype).expand(3, 300), 9)


def test_leading_dimensions(backend: Backend) -> None:
    x = logits(2, 3, 50)
    found = check(backend, x, 4)
    assert found.ids.shape == found.logprobs.shape == (2, 3, 4) and found.tail.shape == (2, 3)
    one = check(backend, x[0, 0], 4)
    assert torch.equal(one.ids, found.ids[0, 0]) and one.tail.shape == ()
    none = check(backend, x[:0], 4)
    assert none.ids.shape == (0, 3, 4) and none.ids.dtype == torch.int64


def test_many_classes(backend: Backend) -> None:
    k = MOST_ON_GPU if backend.name in ("triton", "emulated") or backend.device == "cuda" else 3000
    check(backend, logits(1, 7000), k)
    check(backend, logits(1, 2000), min(k, 2000))


def test_no_gradient(backend: Backend) -> None:
    x = logits(3, 40).to(backend.device).requires_grad_()
    weight = logits(40, 40).to(backend.device).requires_grad_()
    for options in ({}, {"weight": weight}):
        found = kdkernels.topk_logprobs(x, 3, backend=backend.name, **options)
        assert not any(result.requires_grad for result in found)


def test_same_bits_again(backend: Backend) -> None:
    x = logits(2, 3000, dtype=torch.bfloat16).to(backend.device)
    first = kdkernels.topk_logprobs(x, 50, backend=backend.name)
    for seed in range(4):
        if backend.name == "emulated":  # any order of threads
            with emulation.device(seed=seed):
                again = kdkernels.topk_logprobs(x, 50, backend=backend.name)
        else:
            again = kdkernels.topk_logprobs(x, 50, backend=backend.name)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---- from hidden states --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_from_hidden_states(backend: Backend, dtype: torch.dtype, bias: bool) -> None:
    hidden, weight = logits(2, 4, 16, dtype=dtype), (logits(500, 16) / 12).to(dtype)
    head = {"weight": weight, "bias": logits(500, dtype=dtype) if bias else None}
    options: dict[str, Any] = {"temperature": 2.0, "softcap": 6.0, "vocab_size": 490}
    found = kdkernels.topk_logprobs(
        hidden.to(backend.device),
        9,
        **{n: None if v is None else v.to(backend.device) for n, v in head.items()},
        **options,
        chunk_rows=3,
        backend=backend.name,
    )
    wide = hidden.double() @ weight.double().T
    if bias:
        wide = wide + head["bias"].double()
    oracle = kdkernels.topk_logprobs(wide, 9, backend="reference", **options)
    same = kdkernels.topk_logprobs(wide.float(), 9, backend="reference", **options)
    assert torch.equal(found.ids.cpu(), oracle.ids)
    assert found.ids.shape == (2, 4, 9)
    # The GEMM errs too, by some eps of the largest logit.
    unit = wide.abs().max().item()
    assert_within_budget(found.logprobs, oracle.logprobs, same.logprobs, torch.float32, unit=unit)
    assert_within_budget(found.tail, oracle.tail, same.tail, torch.float32, unit=unit)


def test_chunks_change_nothing(backend: Backend) -> None:
    hidden, weight = logits(7, 8).to(backend.device), logits(60, 8).to(backend.device)
    call = {"weight": weight, "backend": backend.name}
    whole = kdkernels.topk_logprobs(hidden, 5, chunk_rows=7, **call)
    for options in ({"chunk_rows": 2}, {"chunk_rows": 100}, {"chunk_bytes": 500}, {}):
        parts = kdkernels.topk_logprobs(hidden, 5, **call, **options)
        assert torch.equal(whole.ids, parts.ids)
        assert_within_budget(parts.logprobs, whole.logprobs, whole.logprobs, torch.float32)
    assert kdkernels.topk_logprobs(hidden[:0], 5, **call).tail.shape == (0,)


def test_autocast_casts_the_head() -> None:
    hidden, weight = logits(3, 8), logits(60, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = kdkernels.topk_logprobs(hidden, 5, weight=weight)
    plain = kdkernels.topk_logprobs(hidden.bfloat16(), 5, weight=weight.bfloat16())
    assert torch.equal(found.ids, plain.ids) and torch.equal(found.logprobs, plain.logprobs)


MEMORY = """
import resource
import torch, kdkernels
torch.manual_seed(0)
hidden, weight = torch.randn(4096, 16), torch.randn(32000, 16)
kdkernels.topk_logprobs(hidden[:64], 8, weight=weight, chunk_bytes=1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kdkernels.topk_logprobs(hidden, 8, weight=weight, chunk_bytes=1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_that_of_a_chunk() -> None:
    if "native" not in kdkernels.available_backends("topk_logprobs"):
        pytest.skip("the native library was not built")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Chunks of 8 MB; the logits in full would be 524.
    assert int(done.stdout) < 64 * 1024


# ---- operators, torch.compile --------------------------------------------------------------------


def test_opcheck(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is no operator")
    x, weight = logits(3, 30).to(backend.device), logits(50, 30).to(backend.device)
    spec = [1.0, 1.0, 0.0, -1.0]
    torch.library.opcheck(topk_logprobs_rows.overload(backend.name), (x, 4, spec))
    torch.library.opcheck(
        topk_logprobs_linear.overload(backend.name), (x, weight, None, 4, spec, 2)
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_compile(backend: Backend, linear: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    weight = logits(120, 30).to(backend.device) if linear else None

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def call(x: Tensor) -> kdkernels.TopK:
        return kdkernels.topk_logprobs(
            2 * x, 4, weight=weight, temperature=2.0, backend=backend.name
        )

    for rows in (3, 5):
        x = logits(rows, 2, 30).to(backend.device)
        found = call(x)
        plain = kdkernels.topk_logprobs(
            2 * x, 4, weight=weight, temperature=2.0, backend=backend.name
        )
        assert torch.equal(found.ids, plain.ids)
        assert_within_budget(found.logprobs, plain.logprobs, plain.logprobs, torch.float32)


# ---- refusals ------------------------------------------------------------------------------------

X, W = torch.zeros(2, 8), torch.zeros(30, 8)
REFUSALS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (([1.0], 1), {}, TypeError, "x must be a Tensor, got list"),
    ((torch.tensor(1.0), 1), {}, ValueError, r"x must be \[..., vocab\], got shape \[\]"),
    ((X[:, :0], 1), {}, ValueError, r"x must be \[..., vocab\], got shape \[2, 0\]"),
    ((X[:, :0], 1), {"weight": W}, ValueError, r"x must be \[..., width\], got shape \[2, 0\]"),
    ((X.long(), 1), {}, TypeError, "x must be float32, bfloat16, float16 or float64, got int64"),
    ((X, 0), {}, ValueError, "k must be an integer of at least 1, got 0"),
    ((X, 2.0), {}, ValueError, "k must be an integer of at least 1, got 2.0"),
    ((X, True), {}, ValueError, "k must be an integer of at least 1, got True"),
    ((X, 9), {}, ValueError, r"k must be in \[1, 8\], the number of classes, got 9"),
    ((X, 6), {"vocab_size": 5}, ValueError, r"k must be in \[1, 5\], the number of classes, got 6"),
    ((X, 31), {"weight": W}, ValueError, r"k must be in \[1, 30\], the number of classes, got 31"),
    ((X, 2), {"vocab_size": 9}, ValueError, "vocab_size must be at most 8, got 9"),
    ((X, 2), {"vocab_size": 0}, ValueError, "vocab_size must be an integer of at least 1, got 0"),
    ((X, 2), {"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    ((X, 2), {"temperature": INF}, ValueError, "temperature must be finite, got inf"),
    ((X, 2), {"logit_scale": -1.0}, ValueError, "logit_scale must be positive, got -1.0"),
    ((X, 2), {"logit_scale": (1.0, 2.0)}, TypeError, "logit_scale must be a number, got tuple"),
    ((X, 2), {"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
    ((X, 2), {"bias": X[0]}, ValueError, "bias must not be given without weight"),
    ((X, 2), {"chunk_rows": 2}, ValueError, "chunk_rows must not be given without weight"),
    ((X, 2), {"chunk_bytes": 2}, ValueError, "chunk_bytes must not be given without weight"),
    ((X, 2), {"weight": W.T}, ValueError, r"weight must be \[vocab, 8\] for hidden states "
     r"\[2, 8\], got \[8, 30\]"),
    ((X, 2), {"weight": W[0]}, ValueError, r"weight must be \[rows, classes\], got shape \[8\]"),
    ((X, 2), {"weight": W.half()}, TypeError, "weight must have the dtype of the hidden states "
     "float32, got float16"),
    ((X, 2), {"weight": W, "bias": X[0]}, ValueError, r"bias must be \[30\], got \[8\]"),
    ((X, 2), {"weight": W, "chunk_rows": 0}, ValueError, "chunk_rows must be an integer of at "
     "least 1, got 0"),
    ((X, 2), {"weight": W, "chunk_rows": 1, "chunk_bytes": 9}, ValueError, "chunk_rows must not be "
     "given together with chunk_bytes"),
    ((X, 2), {"weight": W, "chunk_bytes": 0}, ValueError, "chunk_bytes must be positive, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "kind", "message"), REFUSALS, ids=str)
def test_refusals(
    args: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"^topk_logprobs: {message}$"):
        kdkernels.topk_logprobs(*args, **options)


def test_what_a_backend_cannot_run(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference runs everything")
    with pytest.raises(NotImplementedError, match="float32, bfloat16 and float16, not float64"):
        kdkernels.topk_logprobs(X.to(backend.device).double(), 2, backend=backend.name)
    if (backend.name, backend.device) != ("native", "cpu"):
        wide = torch.zeros(1, 2000, device=backend.device)
        with pytest.raises(NotImplementedError, match="find at most 1024 classes, not 1025"):
            kdkernels.topk_logprobs(wide, 1025, backend=backend.name)


def test_the_choice_falls_back() -> None:
    assert kdkernels.topk_logprobs(X.double(), 2).logprobs.dtype == torch.float64
    kdkernels.topk_logprobs(torch.zeros(1, 5000), 4000)
    assert kdkernels.explain("topk_logprobs", X).startswith("topk_logprobs on cpu: ")
