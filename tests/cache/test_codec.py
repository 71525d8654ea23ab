"""Packed rows: exact ids, log-probabilities within a step, the mass kept, few bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdkernels
from kdkernels import _native
from kdkernels.api.cache import TopKCodec, estimate_bytes
from kdkernels.bench.topk_cache import kl_pair, peaked_logits

INF = math.inf


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    logprobs, ids = logits.double().log_softmax(-1).topk(k)
    return ids, logprobs.float()


def check_round_trip(codec: TopKCodec, ids: Tensor, logprobs: Tensor) -> None:
    """What decoding promises, whatever the row."""
    packed = codec.encode(ids, logprobs)
    assert packed.shape == (len(ids), codec.row_bytes)
    got_ids, got = codec.decode(packed)
    assert got_ids.dtype == torch.int64 and got.dtype == torch.float32
    assert (got[:, :-1] >= got[:, 1:]).all()
    for row in range(len(ids)):
        real = ids[row] >= 0
        count = int(real.sum())
        assert (got_ids[row, count:] == -1).all() and (got[row, count:] == -INF).all()
        given_values = dict(zip(ids[row][real].tolist(), logprobs[row][real].tolist(), strict=True))
        found = dict(zip(got_ids[row, :count].tolist(), got[row, :count].tolist(), strict=True))
        assert found.keys() == given_values.keys()
        finite = [x for x in given_values.values() if x > -INF]
        mass, got_mass = (sum(map(math.exp, x.values())) for x in (given_values, found))
        assert got_mass <= 1.0
        assert got_mass == pytest.approx(min(mass, 1.0), rel=2e-6)
        # Half a step of rounding, and as much again for keeping the mass.
        step = (max(finite) - min(finite)) * (1 + 2**-7) / (2**codec.bits - 2) if finite else 0.0
        for number, value in given_values.items():
            if value == -INF:
                assert found[number] == -INF
            else:
                assert found[number] == pytest.approx(value, abs=step + 1e-5)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_round_trip(data: st.DataObject) -> None:
    vocab = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([1000, 49152, 151936, 2**31])))
    k = data.draw(st.integers(1, min(vocab, 80)))
    bits = data.draw(st.integers(4, 16))
    rows = []
    for _ in range(data.draw(st.integers(0, 4))):
        count = data.draw(st.integers(0, k))
        ids = data.draw(
            st.lists(st.integers(0, vocab - 1), min_size=count, max_size=count, unique=True)
        )
        logit = st.one_of(st.floats(-30, 10, width=32), st.just(-INF))
        logits = data.draw(st.lists(logit, min_size=count, max_size=count))
        tail = data.draw(st.floats(-20, 10))
        total = torch.tensor([*logits, tail], dtype=torch.float64).logsumexp(0)
        values = (torch.tensor(logits, dtype=torch.float64) - total).tolist()
        slots = data.draw(st.permutations(range(k)))
        row = [(-1, -INF)] * k
        for slot, entry in zip(slots, zip(ids, values, strict=True), strict=False):
            row[slot] = entry
        rows.append(row)
    table = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), k, 2)
    check_round_trip(
        TopKCodec(k, vocab, bits), table[..., 0].to(torch.int64), table[..., 1].float()
    )


@pytest.mark.parametrize(("k", "vocab"), [(1, 1), (1, 151936), (50, 50), (3000, 3000), (64, 65)])
def test_extremes(k: int, vocab: int) -> None:
    check_round_trip(TopKCodec(k, vocab), *top(5 * torch.randn(3, vocab), k))


def test_special_rows() -> None:
    codec = TopKCodec(4, 1000)
    ids = torch.tensor([[-1] * 4, [3, 1, -1, 2], [9, 8, 7, 6], [0, 999, 500, 1]])
    logprobs = torch.tensor(
        [[-INF] * 4, [-1.0, -INF, -INF, -2.0], [-INF] * 4, [math.log(0.25)] * 4]
    )
    check_round_trip(codec, ids, logprobs)
    packed = codec.encode(ids, logprobs)
    assert not packed[0].any()  # what is not written is padding
    # Equal ones come in the order of their ids.
    assert codec.decode(packed)[0][3].tolist() == [0, 1, 500, 999]


def test_order_of_entries_does_not_matter() -> None:
    codec = TopKCodec(64, 49152)
    ids, logprobs = top(torch.randn(20, 49152) * 3, 64)
    shuffled = torch.randperm(64)
    packed = codec.encode(ids, logprobs)
    assert (codec.encode(ids[:, shuffled], logprobs[:, shuffled]) == packed).all()
    assert (codec.decode(packed)[0][:, 0] == ids[:, 0]).all()


def test_a_masked_class_costs_the_others_nothing() -> None:
    """A logit of -1e9 would otherwise stretch the steps of its row to millions."""
    codec = TopKCodec(3, 10)
    ids = torch.tensor([[1, 2, 3]])
    logprobs = torch.tensor([[math.log(0.7), math.log(0.3), -1e9]])
    _, got = codec.decode(codec.encode(ids, logprobs))
    assert got[0, :2].tolist() == pytest.approx(logprobs[0, :2].tolist(), abs=1e-3)
    assert got[0, 2] == -INF


def test_strided_input() -> None:
    codec = TopKCodec(10, 100)
    ids, logprobs = top(torch.randn(6, 100), 10)
    packed = codec.encode(ids, logprobs)
    assert (codec.encode(ids.T.contiguous().T, logprobs.T.contiguous().T) == packed).all()
    assert torch.equal(codec.decode(packed[::2])[0], codec.decode(packed)[0][::2])
    with pytest.raises(TypeError, match="TopKCodec: rows must be uint8, got int64"):
        codec.decode(packed.astype(np.int64))


def test_half_precision_input() -> None:
    ids, logprobs = top(torch.randn(5, 100), 10)
    codec = TopKCodec(10, 100)
    got = codec.decode(codec.encode(ids.int(), logprobs.bfloat16()))[1]
    assert (got.exp().sum(-1) - logprobs.bfloat16().float().exp().sum(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("vocab", [151936, 49152])
def test_at_most_three_bytes_an_entry(vocab: int) -> None:
    codec = TopKCodec(64, vocab)
    packed = codec.encode(*top(torch.randn(2, vocab), 64))
    assert packed.nbytes / 2 / 64 <= 3.0
    assert packed.nbytes == estimate_bytes(2, 64, vocab)


@pytest.mark.parametrize(
    ("vocab", "noise", "worst"),
    [(49152, 0.1, 0.03), (49152, 0.3, 0.01), (49152, 1.0, 0.01), (151936, 0.3, 0.01)],
)
def test_kl_is_kept(vocab: int, noise: float, worst: float) -> None:
    """A student's KL errs below 1 %; 99 rows of 100 too, unless the KL is near nothing (0.002)."""
    generator = torch.Generator().manual_seed(1)
    teacher = peaked_logits(100, vocab, generator)
    student = teacher + noise * torch.randn(teacher.shape, generator=generator)
    exact, stored = kl_pair(teacher, student, 64, 8)
    error = (stored - exact).abs() / exact
    assert error.mean() < 0.01
    assert error.quantile(0.99) < worst
    coarse = (kl_pair(teacher, student, 64, 5)[1] - exact).abs() / exact
    assert coarse.mean() > 3 * error.mean()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_loss_is_kept(divergence: str) -> None:
    """``topk_kd_loss`` and its gradient, from stored rows and from the teacher's own."""
    generator = torch.Generator().manual_seed(1)
    teacher = peaked_logits(64, 5000, generator)
    student = teacher + 0.5 * torch.randn(teacher.shape, generator=generator)
    own = kdkernels.topk_logprobs(teacher, 64, temperature=2.0)
    codec = TopKCodec(64, 5000)
    losses, grads = [], []
    for ids, logprobs in ((own.ids, own.logprobs), codec.decode(codec.encode(*own[:2]))):
        leaf = student.clone().requires_grad_()
        loss = kdkernels.topk_kd_loss(leaf, ids, logprobs, temperature=2.0, divergence=divergence)
        (grad,) = torch.autograd.grad(loss, leaf)
        losses.append(loss.item())
        grads.append(grad)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert (grads[1] - grads[0]).norm() < 0.01 * grads[0].norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [[1, 1, 2]]}, "ids must differ within a row, got 1 twice in row 0"),
        ({"ids": [[1, 10, 2]]}, r"ids must be -1 or in \[0, 10\), got 10 in row 0"),
        ({"ids": [[1, -2, 2]]}, r"ids must be -1 or in \[0, 10\), got -2 in row 0"),
        ({"ids": [[1, -1, 2]]}, "logprobs must be -inf where the id is -1, got -2.0"),
        ({"logprobs": [[-1.0, math.nan, -2.0]]}, "logprobs must not be NaN"),
        ({"logprobs": [[0.0, -0.5, -2.0]]}, "sum is at most 1, got a sum of 1.7"),
        ({"logprobs": [[INF, -0.5, -2.0]]}, "sum is at most 1, got a sum of inf"),
        ({"logprobs": [[-1.0, -2.0]]}, r"logprobs must be \[rows, 3\], got \(1, 2\)"),
        ({"ids": [[1, 2]]}, r"ids must be \[rows, 3\], got \(1, 2\)"),
        ({"ids": [1, 2, 3]}, r"ids must be \[rows, 3\], got \(3,\)"),
        ({"ids": [[1, 2, 3]] * 2}, "logprobs must have 2 rows, got 1"),
        ({"ids": [[1.0, 2.0, 3.0]]}, "ids must be integers, got torch.float32"),
        ({"logprobs": [[-1, -2, -3]]}, "logprobs must be floating-point, got torch.int64"),
    ],
)
def test_encode_refuses(change: dict[str, list[list[float]]], message: str) -> None:
    values = {"ids": [[3, 1, 2]], "logprobs": [[-1.0, -2.0, -3.0]], **change}
    with pytest.raises((ValueError, TypeError), match=f"TopKCodec: .*{message}"):
        TopKCodec(3, 10).encode(torch.tensor(values["ids"]), torch.tensor(values["logprobs"]))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ((0, 10, 8), r"k must be in \[1, 65535\], got 0"),
        ((11, 10, 8), "k must be at most vocab_size 10, got 11"),
        ((70000, 100000, 8), r"k must be in \[1, 65535\], got 70000"),
        ((1, 0, 8), r"vocab_size must be in \[1, 2\^31\], got 0"),
        ((1, 10, 3), r"bits must be in \[4, 16\], got 3"),
        ((1, 10, 17), r"bits must be in \[4, 16\], got 17"),
        ((1.0, 10, 8), "k must be an integer, got 1.0"),
    ],
)
def test_format_refuses(form: tuple[int, int, int], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"TopKCodec: {message}"):
        TopKCodec(*form)


def test_damaged_bytes_are_refused_or_harmless() -> None:
    """Any bytes: an error, or rows whose ids are in the vocabulary."""
    source = np.random.default_rng(0)
    codec = TopKCodec(9, 300)
    good = codec.encode(*top(torch.randn(1, 300), 9))
    refused = 0
    for attempt in range(3000):
        row = good.copy()
        if attempt % 2:
            row = source.integers(0, 256, row.shape, np.uint8)
            row[0, 7], row[0, 3] = 0, 0x80 | row[0, 3]  # a possible count and first number
        else:
            row[0, source.integers(8, codec.row_bytes)] ^= 1 << source.integers(8)
        try:
            ids, _ = codec.decode(row)
        except ValueError as error:
            assert "rows must be what encode() made, got a damaged one in row 0" in str(error)
            refused += 1
        else:
            assert ((ids >= -1) & (ids < 300)).all()
    assert refused > 500


def test_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "host", lambda: None)
    with pytest.raises(NotImplementedError, match="TopKCodec: kdkernels must be installed with"):
        TopKCodec(1, 10)
