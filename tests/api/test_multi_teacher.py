"""Several teachers: means of distributions and of losses, against the formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.budget import assert_within_budget
from torch import Tensor

import kdkernels
from kdkernels import kd_loss, multi_teacher_kd_loss

LABELS = torch.tensor([3, 0, -100, 7, 2])


def formula(
    student: Tensor, teachers: list[Tensor], shares: list[float], combine: str, kind: str
) -> Tensor:
    """0.4 CE + 0.6 * T^2 * D at T = 2, mean over valid rows."""
    log_s = F.log_softmax(student / 2.0, -1)
    distributions = [F.softmax(t / 2.0, -1) for t in teachers]

    def distance(p: Tensor) -> Tensor:
        if kind == "forward_kl":
            return (p * (p.log() - log_s)).sum(-1)
        return (log_s.exp() * (log_s - p.log())).sum(-1)

    if combine == "probability":
        rows = distance(sum(w * p for w, p in zip(shares, distributions, strict=True)))  # type: ignore[arg-type]
    else:
        rows = sum(w * distance(p) for w, p in zip(shares, distributions, strict=True))  # type: ignore[assignment]
    valid = LABELS != -100
    ce = F.cross_entropy(student, LABELS, reduction="none")
    return (0.4 * ce + 0.6 * 4.0 * rows)[valid].mean()


@pytest.mark.parametrize("combine", ["probability", "loss"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 4.0]])
def test_formula(combine: str, kind: str, weights: list[float] | None) -> None:
    inputs = torch.randn(4, 5, 9)
    shares = [w / 8 for w in weights] if weights else [1 / 3] * 3
    results = []
    for dtype in (None, torch.float64, torch.float32):
        student, *teachers = (x.to(dtype or torch.float32) for x in inputs)
        student.requires_grad_()
        if dtype is None:
            loss = multi_teacher_kd_loss(
                student, teachers, LABELS, teacher_weights=weights, combine=combine,
                temperature=2.0, alpha=0.6, divergence=kind,
            )  # fmt: skip
        else:
            loss = formula(student, teachers, shares, combine, kind)
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    for actual, oracle, same in zip(*results, strict=True):
        assert_within_budget(actual, oracle, same, torch.float32, unit=0.1)


def test_one_teacher_is_kd_loss() -> None:
    student, teacher = torch.randn(2, 5, 9)
    wanted = kd_loss(student, teacher, LABELS, temperature=3.0)
    same = multi_teacher_kd_loss(student, [teacher], LABELS, temperature=3.0, combine="loss")
    assert torch.equal(same, wanted)
    close = multi_teacher_kd_loss(student, [teacher], LABELS, temperature=3.0)
    oracle = kd_loss(student.double(), teacher.double(), LABELS, temperature=3.0)
    assert_within_budget(close, oracle, wanted, torch.float32)


@pytest.mark.parametrize("combine", ["probability", "loss"])
def test_parts_rows_and_masked_classes(combine: str) -> None:
    student, *teachers = torch.randn(3, 5, 9)
    for x in (student, *teachers):
        x[:, 8] = -torch.inf
    options: dict[str, Any] = {"combine": combine, "temperature": 2.0}
    parts = multi_teacher_kd_loss(student, teachers, LABELS % 8, return_parts=True, **options)
    loss = multi_teacher_kd_loss(student, teachers, LABELS % 8, **options)
    assert isinstance(parts, kdkernels.KDParts) and torch.isfinite(loss)
    assert_within_budget(parts.loss, loss.double(), loss, torch.float32)
    halves = 0.5 * parts.ce + 0.5 * parts.kd
    assert_within_budget(halves, loss.double(), loss, torch.float32)
    rows = multi_teacher_kd_loss(student, teachers, LABELS % 8, reduction="none", **options)
    assert rows.shape == (5,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_logits": []}, "teacher_logits must hold at least one teacher, got none"),
        ({"combine": "vote"}, "combine must be one of probability, loss, got 'vote'"),
        ({"teacher_weights": [1.0]}, "one number for each of 2 teachers, got 1"),
        ({"teacher_weights": [1.0, 0.0]}, "teacher_weights must be positive, got 0.0"),
        ({"inplace": True}, "inplace must be False"),
        ({"softcap": 30.0}, "softcap must leave the teachers' side at None"),
        ({"logit_scale": (1.0, 0.5)}, "logit_scale must leave the teachers' side at 1.0"),
        ({"teacher_logits": [torch.zeros(5, 9), torch.zeros(5, 8)]},
         r"teacher_logits must have the shape of student_logits \[5, 9\], got \[5, 8\]"),
        ({"teacher_logits": [torch.zeros(5, 9, requires_grad=True)]},
         "teacher_logits must not require grad"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)  # fmt: skip
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    full = {"student_logits": torch.zeros(5, 9), "teacher_logits": [torch.zeros(5, 9)] * 2}
    with pytest.raises(ValueError, match=f"multi_teacher_kd_loss: .*{message}"):
        multi_teacher_kd_loss(**(full | arguments))
