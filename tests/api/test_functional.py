"""The public losses: conventions, masks, reductions, refusals, against plain PyTorch."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.budget import assert_within_budget
from torch import Tensor

import kdkernels
from kdkernels import kd_loss

BACKENDS = ("reference", "native")


def eager(s: Tensor, t: Tensor, y: Tensor, alpha: float, temperature: float) -> Tensor:
    """The textbook composition."""
    kl = F.kl_div(
        F.log_softmax(s / temperature, -1),
        F.log_softmax(t / temperature, -1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    ce = F.cross_entropy(s, y, reduction="none")
    return ((1 - alpha) * ce + alpha * temperature**2 * kl)[y != -100].mean()


def close(a: Tensor, b: Tensor) -> None:
    assert_within_budget(a, b.double(), b, torch.float32)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    s = torch.randn(2, 5, 30, requires_grad=True)
    t, y = torch.randn(2, 5, 30), torch.randint(0, 30, (2, 5))
    y[0, 3] = -100
    return s, t, y


@pytest.mark.parametrize("backend", BACKENDS)
def test_textbook(batch: tuple[Tensor, Tensor, Tensor], backend: str) -> None:
    s, t, y = batch
    loss = kd_loss(s, t, y, temperature=2.0, alpha=0.3, backend=backend)
    expected = eager(s.flatten(0, 1).double(), t.flatten(0, 1).double(), y.flatten(), 0.3, 2.0)
    close(loss, expected)
    close(torch.autograd.grad(loss, s)[0], torch.autograd.grad(expected, s)[0])


def test_default_weights(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s, t, y = batch
    close(kd_loss(s, t, y), kd_loss(s, t, y, alpha=0.5))
    close(kd_loss(s, t), kd_loss(s, t, ce_weight=0.0, kd_weight=1.0))
    close(kd_loss(s, None, y), F.cross_entropy(s.flatten(0, 1), y.flatten()))


def test_reductions(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s, t, y = batch
    rows = kd_loss(s, t, y, reduction="none")
    assert rows.shape == (2, 5) and rows[0, 3] == 0
    close(kd_loss(s, t, y, reduction="sum"), rows.sum())
    close(kd_loss(s, t, y), rows.sum() / 9)
    close(kd_loss(s, t, y, reduction="batchmean"), rows.sum() / 2)
    close(kd_loss(s, t, y, num_items_in_batch=4), rows.sum() / 4)
    close(kd_loss(s, t, y, num_items_in_batch=torch.tensor(4)), rows.sum() / 4)
    kl = kd_loss(s, t, y, ce_weight=0.0, kd_weight=1.0)
    close(kd_loss(s, t, y, ce_weight=0.0, kd_weight=1.0, reduction="element_mean"), kl / 30)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_accumulation_equals_one_batch(micro_batches: int) -> None:
    """The sum over micro-batches with uneven valid counts is the loss of the whole batch."""
    s, t = torch.randn(8, 50, requires_grad=True), torch.randn(8, 50)
    y = torch.randint(0, 50, (8,))
    y[[0, 1, 5]] = -100
    whole = kd_loss(s, t, y)
    parts = [
        kd_loss(*chunk, num_items_in_batch=5)
        for chunk in zip(*(x.chunk(micro_batches) for x in (s, t, y)), strict=True)
    ]
    close(sum(parts), whole)
    close(torch.autograd.grad(sum(parts), s)[0], torch.autograd.grad(whole, s)[0])


def test_mask_and_row_weights(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s, t, y = batch
    mask = torch.ones(2, 5)
    mask[1, 2:] = 0
    rows = kd_loss(s, t, y, reduction="none")
    close(kd_loss(s, t, y, mask=mask), rows[:, :].where(mask.bool(), 0.0).sum() / 6)
    close(kd_loss(s, t, y, mask=mask.bool()), kd_loss(s, t, y, mask=mask))
    kd_only = kd_loss(s, t, mask=mask)
    close(kd_only, kd_loss(s, t, reduction="none").where(mask.bool(), 0.0).sum() / 7)
    weights = torch.rand(2, 5)
    close(kd_loss(s, t, y, row_weights=weights), (rows * weights).sum() / 9)


def test_shift_is_the_manual_slice(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s, t, y = batch
    weights = torch.rand(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    shifted = kd_loss(s, t, y, shift=1, mask=mask, row_weights=weights, return_parts=True)
    manual = kd_loss(
        s[:, :-1],
        t[:, :-1],
        y[:, 1:],
        mask=mask[:, 1:],
        row_weights=weights[:, 1:],
        return_parts=True,
    )
    for a, b in zip(shifted, manual, strict=True):
        close(a.detach(), b.detach())
    grad = torch.autograd.grad(shifted.loss, s)[0]
    assert (grad[:, -1] == 0).all()
    close(grad, torch.autograd.grad(manual.loss, s)[0])
    close(kd_loss(s, t, shift=1), kd_loss(s[:, :-1], t[:, :-1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts(batch: tuple[Tensor, Tensor, Tensor], backend: str) -> None:
    s, t, y = batch
    options: dict[str, Any] = {"temperature": 3.0, "z_loss": 0.1, "backend": backend}
    parts = kd_loss(s, t, y, ce_weight=0.0, kd_weight=0.7, return_parts=True, **options)
    flat, labels = (
        s.flatten(0, 1).double(),
        y.flatten(),
    )  # the formula's own rounding must not count
    close(parts.ce, F.cross_entropy(flat, labels))
    kl = eager(flat, t.flatten(0, 1).double(), labels, 1.0, 3.0)
    close(parts.kd, kl)
    close(parts.extra, 0.1 * flat.logsumexp(1)[labels != -100].square().mean())
    close(parts.loss, 0.7 * parts.kd + parts.extra)
    assert parts.n_valid == 9
    assert not parts.kd.requires_grad and parts.loss.requires_grad
    without = kd_loss(s, t, y, alpha=0.0, return_parts=True)
    close(without.kd, eager(flat, t.flatten(0, 1).double(), labels, 1.0, 1.0))


def test_temperature_squared_once_and_never_on_ce(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s, t, y = batch
    on = kd_loss(s, t, y, temperature=4.0, return_parts=True)
    off = kd_loss(s, t, y, temperature=4.0, scale_t2=False, return_parts=True)
    close(on.kd, off.kd * 16)
    close(on.ce, off.ce)


def test_jsd_endpoints_are_the_divergences(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s, t, _ = batch
    close(kd_loss(s, t, divergence="jsd", beta=0.0), kd_loss(s, t))
    close(kd_loss(s, t, divergence="jsd", beta=1.0), kd_loss(s, t, divergence="reverse_kl"))
    assert kd_loss(s, t, divergence="jsd", beta=1e-6) < 1e-4


def test_jsd_near_its_endpoints_is_a_share_of_the_divergences(
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    """There the formula is beta (or 1 - beta) times the divergence that it is at the end."""
    s, t = (logits.double() for logits in batch[:2])
    small = 1e-5
    for beta, divergence in ((small, "forward_kl"), (1 - small, "reverse_kl")):
        near = kd_loss(s, t, divergence="jsd", beta=beta) / small
        torch.testing.assert_close(near, kd_loss(s, t, divergence=divergence), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocab_size_masks_padding(backend: str) -> None:
    """Padded heads of different widths: as if the columns were not there."""
    s, t = torch.randn(4, 12, requires_grad=True), torch.randn(4, 15)
    y = torch.randint(0, 10, (4,))
    options: dict[str, Any] = {"label_smoothing": 0.1, "backend": backend}
    loss = kd_loss(s, t, y, vocab_size=10, **options)
    cut = kd_loss(s[:, :10], t[:, :10], y, **options)
    close(loss, cut)
    grad = torch.autograd.grad(loss, s)[0]
    assert (grad[:, 10:] == 0).all()
    close(grad, torch.autograd.grad(cut, s)[0])
    with pytest.raises(
        ValueError, match=r"shape of student \[4, 12\], got \[4, 15\]; .*vocab_size"
    ):
        kd_loss(s, t, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_and_scale_of_each_model(backend: str) -> None:
    s, t = torch.randn(4, 12, requires_grad=True) * 5, torch.randn(4, 12) * 5
    loss = kd_loss(s, t, logit_scale=(0.5, 2.0), softcap=(4.0, None), backend=backend)
    close(loss, kd_loss(4.0 * torch.tanh(s * 0.5 / 4.0), t * 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_label_smoothing_conventions(classes: int, backend: str) -> None:
    z, y = torch.randn(6, classes), torch.randint(0, classes, (6,))
    close(
        kdkernels.label_smoothing_loss(z, y, label_smoothing=0.1, backend=backend),
        F.cross_entropy(z, y, label_smoothing=0.1),
    )
    target = torch.full((6, classes), 0.1 / (classes - 1)).scatter_(1, y[:, None], 0.9)
    close(
        kdkernels.label_smoothing_loss(
            z, y, label_smoothing=0.1, convention="tfkd", backend=backend
        ),
        -(target * z.log_softmax(1)).sum(1).mean(),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch's own, meant here
@pytest.mark.parametrize("reduction", ["mean", "element_mean"])
@pytest.mark.parametrize("mode", ["softmax_of_prob", "target"])
def test_tfkd_reg(mode: str, reduction: str, backend: str) -> None:
    classes, correct, temperature, alpha = 7, 0.9, 5.0, 0.3
    z, y = torch.randn(6, classes), torch.randint(0, classes, (6,))
    virtual = torch.full((6, classes), (1 - correct) / (classes - 1))
    virtual.scatter_(1, y[:, None], correct)
    if mode == "softmax_of_prob":
        teacher, log_student = (virtual / temperature).softmax(1), z.log_softmax(1)
    else:
        teacher = virtual.pow(1 / temperature)
        teacher, log_student = teacher / teacher.sum(1, True), (z / temperature).log_softmax(1)
    kl = F.kl_div(log_student, teacher, reduction="mean" if reduction != "mean" else "batchmean")
    close(
        kdkernels.tfkd_reg_loss(
            z,
            y,
            alpha=alpha,
            temperature=temperature,
            correct_prob=correct,
            multiplier=3.0,
            mode=mode,
            reduction=reduction,
            backend=backend,
        ),
        (1 - alpha) * F.cross_entropy(z, y) + alpha * 3.0 * kl,
    )


def test_tfkd_reg_is_label_smoothing() -> None:
    """At T = 1: eps = alpha (1 - A) K / (K - 1), up to the constant entropy of the teacher."""
    z, y = torch.randn(6, 3, requires_grad=True), torch.randint(0, 3, (6,))
    reg = kdkernels.tfkd_reg_loss(z, y, alpha=0.5, temperature=1.0, correct_prob=0.9, mode="target")
    smooth = kdkernels.label_smoothing_loss(z, y, label_smoothing=0.075)
    close(torch.autograd.grad(reg, z)[0], torch.autograd.grad(smooth, z)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_confidence_penalty(backend: str) -> None:
    z, y = torch.randn(6, 9), torch.randint(0, 9, (6,))
    p = z.softmax(1)
    close(
        kdkernels.confidence_penalty_loss(z, y, beta=0.2, backend=backend),
        F.cross_entropy(z, y) + 0.2 * (p * p.log()).sum(1).mean(),
    )


def test_tfkd_self_is_kd_with_weights() -> None:
    z, before, y = torch.randn(6, 9), torch.randn(6, 9), torch.randint(0, 9, (6,))

    def formula(z: Tensor, before: Tensor) -> Tensor:
        return 0.1 * F.cross_entropy(z, y) + 2.0 * eager(z, before, y, 1.0, 6.0) * 0.9

    actual = kdkernels.tfkd_self_loss(z, before, y, alpha=0.9, temperature=6.0, multiplier=2.0)
    oracle = formula(z.double(), before.double())
    assert_within_budget(actual, oracle, formula(z, before), torch.float32)


def test_inplace_gives_the_same_gradient(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s, _, y = batch
    weight = torch.randn(30, 40, requires_grad=True)
    results = []
    for inplace in (False, True):
        logits = s.detach() @ weight
        loss = kd_loss(logits, torch.zeros(2, 5, 40), y, inplace=inplace)
        results.append(torch.autograd.grad(loss * 2, weight)[0])
    assert torch.equal(*results)


def test_modules_and_functions_agree(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s, t, y = (x.flatten(0, 1) for x in batch)
    close(kdkernels.KDLoss(temperature=2.0)(s, t, y), kd_loss(s, t, y, temperature=2.0))
    close(kdkernels.KDLoss(temperature=2.0)(s, t, y, temperature=1.0), kd_loss(s, t, y))
    close(
        kdkernels.LabelSmoothingLoss(label_smoothing=0.2)(s, y),
        kdkernels.label_smoothing_loss(s, y, label_smoothing=0.2),
    )
    reg = {"alpha": 0.1, "temperature": 3.0}
    close(kdkernels.TfKDRegLoss(**reg)(s, y), kdkernels.tfkd_reg_loss(s, y, **reg))
    close(kdkernels.TfKDSelfLoss(**reg)(s, t, y), kdkernels.tfkd_self_loss(s, t, y, **reg))
    close(kdkernels.ConfidencePenaltyLoss()(s, y), kdkernels.confidence_penalty_loss(s, y))
    assert "temperature=2.0" in repr(kdkernels.KDLoss(temperature=2.0))


def test_integer_labels_of_any_width(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s, t, y = batch
    close(kd_loss(s, t, y.int()), kd_loss(s, t, y))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_whole_call(batch: tuple[Tensor, Tensor, Tensor], dynamic: bool) -> None:
    def step(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return kd_loss(s * 1.0, t, y, temperature=2.0, alpha=0.3, shift=1, label_smoothing=0.1)

    s, t, y = batch
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for function in (step, compiled):
        close(function(s, t, y), step(s, t, y))
        close(
            torch.autograd.grad(function(s, t, y), s)[0], torch.autograd.grad(step(s, t, y), s)[0]
        )


S, T, Y = torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((S, T, Y), {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ((S, T, Y), {"temperature": -1}, "temperature must be positive, got -1"),
        ((S, T, Y), {"temperature": math.nan}, "temperature must be finite, got nan"),
        ((S, T, Y), {"temperature": "2"}, "temperature must be a number, got str"),
        ((S, T, Y), {"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ((S, T, Y), {"alpha": 0.5, "kd_weight": 1.0}, "alpha must not be given together"),
        ((S, T, Y), {"kd_weight": 1.0}, "ce_weight and kd_weight must be given together"),
        ((S, T, Y), {"ce_weight": math.nan, "kd_weight": 1.0}, "ce_weight must be finite, got nan"),
        ((S, T), {"alpha": 0.5}, "labels must be given with a cross-entropy weight of 0.5"),
        ((S, None, Y), {"alpha": 0.5}, "teacher must be given with a KD weight of 0.5, got None"),
        ((S, T, Y), {"divergence": "kl"}, "divergence must be one of forward_kl.*got 'kl'"),
        ((S, T, Y), {"reduction": "avg"}, "reduction must be one of mean.*got 'avg'"),
        ((S, T, Y), {"beta": 2.0}, r"beta must be in \[0, 1\], got 2.0"),
        ((S, T, Y), {"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\], got -0.1"),
        ((S, T, Y), {"smoothing_convention": "x"}, "smoothing_convention must be one of torch"),
        ((S, T, Y), {"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ((S, T, Y), {"softcap": (1.0, 2.0, 3.0)}, "softcap must be a number or a .* pair"),
        ((S, T, Y), {"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ((S, T, Y), {"vocab_size": 4.0}, "vocab_size must be an integer of at least 1, got 4.0"),
        ((S, T, Y), {"ignore_index": None}, "ignore_index must be an integer, got None"),
        ((S, T, Y), {"softcap": [1.0, 2.0]}, "must be numbers or tuples, got a list"),
        (([1.0], T, Y), {}, "student_logits must be a Tensor, got list"),
        ((torch.zeros(3, 0), None, Y), {}, r"at least one class, got shape \[3, 0\]"),
        ((S[0], T[0], Y[0]), {"shift": 1}, "with shift=1, got shape"),
        ((S, T, Y), {"num_items_in_batch": "3"}, "num_items_in_batch must be a number, got str"),
        ((S, T, Y), {"mask": torch.ones(3, device="meta")}, "mask must be on cpu, got meta"),
        ((S, T, Y.to(torch.complex64)), {}, "labels must be integers, got torch.complex64"),
        ((S, T, Y), {"backend": ""}, "kd_loss: backend must be one of"),
        ((S, T, Y), {"vocab_size": 5}, "at least 5 classes, got 4"),
        ((S, T, Y), {"shift": 2}, "shift must be 0 or 1, got 2"),
        (
            (S, T, Y),
            {"num_items_in_batch": -1},
            "num_items_in_batch must be finite and 0 or more, got -1",
        ),
        ((S, T, Y), {"num_items_in_batch": T}, r"must be one number, got shape \[3, 4\]"),
        ((S, T, Y), {"mask": torch.ones(2)}, r"mask must have the leading shape of student \[3\]"),
        ((S, T, Y[:2]), {}, r"labels must be \[3\], got shape \[2\]"),
        ((S, T, Y.float()), {}, "labels must be integers, got torch.float32"),
        ((S, T, Y + 4), {}, r"labels must be in \[0, 4\) or ignore_index -100, got 4 in row 0"),
        ((S, T, Y - 1), {}, r"labels must be in \[0, 4\) or ignore_index -100, got -1 in row 0"),
        (
            (S, T, Y),
            {"row_weights": torch.tensor([1.0, torch.nan, 1.0])},
            "row_weights must be finite, got NaN or inf",
        ),
        ((S, T, Y), {"reduction": "none", "return_parts": True}, "must not be 'none' with"),
        ((S, T, Y), {"backend": "cuda"}, "backend must be one of native, triton, reference"),
        ((S, torch.zeros(2, 4), Y), {}, r"teacher must have the shape of student \[3, 4\]"),
        ((torch.zeros(()), None, Y), {}, "student_logits must be"),
        ((S.int(), T, Y), {}, "student must be float32, bfloat16, float16 or float64, got int32"),
    ],
)
def test_refusals(args: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
        kd_loss(*args, **options)
    assert "\n" not in str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 2.0, "temperature": 1.0}, r"tfkd_reg_loss: alpha must be in \[0, 1\], got 2.0"),
        ({"alpha": 0.1, "temperature": 0.0}, "tfkd_reg_loss: temperature must be positive"),
        ({"alpha": 0.1, "temperature": 1.0, "mode": "x"}, "mode must be one of softmax_of_prob"),
        ({"alpha": 0.1, "temperature": 1.0, "correct_prob": 1.5}, "correct_prob must be in"),
        ({"alpha": 0.1, "temperature": 1.0, "correct_prob": 0.0}, "correct_prob must be positive"),
        ({"alpha": 0.1, "temperature": 1.0, "multiplier": math.nan}, "multiplier must be finite"),
    ],
)
def test_tfkd_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kdkernels.tfkd_reg_loss(S, Y, **options)


def test_any_ignore_index_without_labels(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s, t, _ = batch
    mask = torch.ones(2, 5)
    mask[0, 0] = 0
    close(kd_loss(s, t, mask=mask, ignore_index=0), kd_loss(s, t, mask=mask))
    close(kd_loss(s, t, shift=1, ignore_index=0), kd_loss(s, t, shift=1))


def test_empty_sequences(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s = torch.randn(2, 0, 7, requires_grad=True)
    labels = torch.zeros(2, 0, dtype=torch.int64)
    assert kd_loss(s, torch.randn(2, 0, 7), labels, shift=1) == 0


def test_weight_of_a_row_left_out_may_be_anything(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    s, t, y = batch
    weights = torch.ones(2, 5)
    weights[0, 3] = torch.nan
    close(kd_loss(s, t, y, row_weights=weights), kd_loss(s, t, y))


def test_extreme_virtual_teachers_stay_finite() -> None:
    for mode in ("softmax_of_prob", "target"):
        for temperature in (1e-4, 1e4):
            loss = kdkernels.tfkd_reg_loss(S, Y, alpha=0.5, temperature=temperature, mode=mode)
            assert torch.isfinite(loss)


def test_module_refuses_unknown_options() -> None:
    with pytest.raises(TypeError, match="KDLoss: temprature must be one of temperature"):
        kdkernels.KDLoss(temprature=2.0)


def test_examples_in_docstrings_run() -> None:
    modules = (
        kdkernels.api.functional,
        kdkernels.api.topk,
        kdkernels.api.nn,
        kdkernels.api.compat,
        kdkernels.api.averager,
        kdkernels.api.averaging,
        kdkernels.api.backends,
        kdkernels.api.capture,
        kdkernels.api.layers,
        kdkernels._backend,
    )
    for module in modules:
        result = doctest.testmod(module)
        assert result.failed == 0, module
    assert doctest.testmod(kdkernels.api.functional).attempted > 10
