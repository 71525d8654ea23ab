"""``kd_shard`` over every backend: rows in parts against rows as a whole, in one process.

``tests/distributed/test_vocab_parallel.py`` has the processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.backends import Backend
from helpers.budget import assert_within_budget
from torch import Tensor

from kdkernels.bench.sharded import chunks_of
from kdkernels.ops import kd_shard
from kdkernels.ops._shared.vocab_rows import Chunk, Shard
from kdkernels.ops.kd_loss import Divergence, Spec
from kdkernels.ops.kd_loss.reference import kd_loss_reference
from kdkernels.ops.kd_shard.op import (
    kd_shard_found,
    kd_shard_grad,
    kd_shard_grad_,
    kd_shard_middle,
)
from kdkernels.ops.kd_shard.reference import (
    kd_shard_found_reference,
    kd_shard_grad_reference,
    kd_shard_middle_reference,
)
from kdkernels.ops.kd_shard.spec import ELSEWHERE, IGNORED, Found, Merged

D = Divergence
KINDS = [D.FORWARD_KL, D.SOFT_CE, D.REVERSE_KL, D.JSD, D.TVD]
BASE = Spec(ce_weight=0.4, kd_weight=0.6, temperature=2.0, mean=False)
OPTIONS = {
    "T1": {"temperature": 1.0},
    "T3": {"temperature": 3.0, "beta": 0.2},
    "T0.7": {"temperature": 0.7},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01, "temperature": 3.0},
    "scale": {"student_scale": 0.5, "teacher_scale": 2.0},
    "softcap": {"student_softcap": 5.0, "teacher_softcap": 3.0, "label_smoothing": 0.2},
    "divergence_alone": {"ce_weight": 0.0, "kd_weight": 1.5},
    "want_ce": {"want_ce": True, "ce_weight": 0.0},
}
# Of the parts: more than a block of the CPU kernel, exactly one, less than a vector, none.
SIZES = ([1100, 5, 1024, 2], [9, 0, 33, 28])


@dataclass
class Rows:
    """Whole rows, and the sizes of their parts."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    spec: Spec
    sizes: list[int]

    def parts(
        self, backend: Backend, dtype: torch.dtype, *, inplace: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The rows' losses, as all processes have them, and the gradient, put together."""
        grads: list[Tensor] = []

        def make(shard: Shard) -> Chunk:
            part = slice(shard.start, shard.start + shard.size)
            student, teacher = (
                x[:, part].to(backend.device, dtype, copy=True)
                for x in (self.student, self.teacher)
            )
            labels = None if self.labels is None else self.labels.to(backend.device)
            return Chunk(shard, student, teacher, labels, None, None, self.spec)

        chunks = chunks_of(self.sizes, backend.name, len(self.student), make)
        rows = [chunk.results()[2] for chunk in chunks]
        assert all(torch.equal(x, rows[0]) for x in rows)  # to the bit
        for chunk in chunks:
            if inplace:
                chunk.gradient_(chunk.student)
            grads.append(chunk.student if inplace else chunk.gradient())
        return rows[0], torch.cat(grads, 1)

    def whole(self, dtype: torch.dtype, arithmetic: torch.dtype) -> tuple[Tensor, Tensor]:
        """By the reference of ``kd_loss`` on the values that ``dtype`` has."""
        student = self.student.to(dtype).to(arithmetic, copy=True).requires_grad_()
        teacher = self.teacher.to(dtype).to(arithmetic)
        _, _, rows = kd_loss_reference(student, teacher, self.labels, None, None, self.spec)
        (grad,) = torch.autograd.grad(rows.sum(), student)
        return rows.detach(), grad


def make(sizes: list[int], spec: Spec, *, rows: int = 4, scale: float = 2.0) -> Rows:
    """Labels in the first and the last part; one row does not count, and is full of NaN."""
    classes = sum(sizes)
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64) * scale
    labels = torch.randint(0, classes, (rows,))
    labels[0], labels[-1] = 0, classes - 1
    if rows > 2:
        labels[1], student[1], teacher[1] = -100, torch.nan, torch.inf
    return Rows(student, teacher, labels, spec, sizes)


def check(rows: Rows, backend: Backend, dtype: torch.dtype, *, inplace: bool = False) -> None:
    """Losses and gradient within the budget."""
    losses, grad = rows.parts(backend, dtype, inplace=inplace)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    oracle, reference = rows.whole(dtype, torch.float64), rows.whole(dtype, wide)
    assert losses.dtype == wide and grad.dtype == dtype
    unit = float(oracle[0].abs().nan_to_num(posinf=0.0).max()) + 1.0  # terms of either sign
    assert_within_budget(losses, oracle[0], reference[0], wide, unit=unit)
    valid = slice(None) if rows.labels is None else rows.labels != -100
    z = rows.student[valid] / rows.spec.temperature
    unit = float(z.softmax(1).nan_to_num().max()) * (rows.spec.ce_weight + rows.spec.kd_weight)
    assert_within_budget(grad, oracle[1], reference[1].to(dtype), dtype, unit=unit)


def sizes_for(backend: Backend) -> tuple[list[int], ...]:
    return SIZES[1:] if backend.interpreted else SIZES


@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.name)
@pytest.mark.parametrize("option", ["plain", *OPTIONS])
def test_parts_are_like_the_whole(backend: Backend, divergence: Divergence, option: str) -> None:
    spec = BASE._replace(divergence=int(divergence))._replace(**OPTIONS.get(option, {}))
    for sizes in sizes_for(backend):
        check(make(sizes, spec), backend, torch.float32)


@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(backend: Backend, divergence: Divergence, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend.name != "reference":
        pytest.skip("the kernels take float32, bfloat16 and float16")
    spec = BASE._replace(divergence=int(divergence), label_smoothing=0.1)
    check(make(sizes_for(backend)[0], spec), backend, dtype)
    check(make(sizes_for(backend)[0], spec), backend, dtype, inplace=True)


@pytest.mark.parametrize("option", ["plain", "smoothing", "z_loss", "softcap"])
def test_without_a_teacher(backend: Backend, option: str) -> None:
    spec = BASE._replace(**OPTIONS.get(option, {}), kd_weight=0.0)  # its temperature is not one
    check(make(SIZES[1], spec), backend, torch.float32)


@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.name)
def test_masked_classes(backend: Backend, divergence: Divergence) -> None:
    """Also a part that is all masked, and masks of which the number is that of live classes."""
    spec = BASE._replace(divergence=int(divergence), label_smoothing=0.1)
    rows = make([10, 20, 7], spec)
    for logits in (rows.student, rows.teacher):
        logits[:, 10:30] = -torch.inf
        logits[2, 3:7] = -torch.inf
    assert rows.labels is not None
    rows.labels[:] = torch.tensor([0, -100, 1, 36])
    rows.student[3, 36] = 0.5
    for dtype in (torch.float32, torch.bfloat16):
        check(rows, backend, dtype)
    half = make([10, 5], spec)
    for logits in (half.student, half.teacher):
        logits[:, 5:10] = -torch.inf  # 10 classes are live, as many as there are in the first part
    assert half.labels is not None
    half.labels[half.labels >= 0] = 1
    check(half, backend, torch.float32)


@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.name)
def test_large_offsets_and_mass_in_one_part(backend: Backend, divergence: Divergence) -> None:
    spec = BASE._replace(divergence=int(divergence), label_smoothing=0.1)
    rows = make([20, 30, 14], spec)
    rows.student = (rows.student * 256).round() / 256 + 4096.0
    rows.teacher = (rows.teacher * 256).round() / 256 - 2048.0
    check(rows, backend, torch.float32)
    rows.student[0, 25] += 100.0
    rows.teacher[3, 2] += 100.0
    check(rows, backend, torch.float32)


@pytest.mark.parametrize("divergence", [d for d in KINDS if d != D.SOFT_CE], ids=lambda d: d.name)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_equal_models_have_no_gradient(
    backend: Backend, divergence: Divergence, temperature: float
) -> None:
    spec = Spec(divergence=int(divergence), kd_weight=1.0, temperature=temperature, beta=0.3)
    rows = make(sizes_for(backend)[0], spec)
    rows.teacher = rows.student
    for dtype in (torch.float32, torch.bfloat16):
        losses, grad = rows.parts(backend, dtype)
        assert not losses.any() and not grad.any()


def test_infinite_where_only_the_student_masks(backend: Backend) -> None:
    rows = make([5, 3, 4], Spec(divergence=int(D.FORWARD_KL), kd_weight=1.0, mean=False))
    rows.student[:, 5:8] = -torch.inf
    losses, grad = rows.parts(backend, torch.float32)
    assert losses.tolist() == [torch.inf, 0.0, torch.inf, torch.inf]
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps(backend: Backend, divergence: Divergence, dtype: torch.dtype) -> None:
    """Every number of every step, of logits that lie anywhere."""
    if backend.name == "reference":
        pytest.skip("it is what is compared with")
    spec = BASE._replace(divergence=int(divergence), temperature=3.0, label_smoothing=0.1)
    spec = kd_shard.shard_spec(spec)
    rows, classes = 5, 83 if backend.interpreted else 1291
    wide = torch.full((4, rows, classes + 12), torch.nan, device=backend.device, dtype=dtype)
    student, teacher, grad, _ = wide[:, :, 3 : 3 + classes]
    student.copy_(torch.randn(rows, classes)), teacher.copy_(torch.randn(rows, classes))
    places = torch.tensor([7, ELSEWHERE, IGNORED, 0, classes - 1], device=backend.device)
    student[2] = torch.nan
    step = student, teacher, places
    valid = places != IGNORED

    def compare(actual: Tensor, reference: Tensor, oracle: Tensor, of: torch.dtype) -> None:
        assert_within_budget(actual, oracle, reference, of, unit=1.0)

    references = [
        [x if x is places else x.to(of) for x in step] for of in (torch.float32, torch.float64)
    ]
    found = kd_shard.found(*step, spec, backend.name)
    expected = [kd_shard_found_reference(*x, spec) for x in references]
    for number in Found:
        compare(found[number][valid], *(x[number][valid] for x in expected), torch.float32)
    merged = torch.zeros(len(Merged), rows, device=backend.device)
    merged[: Found.GAP] = expected[0][: Found.GAP]
    # Of the others more than of these.
    merged[[Merged.STUDENT_TOP, Merged.TEACHER_TOP]] += 1.0
    merged[[Merged.STUDENT_SUM, Merged.TEACHER_SUM]] *= 3.0
    merged[Merged.STUDENT_SUM_1] = 2.0 * expected[0][Found.STUDENT_SUM_1]
    merged[Merged.MEAN], merged[Merged.LIVE] = 0.3, 3.0 * classes
    merged[Merged.WEIGHT] = torch.linspace(0.5, 2.0, rows)
    if divergence in (D.JSD, D.TVD):
        sums = kd_shard.middle(*step, merged, spec, backend.name)
        expected = [kd_shard_middle_reference(*x, merged.to(x[0].dtype), spec) for x in references]
        for i in range(2):
            compare(sums[i][valid], *(x[i][valid] for x in expected), torch.float32)
    kd_shard.gradient_(*step, merged, spec, backend.name, grad)
    expected = [kd_shard_grad_reference(*x, merged.to(x[0].dtype), spec) for x in references]
    compare(grad, expected[0].to(dtype), expected[1], dtype)
    outside = torch.ones(classes + 12, dtype=torch.bool, device=backend.device)
    outside[3 : 3 + classes] = False
    assert wide[2][:, outside].isnan().all()  # nothing was written beside the gradient


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_numbers_of_rows(backend: Backend, rows: int) -> None:
    spec = kd_shard.shard_spec(BASE._replace(divergence=int(D.JSD)))
    student, teacher = torch.randn(2, rows, 9, device=backend.device)
    places = torch.zeros(rows, dtype=torch.int64, device=backend.device)
    assert kd_shard.found(student, teacher, places, spec, backend.name).shape == (9, rows)
    merged = torch.ones(8, rows, device=backend.device)
    sums = kd_shard.middle(student, teacher, places, merged, spec, backend.name)
    assert sums.shape == (2, rows) and torch.isfinite(sums).all()
    grad = kd_shard.gradient(student, teacher, places, merged, spec, backend.name)
    assert grad.shape == (rows, 9) and torch.isfinite(grad).all()


def test_refusals(backend: Backend) -> None:
    spec = kd_shard.shard_spec(BASE._replace(divergence=int(D.FORWARD_KL)))
    x = torch.randn(3, 5, device=backend.device)
    places = torch.zeros(3, dtype=torch.int64, device=backend.device)
    merged, name = torch.ones(8, 3, device=backend.device), backend.name
    with pytest.raises(ValueError, match=r"kd_shard: teacher must be \[3, 5\], got \[3, 4\]"):
        kd_shard.found(x, x[:, :4], places, spec, name)
    with pytest.raises(ValueError, match="kd_shard: places must be given"):
        kd_shard.found(x, x, None, spec, name)
    with pytest.raises(ValueError, match=r"kd_shard: places must be \[3\]"):
        kd_shard.found(x, x, places[:2], spec, name)
    with pytest.raises(ValueError, match="divergence must be one of 0 to 5, got 6"):
        kd_shard.found(x, x, places, spec._replace(divergence=6), name)
    with pytest.raises(ValueError, match="divergence must be JSD or TVD, got 1"):
        kd_shard.middle(x, x, places, merged, spec, name)
    with pytest.raises(ValueError, match=r"merged must be \[8, 3\] of torch.float32"):
        kd_shard.gradient_(x, x, places, merged[:7], spec, name, x.clone())
    with pytest.raises(ValueError, match=r"merged must be contiguous"):
        kd_shard.gradient_(x, x, places, merged.T.contiguous().T, spec, name, x.clone())
    with pytest.raises(ValueError, match=r"grad must be \[3, 5\] of torch.float32"):
        kd_shard.gradient_(x, x, places, merged, spec, name, x.to(torch.bfloat16))
    if (name, backend.device) == ("native", "cpu"):  # elsewhere looking would synchronise
        with pytest.raises(RuntimeError, match=r"places must be in \[-2, 5\), got 5 in row 0"):
            kd_shard.found(x, x, places + 5, spec, name)


def test_float64_goes_to_the_reference() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    assert kd_shard.choose("op", x, x) == "reference"
    assert kd_shard.choose("op", x.float(), x.float()) == "native"
    with pytest.raises(NotImplementedError, match="not float64"):
        kd_shard.choose("op", x, x, "native")


def test_opcheck() -> None:
    x, places = torch.randn(2, 3, 50), torch.tensor([4, ELSEWHERE, IGNORED])
    spec = list(kd_shard.shard_spec(BASE._replace(divergence=int(D.TVD))))
    merged, grad = torch.ones(8, 3), torch.empty(3, 50)
    torch.library.opcheck(kd_shard_found.overload("native"), (*x, places, spec))
    torch.library.opcheck(kd_shard_middle.overload("native"), (*x, places, merged, spec))
    torch.library.opcheck(kd_shard_grad.overload("native"), (*x, places, merged, spec))
    torch.library.opcheck(kd_shard_grad_.overload("native"), (*x, places, merged, spec, grad))
