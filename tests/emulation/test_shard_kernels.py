"""The CUDA kernels of ``kd_shard`` on the CPU: every step on a shard of the classes, any order of
threads, rows that lie anywhere.

The op tests merge the shards; here each number is compared with that of the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from emulation import backend
from emulation.cases import SEEDS, make
from helpers.budget import assert_within_budget
from torch import Tensor

from kdkernels.ops import kd_shard
from kdkernels.ops._shared.vocab_rows import Chunk, Shard
from kdkernels.ops.kd_loss.spec import Divergence, Spec
from kdkernels.ops.kd_shard.reference import (
    kd_shard_found_reference,
    kd_shard_grad_reference,
    kd_shard_middle_reference,
)
from kdkernels.ops.kd_shard.spec import ELSEWHERE, IGNORED, Found, Merged

REASON = backend.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

D = Divergence
KINDS = [D.NONE, D.FORWARD_KL, D.SOFT_CE, D.REVERSE_KL, D.JSD, D.TVD]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOWEST = torch.finfo(torch.float32).min
CLASSES, HERE = 1300, slice(301, 1000)
# What goes with a temperature.
OPTIONS = {
    1.0: {"student_scale": 0.5, "teacher_scale": 2.0},
    2.0: {"student_softcap": 8.0, "teacher_softcap": 6.0, "z_loss": 0.01},
    3.0: {"label_smoothing": 0.1, "student_scale": 1.3, "want_ce": True},
}
IGNORED_ROW, DEAD_ROW = 1, 3


class Case(NamedTuple):
    """A shard of rows: the logits here, and what all classes have to say."""

    student: Tensor
    teacher: Tensor | None
    places: Tensor
    merged: Tensor  # float64
    spec: Spec

    def args(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """What every step takes, the logits in another dtype."""
        if dtype is None:
            return self.student, self.teacher, self.places
        teacher = None if self.teacher is None else self.teacher.to(dtype)
        return self.student.to(dtype), teacher, self.places


def shard_of(spec: Spec, dtype: torch.dtype, *, equal: bool = False) -> Case:
    """Of rows with a label here, that do not count and are full of NaN, with a label elsewhere,
    without a live class here, and with masked classes; off the 16-byte boundaries.
    """
    whole = [make(5, CLASSES, dtype, stride=CLASSES + beyond) for beyond in (3, 6)]
    if equal:
        whole[1].copy_(whole[0])
    for x in whole:
        x[IGNORED_ROW] = torch.nan
        x[DEAD_ROW, HERE] = x[4, 900:1100] = x[4, :350] = -torch.inf
    labels = torch.tensor([HERE.start, -100, HERE.stop, 5, 700])
    shard = Shard(None, 0, 1, 0, CLASSES, CLASSES, 5, "reference")
    wide = [x.double() for x in whole]
    chunk = Chunk(shard, wide[0], wide[1], labels, torch.rand(5), None, spec)
    chunk.merged[Merged.WEIGHT] = chunk.weight
    place = labels - HERE.start
    here = (place >= 0) & (place < HERE.stop - HERE.start)
    places = torch.where(here, place, ELSEWHERE)
    places[IGNORED_ROW] = IGNORED
    teacher = whole[1][:, HERE] if spec.needs_teacher else None
    return Case(whole[0][:, HERE], teacher, places, chunk.merged, kd_shard.shard_spec(spec))


def check_found(case: Case, found: Tensor) -> None:
    """Within the budget, number by number."""
    oracle = kd_shard_found_reference(*case.args(torch.float64), case.spec)
    reference = kd_shard_found_reference(*case.args(torch.float32), case.spec)
    assert (found[:, IGNORED_ROW] == 0).all()
    tops = [Found.STUDENT_TOP, *([] if case.teacher is None else [Found.TEACHER_TOP])]
    assert (found[tops, DEAD_ROW] == LOWEST).all()
    assert (found[Found.STUDENT_SUM, DEAD_ROW], found[Found.GAP, DEAD_ROW]) == (0, 0)
    live = [row for row in range(len(case.student)) if row not in (IGNORED_ROW, DEAD_ROW)]
    for number in Found:
        # The gap may be a difference of sums as large as this.
        unit = float(oracle[Found.TEACHER_SUM].max()) if number == Found.GAP else 0.0
        a, b, c = (x[number, live] for x in (found, oracle, reference))
        assert_within_budget(a, b, c, torch.float32, unit=unit)


def check_middle(case: Case, sums: Tensor) -> None:
    """Within the budget."""
    expected = [
        kd_shard_middle_reference(*case.args(dtype), case.merged.to(dtype), case.spec)
        for dtype in (torch.float64, torch.float32)
    ]
    assert (sums[:, IGNORED_ROW] == 0).all()
    valid = case.merged[Merged.WEIGHT] > 0
    for a, b, c in zip(sums, *expected, strict=True):
        assert_within_budget(a[valid], b[valid], c[valid], torch.float32)


def check_gradient(case: Case, grad: Tensor) -> None:
    """Within the budget."""
    wide, same = (
        kd_shard_grad_reference(*case.args(dtype), case.merged.to(dtype), case.spec)
        for dtype in (torch.float64, torch.float32)
    )
    assert (grad[IGNORED_ROW] == 0).all() and (grad[DEAD_ROW] == 0).all()
    assert_within_budget(grad, wide, same.to(grad.dtype), grad.dtype)


@pytest.mark.parametrize("temperature", OPTIONS)
@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps(dtype: torch.dtype, divergence: Divergence, temperature: float) -> None:
    torch.manual_seed(divergence)
    spec = Spec(
        divergence.value, 0.3, temperature, 0.4, 0.6 * temperature**2, **OPTIONS[temperature]
    )
    case = shard_of(spec, dtype)
    merged = case.merged.float()
    # Rows that lie otherwise than those of the student, and these themselves.
    around = torch.full((5, 801), torch.nan, dtype=dtype)
    inside = slice(2, 2 + case.student.shape[1])
    over = around.clone()[:, inside].copy_(case.student)
    with backend.device(seed=int(temperature) + divergence):
        check_found(case, kd_shard.found(*case.args(), case.spec, "emulated"))
        if divergence >= D.JSD:
            sums = kd_shard.middle(*case.args(), merged, case.spec, "emulated")
            check_middle(case, sums)
        kd_shard.gradient_(*case.args(), merged, case.spec, "emulated", around[:, inside])
        kd_shard.gradient_(over, *case.args()[1:], merged, case.spec, "emulated", over)
        fresh = kd_shard.gradient(*case.args(), merged, case.spec, "emulated")
    check_gradient(case, around[:, inside])
    assert torch.equal(over, around[:, inside]) and torch.equal(fresh, over)
    around[:, inside] = torch.nan
    assert around.isnan().all()  # nothing was written beside it


@pytest.mark.parametrize("divergence", KINDS[1:], ids=lambda d: d.name)
def test_divergence_alone(divergence: Divergence) -> None:
    """Without labels every row counts; its sum at temperature 1 is nobody's concern."""
    torch.manual_seed(divergence)
    spec = kd_shard.shard_spec(Spec(divergence.value, 0.3, 2.0, kd_weight=4.0))
    student, teacher = (make(3, 333, torch.float32, stride=stride) for stride in (333, 340))
    numbers = [
        kd_shard_found_reference(student.to(dtype), teacher.to(dtype), None, spec)
        for dtype in (torch.float64, torch.float32)
    ]
    with backend.device(seed=1):
        found = kd_shard.found(student, teacher, None, spec, "emulated")
    for number in set(Found) - {Found.STUDENT_SUM_1}:
        unit = float(numbers[0][Found.TEACHER_SUM].max()) if number == Found.GAP else 0.0
        a, b, c = (x[number] for x in (found, *numbers))
        assert_within_budget(a, b, c, torch.float32, unit=unit)


@pytest.mark.parametrize("divergence", [D.FORWARD_KL, D.REVERSE_KL, D.JSD, D.TVD], ids=str)
def test_equal_models_have_no_gradient(divergence: Divergence) -> None:
    spec = Spec(divergence.value, 0.3, 2.0, kd_weight=4.0, student_scale=1.7, teacher_scale=1.7)
    case = shard_of(spec, torch.bfloat16, equal=True)
    assert (case.merged[Merged.MEAN].nan_to_num() == 0).all()
    grad = torch.empty_like(case.student)
    with backend.device(seed=3):
        found = kd_shard.found(*case.args(), case.spec, "emulated")
        kd_shard.gradient_(*case.args(), case.merged.float(), case.spec, "emulated", grad)
    assert torch.equal(found[:2], found[2:4]) and (found[Found.GAP] == 0).all()
    assert (grad == 0).all()


def test_order_of_threads_changes_no_bit() -> None:
    torch.manual_seed(0)
    student, teacher = (make(2, 5000, torch.float32) for _ in range(2))
    spec = kd_shard.shard_spec(Spec(D.JSD.value, 0.3, kd_weight=1.0, z_loss=0.1))
    merged = torch.full((len(Merged), 2), 3.0)
    results = []
    for seed in SEEDS:
        grad = torch.empty_like(student)
        with backend.device(seed=seed):
            found = kd_shard.found(student, teacher, None, spec, "emulated")
            sums = kd_shard.middle(student, teacher, None, merged, spec, "emulated")
            kd_shard.gradient_(student, teacher, None, merged, spec, "emulated", grad)
        results.append((found, sums, grad))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_place_that_is_none_makes_nan() -> None:
    """Nothing else is read for it: on a GPU nobody looks at places before."""
    spec = kd_shard.shard_spec(Spec(ce_weight=1.0))
    student, merged = make(3, 40, torch.float32), torch.ones(len(Merged), 3)
    places, grad = torch.tensor([40, -3, 39]), torch.empty(3, 40)
    found = kd_shard.found(student, None, places, spec, "emulated")
    kd_shard.gradient_(student, None, places, merged, spec, "emulated", grad)
    assert found[:, :2].isnan().all() and grad[:2].isnan().all()
    assert torch.isfinite(found[:, 2]).all() and torch.isfinite(grad[2]).all()
