"""Matching hidden states as users call it: reductions, masks, projections, papers' formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.budget import assert_within_budget
from torch import Tensor, nn

from kdkernels import HiddenMatchLoss, HiddenMatchMany, hidden_match_loss, hidden_match_many

Batch = tuple[Tensor, Tensor, Tensor]
KINDS = ("mse", "cosine", "pkd", "smooth_l1")


def close(a: Tensor, b: Tensor | float) -> None:
    """Equal up to some roundings of float32."""
    b = torch.as_tensor(b, dtype=torch.float64)
    assert_within_budget(a.detach(), b.detach(), b.detach(), torch.float32, unit=4.0)


@pytest.fixture
def batch() -> Batch:
    """Two sentences, of five and three tokens."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 12), mask


def test_reductions(batch: Batch) -> None:
    s, t, mask = batch
    for kind in KINDS:
        rows = hidden_match_loss(s, t, kind=kind, mask=mask, reduction="none")
        assert rows.shape == (2, 5) and (rows[1, 3:] == 0).all()
        close(hidden_match_loss(s, t, kind=kind, mask=mask), rows.sum() / 8)
        close(hidden_match_loss(s, t, kind=kind, mask=mask, reduction="sum"), rows.sum())
        close(hidden_match_loss(s, t, kind=kind, mask=mask, reduction="batchmean"), rows.sum() / 2)
        for count in (4, torch.tensor(4)):
            found = hidden_match_loss(s, t, kind=kind, mask=mask, num_items_in_batch=count)
            close(found, rows.sum() / 4)
    assert hidden_match_loss(s[0, 0], t[0, 0], reduction="none").shape == ()
    assert hidden_match_loss(s[:0], t[:0], reduction="none").shape == (0, 5)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_accumulation_equals_one_batch(micro_batches: int) -> None:
    s, t = torch.randn(8, 3, 16, requires_grad=True), torch.randn(8, 3, 16)
    mask = torch.rand(8, 3) > 0.4
    whole = hidden_match_loss(s, t, mask=mask, kind="cosine")
    chunks = zip(*(x.chunk(micro_batches) for x in (s, t, mask)), strict=True)
    parts = sum(
        hidden_match_loss(a, b, mask=m, kind="cosine", num_items_in_batch=mask.sum())
        for a, b, m in chunks
    )
    close(parts, whole)  # type: ignore[arg-type]
    grads = torch.autograd.grad(parts, s)[0], torch.autograd.grad(whole, s)[0]  # type: ignore[arg-type]
    close(*grads)


def test_weights_of_examples(batch: Batch) -> None:
    s, t, mask = batch
    rows = hidden_match_loss(s, t, mask=mask, reduction="none")
    weights = torch.tensor([0.5, 3.0])
    found = hidden_match_loss(s, t, mask=mask, row_weights=weights)
    close(found, (rows * weights[:, None]).sum() / 8)
    close(found, hidden_match_loss(s, t, mask=mask, row_weights=weights[:, None].expand(2, 5)))
    # One example's weight has an effect on that example only.
    grad = torch.autograd.grad(found, s)[0]
    other = hidden_match_loss(s, t, mask=mask, row_weights=torch.tensor([0.5, 9.0]))
    changed = torch.autograd.grad(other, s)[0]
    assert torch.equal(grad[0], changed[0])
    close(changed[1], 3 * grad[1])
    padded = torch.ones(2, 5)
    padded[1, 4] = float("nan")
    close(hidden_match_loss(s, t, mask=mask, row_weights=padded), rows.sum() / 8)


def test_many_is_the_weighted_sum(batch: Batch) -> None:
    _, _, mask = batch
    pairs = [
        (torch.randn(2, 5, width, requires_grad=True), torch.randn(2, 5, width))
        for width in (8, 12, 3)
    ]
    single = [hidden_match_loss(s, t, mask=mask, kind="smooth_l1", beta=0.3) for s, t in pairs]
    options: dict[str, Any] = {"mask": mask, "kind": "smooth_l1", "beta": 0.3}
    close(hidden_match_many(pairs, **options), sum(single))  # type: ignore[arg-type]
    weights = [0.5, 2.0, -1.0]
    wanted = sum(w * one for w, one in zip(weights, single, strict=True))
    parts = hidden_match_many(pairs, weights=weights, return_parts=True, **options)
    close(parts.loss, wanted)  # type: ignore[arg-type]
    close(parts.layers, torch.stack(single))
    assert parts.n_valid == 8 and not parts.layers.requires_grad
    rows = hidden_match_many(pairs, weights=weights, reduction="none", **options)
    close(rows.sum() / 8, wanted)  # type: ignore[arg-type]
    leaves = [s for s, _ in pairs]
    for a, b in zip(
        torch.autograd.grad(parts.loss, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        close(a, b)


def test_projections(batch: Batch) -> None:
    """A linear map is fused, anything else is called; pairs without one need none."""
    s, t, mask = batch
    wide = torch.randn(2, 5, 20)
    linear, other = nn.Linear(12, 20), nn.Sequential(nn.Linear(12, 20), nn.Tanh())
    for kind in KINDS:
        found = hidden_match_many(
            [(s, wide), (s, t), (s, wide)],
            projections=[linear, None, other],
            weights=[1.0, 2.0, 3.0],
            kind=kind,
            mask=mask,
            return_parts=True,
        )
        single = [
            hidden_match_loss(linear(s), wide, kind=kind, mask=mask),
            hidden_match_loss(s, t, kind=kind, mask=mask),
            hidden_match_loss(s, wide, kind=kind, mask=mask, projection=other),
        ]
        wanted = single[0] + 2 * single[1] + 3 * single[2]
        close(found.loss, wanted)
        close(found.layers, torch.stack(single))
        leaves = [s, linear.weight, linear.bias, other[0].weight]
        for a, b in zip(
            torch.autograd.grad(found.loss, leaves),
            torch.autograd.grad(wanted, leaves),
            strict=True,
        ):
            close(a, b)
    rows = hidden_match_loss(s, wide, projection=linear, mask=mask, reduction="none")
    close(rows, hidden_match_loss(linear(s), wide, mask=mask, reduction="none"))


# ---- papers' formulas, written from the papers ---------------------------------------------------


def test_parity_tinybert(batch: Batch) -> None:
    """L_hidn = MSE(H^S W_h, H^T), W_h learned; here over all tokens, as without padding."""
    s, _, _ = batch
    teacher = torch.randn(2, 5, 20)
    fit = nn.Linear(12, 20)
    total = 0.0
    for b in range(2):
        for i in range(5):
            projected = fit.weight.double() @ s[b, i].double() + fit.bias.double()
            total = total + (projected - teacher[b, i].double()).square().sum() / 20
    close(hidden_match_loss(s, teacher, projection=fit), total / 10)  # type: ignore[arg-type]


def test_parity_patient_kd() -> None:
    """L_PT on [CLS]: the squared distance of normalised states, by features, over layers."""
    student = [torch.randn(4, 6, 16) for _ in range(3)]
    teacher = [torch.randn(4, 6, 16) for _ in range(3)]
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for b in range(4):
            u, v = s[b, 0].double(), t[b, 0].double()
            total = total + ((u / u.norm() - v / v.norm()) ** 2).mean() / 4
    pairs = [(s[:, 0], t[:, 0]) for s, t in zip(student, teacher, strict=True)]
    close(hidden_match_many(pairs, kind="pkd"), total)  # type: ignore[arg-type]


def test_parity_distilbert(batch: Batch) -> None:
    """CosineEmbeddingLoss with target 1 on the states of tokens that are no padding."""
    s, t, mask = batch
    chosen = [x[mask.bool()].double() for x in (s, t)]
    wanted = F.cosine_embedding_loss(*chosen, torch.ones(8))
    close(hidden_match_loss(s, t, kind="cosine", mask=mask), wanted)


def test_parity_smooth_l1(batch: Batch) -> None:
    s, t, _ = batch
    for beta in (0.0, 0.5, 1.0):
        wanted = F.smooth_l1_loss(s.double(), t.double(), beta=beta)
        close(hidden_match_loss(s, t, kind="smooth_l1", beta=beta), wanted)


# ---- modules, refusals ---------------------------------------------------------------------------


def test_modules(batch: Batch) -> None:
    s, t, mask = batch
    module = HiddenMatchLoss(kind="cosine")
    assert torch.equal(module(s, t, mask=mask), hidden_match_loss(s, t, kind="cosine", mask=mask))
    many = HiddenMatchMany(kind="pkd", weights=[2.0])
    close(many([(s, t)]), 2 * hidden_match_loss(s, t, kind="pkd"))
    assert "kind='pkd'" in repr(many)
    with pytest.raises(TypeError, match="HiddenMatchLoss: kinds must be one of kind"):
        HiddenMatchLoss(kinds="mse")


S, T = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)
LINEAR = nn.Linear(8, 4)
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"pairs": []}, ValueError, r"pairs must be \(student, teacher\) tensors, got \[\]"),
    ({"pairs": S}, ValueError, "pairs must be .* got a Tensor"),
    ({"pairs": [S]}, ValueError, r"pairs\[0\] must be a \(student, teacher\) pair, got a Tensor"),
    ({"pairs": [(S, None)]}, TypeError, "teacher must be a Tensor, got NoneType"),
    ({"pairs": [(S, T[:1])]}, ValueError, r"leading shape of student \[2, 3\], got \[1, 3, 8\]"),
    ({"pairs": [(S, T), (S[0], T[0])]}, ValueError, r"student must be \[2, 3, 'width'\], got"),
    ({"pairs": [(S, T[..., :4])]}, ValueError, "width of student 8, got 4; pass a projection"),
    ({"pairs": [(S, T.long())]}, TypeError, r"teachers\[0\] must be float32, .* got int64"),
    ({"pairs": [(S, T.clone().requires_grad_())]}, ValueError, "must not require grad"),
    ({"projections": [LINEAR]}, ValueError, "width of the projected student 4, got 8"),
    ({"projections": [nn.Linear(5, 8)]}, ValueError, "projection must take width 8, got in_feat"),
    ({"projections": []}, ValueError, "projections must have an entry for each of the 1 pairs"),
    ({"weights": [1.0, 2.0]}, ValueError, "weights must have an entry for each of the 1 pairs"),
    ({"weights": [float("nan")]}, ValueError, "weights must be finite, got nan"),
    ({"kind": "l2"}, ValueError, "kind must be one of mse, smooth_l1, cosine, pkd, got 'l2'"),
    ({"kind": "smooth_l1", "beta": -1.0}, ValueError, r"beta must be .* got -1.0"),
    ({"reduction": "element"}, ValueError, "reduction must be one of mean, batchmean, sum, none"),
    ({"reduction": "none", "return_parts": True}, ValueError, "must not be 'none' with"),
    ({"mask": torch.ones(2)}, ValueError, r"mask must have the leading shape of student \[2, 3\]"),
    ({"row_weights": torch.ones(3)}, ValueError, r"row_weights must .* \[2, 3\] or its first"),
    ({"row_weights": torch.tensor([1.0, float("inf")])}, ValueError, "row_weights must be finite"),
    ({"num_items_in_batch": -1}, ValueError, "num_items_in_batch must be"),
    ({"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch must be one number"),
    ({"backend": "fast"}, ValueError, "backend must be one of native, triton, reference"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(
        error, match=f"^hidden_match_many: .*{message}|^hidden_match_many: {message}"
    ):
        hidden_match_many(**{"pairs": [(S, T)], **change})


def test_float64_runs_by_the_reference() -> None:
    s = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    loss = hidden_match_loss(s, torch.randn(4, 8, dtype=torch.float64), kind="cosine")
    assert loss.dtype == torch.float64
    with pytest.raises(NotImplementedError, match="backend 'native' cannot run this call"):
        hidden_match_loss(s, s.detach(), backend="native")
