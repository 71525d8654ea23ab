"""Label regularisers: the exact identities between them, their gradients, their refusals."""

from __future__ import annotations

import doctest
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kdkernels
from kdkernels import LabelRegulariser
from kdkernels.api.methods.label_regularisation import METHODS

ROWS = 7


def _batch(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    draw = {"generator": generator, "dtype": torch.float64}
    student, teacher = torch.randn(ROWS, classes, **draw), torch.randn(ROWS, classes, **draw)
    labels = torch.randint(classes, (ROWS,), generator=generator)
    return student, teacher, labels


def _loss_and_gradient(
    method: str, classes: int, teacher: Tensor | None = None, **parameters: Any
) -> tuple[Tensor, Tensor]:
    student, others, labels = _batch(classes)
    student.requires_grad_(True)
    regulariser = LabelRegulariser(method, **parameters)
    if regulariser.needs_teacher:
        loss = regulariser(student, labels, others if teacher is None else teacher)
    else:
        loss = regulariser(student, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


# The virtual teacher's probability enters the float64 kernel as a float32 number.
VIRTUAL = torch.finfo(torch.float32).eps
EXACT = 64 * torch.finfo(torch.float64).eps


def _close(got: Tensor, wanted: Tensor, eps: float = EXACT) -> None:
    torch.testing.assert_close(got, wanted, rtol=eps, atol=eps)


def _target(method: str, classes: int, teacher: Tensor, labels: Tensor) -> Tensor:
    """The soft label of a method at its defaults, at temperature 1, written out."""
    hard = F.one_hot(labels, classes).double()
    if method == "ls":
        return 0.9 * hard + 0.1 / classes
    if method == "tf_reg":
        return 0.5 * hard + 0.5 * torch.where(hard > 0, 0.9, 0.1 / (classes - 1))
    if method in ("kd", "self_kd", "tf_self"):
        return 0.5 * hard + 0.5 * teacher.softmax(-1)
    return hard


@pytest.mark.parametrize("classes", [2, 3, 9])
@pytest.mark.parametrize("method", ["ft", "ls", "tf_reg", "kd", "self_kd", "tf_self"])
def test_gradient_is_student_minus_target(method: str, classes: int) -> None:
    student, teacher, labels = _batch(classes)
    parameters = {"temperature": 1.0} if "temperature" in METHODS[method] else {}
    _, gradient = _loss_and_gradient(method, classes, **parameters)
    target = _target(method, classes, teacher, labels)
    eps = VIRTUAL if method == "tf_reg" else EXACT
    _close(gradient, (student.softmax(-1) - target) / ROWS, eps)


@pytest.mark.parametrize("temperature", [2.0, 10.0])
@pytest.mark.parametrize("scale_t2", [True, False])
def test_gradient_at_a_temperature(temperature: float, scale_t2: bool) -> None:
    student, teacher, labels = _batch(5)
    _, gradient = _loss_and_gradient("kd", 5, alpha=0.3, temperature=temperature, scale_t2=scale_t2)
    soft = (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    hard = student.softmax(-1) - F.one_hot(labels, 5)
    factor = 0.3 * (temperature if scale_t2 else 1.0 / temperature)
    _close(gradient, (0.7 * hard + factor * soft) / ROWS)


@pytest.mark.parametrize("classes", [2, 3, 9])
@pytest.mark.parametrize(("alpha", "correct"), [(0.5, 0.9), (0.1, 0.99), (0.95, 0.95)])
def test_tf_reg_is_label_smoothing(classes: int, alpha: float, correct: float) -> None:
    """With eps = a (1 - A) K / (K - 1); the losses differ by the virtual teacher's entropy."""
    eps = alpha * (1 - correct) * classes / (classes - 1)
    virtual = {"alpha": alpha, "correct_prob": correct, "temperature": 1.0, "mode": "target"}
    loss, gradient = _loss_and_gradient("tf_reg", classes, **virtual)
    smooth, other = _loss_and_gradient("ls", classes, label_smoothing=eps)
    _close(gradient, other, VIRTUAL)
    teacher = torch.tensor([correct, *[(1 - correct) / (classes - 1)] * (classes - 1)]).double()
    _close(loss, smooth - alpha * torch.special.entr(teacher).sum(), VIRTUAL)


def test_example_of_the_identity() -> None:
    virtual = {"alpha": 0.5, "correct_prob": 0.9, "mode": "target"}
    _close(
        _loss_and_gradient("tf_reg", 3, **virtual)[1],
        _loss_and_gradient("ls", 3, label_smoothing=0.075)[1],
        VIRTUAL,
    )


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_conventions_of_smoothing(classes: int) -> None:
    eps = 0.2
    torchs = _loss_and_gradient("ls", classes, label_smoothing=eps)
    others = _loss_and_gradient(
        "ls", classes, label_smoothing=eps * (classes - 1) / classes, convention="tfkd"
    )
    for one, other in zip(torchs, others, strict=True):
        _close(one, other)


@pytest.mark.parametrize(("classes", "label"), [(2, 0.506), (3, 0.339), (100, 0.01025)])
def test_the_released_tf_reg_is_nearly_uniform(classes: int, label: float) -> None:
    """softmax(p_d / T) at A = 0.99 and T = 40: what the student is drawn to at alpha 1."""
    student, _, labels = _batch(classes)
    released = {"correct_prob": 0.99, "temperature": 40.0, "mode": "softmax_of_prob"}
    _, gradient = _loss_and_gradient("tf_reg", classes, alpha=1.0, **released)
    target = student.softmax(-1) - gradient * ROWS
    hard = F.one_hot(labels, classes).double()
    virtual = 0.99 * hard + (1.0 - hard) * 0.01 / (classes - 1)
    _close(target, (virtual / 40.0).softmax(-1), VIRTUAL)
    assert target[0, labels[0]].item() == pytest.approx(label, rel=1e-3)


@pytest.mark.parametrize("method", ["kd", "self_kd", "tf_self", "tf_reg"])
def test_no_weight_is_fine_tuning(method: str) -> None:
    for one, other in zip(
        _loss_and_gradient(method, 4, alpha=0.0), _loss_and_gradient("ft", 4), strict=True
    ):
        _close(one, other)


def test_no_penalty_and_no_smoothing_are_fine_tuning() -> None:
    plain = _loss_and_gradient("ft", 4)[1]
    _close(_loss_and_gradient("confidence_penalty", 4, beta=0.0)[1], plain)
    _close(_loss_and_gradient("ls", 4, label_smoothing=0.0)[1], plain)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_an_equal_teacher_teaches_nothing(temperature: float) -> None:
    student, _, _ = _batch(6)
    loss, gradient = _loss_and_gradient("kd", 6, student, alpha=1.0, temperature=temperature)
    assert loss.item() == pytest.approx(0.0, abs=1e-15)
    assert gradient.abs().max().item() == 0.0


def test_a_hot_teacher_is_matched_by_logits() -> None:
    """As T grows the gradient tends to (z_s - z_t) / (B K), without the rows' means."""
    student, teacher, _ = _batch(5)
    _, gradient = _loss_and_gradient("kd", 5, alpha=1.0, temperature=1e6)
    gap = student - teacher
    wanted = (gap - gap.mean(-1, keepdim=True)) / (ROWS * 5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_self_teachers_are_one_loss() -> None:
    weights = {"alpha": 0.4, "temperature": 3.0}
    losses = [_loss_and_gradient(method, 5, **weights) for method in ("kd", "self_kd", "tf_self")]
    assert torch.equal(losses[0][1], losses[1][1])
    _close(losses[0][1], losses[2][1])
    doubled = _loss_and_gradient("tf_self", 5, **weights, multiplier=2.0)[0]
    hard = _loss_and_gradient("ft", 5)[0]
    _close(doubled - 0.6 * hard, 2.0 * (losses[2][0] - 0.6 * hard))


def test_one_column_is_a_regression() -> None:
    student, teacher, _ = _batch(1)
    labels = torch.linspace(0.0, 5.0, ROWS).double()
    hard, soft = F.mse_loss(student[:, 0], labels), F.mse_loss(student, teacher)
    _close(LabelRegulariser("ft")(student, labels), hard)
    for method in ("kd", "self_kd", "tf_self"):
        loss = LabelRegulariser(method, alpha=0.3)(student, labels, teacher)
        _close(loss, 0.7 * hard + 0.3 * soft)
    for method in ("ls", "tf_reg", "confidence_penalty"):
        message = f"logits must have at least two classes with '{method}', got shape \\[7, 1\\]"
        with pytest.raises(ValueError, match=message):
            LabelRegulariser(method)(student, labels)
    with pytest.raises(ValueError, match=r"options must be left out for one column, got \['mask'"):
        LabelRegulariser("ft")(student, labels, mask=torch.ones(ROWS))


def test_options_reach_the_loss() -> None:
    student, teacher, labels = _batch(4)
    rows = LabelRegulariser("kd")(student, labels, teacher, reduction="none")
    assert rows.shape == (ROWS,)
    left_out = labels.clone()
    left_out[2:] = -100
    for method, parameters in METHODS.items():
        regulariser = LabelRegulariser(method, **parameters)
        teachers = (teacher,) if regulariser.needs_teacher else ()
        whole = regulariser(student[:2], labels[:2], *[t[:2] for t in teachers])
        _close(regulariser(student, left_out, *teachers), whole)


@pytest.mark.parametrize(
    ("method", "parameters", "error", "message"),
    [
        ("best", {}, ValueError, "method must be one of ft, ls, .*, got 'best'"),
        ("ls", {"alpha": 0.1}, ValueError, "alpha must be a parameter of 'ls' \\(label_smoothing"),
        ("ft", {"alpha": 0.1}, ValueError, "alpha must be a parameter of 'ft' \\(none\\)"),
        ("kd", {"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        ("kd", {"temperature": 0}, ValueError, "temperature must be positive, got 0"),
        ("kd", {"scale_t2": 1}, TypeError, "scale_t2 must be a bool, got int"),
        ("ls", {"convention": "x"}, ValueError, "convention must be one of torch, tfkd, got 'x'"),
        ("tf_reg", {"mode": "x"}, ValueError, "mode must be one of target, softmax_of_prob"),
        ("tf_reg", {"correct_prob": 0.0}, ValueError, "correct_prob must be positive, got 0.0"),
        ("confidence_penalty", {"beta": "1"}, TypeError, "beta must be a number, got str"),
    ],
)
def test_refusals(
    method: str, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"LabelRegulariser: {message}"):
        LabelRegulariser(method, **parameters)


def test_teachers_that_are_missing_or_too_many() -> None:
    student, teacher, labels = _batch(4)
    with pytest.raises(ValueError, match="teacher_logits must be given with 'kd', got None"):
        LabelRegulariser("kd")(student, labels)
    with pytest.raises(ValueError, match="teacher_logits must be left out with 'ls', got a tensor"):
        LabelRegulariser("ls")(student, labels, teacher)


def test_what_needs_a_teacher() -> None:
    found = {method: LabelRegulariser(method).teacher for method in METHODS}
    assert found.pop("kd") == "teacher"
    assert found.pop("self_kd") == found.pop("tf_self") == "self"
    assert set(found.values()) == {None}
    assert repr(LabelRegulariser("ls")) == (
        "LabelRegulariser('ls', label_smoothing=0.1, convention='torch')"
    )


def test_example() -> None:
    found = doctest.testmod(sys.modules[LabelRegulariser.__module__])
    assert found.attempted > 4 and found.failed == 0
    assert "LabelRegulariser" in kdkernels.__all__
