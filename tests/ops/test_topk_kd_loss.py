"""``topk_kd_loss`` over every backend, against the float64 reference and the dense ``kd_loss``."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.backends import Backend
from helpers.budget import assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdkernels
from kdkernels.ops.kd_loss import Divergence, Spec, Tail
from kdkernels.ops.topk_kd_loss import TopKTeacher, topk_kd_loss, topk_kd_loss_rows
from kdkernels.ops.topk_kd_loss.op import (
    topk_kd_loss_forward,
    topk_kd_loss_grad,
    topk_kd_loss_grad_,
)
from kdkernels.ops.topk_kd_loss.reference import topk_kd_loss_reference

FORWARD, REVERSE = Divergence.FORWARD_KL.value, Divergence.REVERSE_KL.value
TAILS = [t for t in Tail if t is not Tail.FULL]
KINDS = list(itertools.product((FORWARD, REVERSE), TAILS))
IDS = [f"{'forward' if d == FORWARD else 'reverse'}-{t.name.lower()}" for d, t in KINDS]
BASE = Spec(ce_weight=0.4, kd_weight=0.6, temperature=2.0)
Results = tuple[Tensor, Tensor, Tensor]  # loss, parts, gradient


def make(
    rows: int, classes: int, k: int, *, temperature: float = 2.0, scale: float = 2.0
) -> tuple[Tensor, TopKTeacher, Tensor]:
    """Float64 logits, the list of a teacher close to them, labels."""
    student = torch.randn(rows, classes, dtype=torch.float64) * scale
    teacher = student + torch.randn(rows, classes, dtype=torch.float64)
    top = (teacher / temperature).log_softmax(1).topk(k)
    return student, TopKTeacher(top.indices, top.values), torch.randint(classes, (rows,))


def run(
    backend: str,
    device: str,
    dtype: torch.dtype,
    student: Tensor,
    teacher: TopKTeacher,
    labels: Tensor | None,
    spec: Spec,
    row_weights: Tensor | None = None,
    **options: Any,
) -> Results:
    """Loss, parts and gradient by a backend; the list is the same float32 numbers for all."""
    leaf = student.detach().to(device, dtype, copy=True).requires_grad_()
    listed = TopKTeacher(teacher.ids.to(device), teacher.logprobs.float().to(device))
    loss, parts = topk_kd_loss(
        leaf,
        listed,
        None if labels is None else labels.to(device),
        None if row_weights is None else row_weights.to(device),
        None,
        spec,
        backend=backend,
        **options,
    )
    assert parts is not None
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), parts, leaf.grad


def check(
    backend: Backend, dtype: torch.dtype, student: Tensor, *args: Any, unit: float = 0.0
) -> Results:
    """All results within the error budget; ``unit`` is the size of the terms of the divergence,
    where they cancel.
    """
    rounded = student.to(dtype)
    actual = run(backend.name, backend.device, dtype, rounded, *args)
    oracle = run("reference", "cpu", torch.float64, rounded.double(), *args)
    same = run("reference", "cpu", dtype, rounded, *args)
    # A gradient is a difference of probabilities: where they cancel, their rounding stays.
    spec = args[2]
    rows = max(len(student), 1) if spec.mean else 1
    of_grad = (spec.ce_weight + spec.kd_weight / spec.temperature) / rows
    terms = max(unit, float(same[1][:3].abs().nan_to_num(posinf=0.0).max()))
    assert_within_budget(actual[0], oracle[0], same[0], torch.float32, unit=terms)
    assert_within_budget(actual[1][:3], oracle[1][:3], same[1][:3], torch.float32, unit=unit)
    assert actual[1][3] == oracle[1][3]
    assert_within_budget(actual[2], oracle[2], same[2], dtype, unit=of_grad)
    return actual


@pytest.mark.parametrize(("divergence", "tail"), KINDS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_reference(
    backend: Backend, divergence: int, tail: Tail, dtype: torch.dtype
) -> None:
    widths = (37, 1030) if backend.interpreted else (37, 1030, 5000)
    for classes in widths:
        spec = BASE._replace(divergence=divergence, tail=int(tail))
        student, teacher, labels = make(5, classes, 9)
        labels[0] = teacher.ids[0, 2]  # a label in the list
        labels[1] = spec.ignore_index
        student[1] = torch.nan
        teacher.ids[1] = 10**9  # never read
        check(backend, dtype, student, teacher, labels, spec)


@pytest.mark.parametrize(("divergence", "tail"), KINDS, ids=IDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_options(backend: Backend, divergence: int, tail: Tail, temperature: float) -> None:
    spec = BASE._replace(
        divergence=divergence,
        tail=int(tail),
        temperature=temperature,
        label_smoothing=0.1,
        z_loss=0.01,
        student_scale=0.5,
        student_softcap=6.0,
        classes=290,
        mean=False,
    )
    student, teacher, labels = make(4, 290, 12, temperature=temperature)
    student = torch.nn.functional.pad(student, (0, 10), value=torch.nan)
    student[2, 7] = -torch.inf
    labels[2], labels[3] = 8, teacher.ids[3, 0]
    # A masked class that the teacher lists is an infinite forward KL.
    teacher.ids[2][teacher.ids[2] == 7] = -1
    weights = torch.rand(4)
    *_, grad = check(backend, torch.float32, student, teacher, labels, spec, weights)
    assert (grad[:, 290:] == 0).all() and grad[2, 7] == 0


@pytest.mark.parametrize("tail", TAILS, ids=lambda t: t.name)
def test_padding_repetitions_and_order(backend: Backend, tail: Tail) -> None:
    spec = BASE._replace(divergence=FORWARD, tail=int(tail), ce_weight=0.0)
    student, teacher, _ = make(3, 200, 6)
    plain = run(backend.name, backend.device, torch.float32, student, teacher, None, spec)
    ids, logprobs = teacher
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    # A repetition after the entry, whatever it says, and entries that do not count.
    ids = torch.cat((ids[:, order], ids[:, :1], torch.full((3, 2), -1)), 1)
    logprobs = torch.cat((logprobs[:, order], torch.zeros(3, 1), torch.full((3, 2), torch.nan)), 1)
    got = run(
        backend.name, backend.device, torch.float32, student, TopKTeacher(ids, logprobs), None, spec
    )
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # other orders of the sums
    check(backend, torch.float32, student, TopKTeacher(ids, logprobs), None, spec)


@pytest.mark.parametrize("divergence", [FORWARD, REVERSE])
@pytest.mark.parametrize("tail", TAILS, ids=lambda t: t.name)
def test_extremes(backend: Backend, divergence: int, tail: Tail) -> None:
    spec = BASE._replace(divergence=divergence, tail=int(tail))
    for classes, k in ((1, 1), (7, 7), (40, 1), (300, 300)):
        student, teacher, labels = make(3, classes, k)
        check(backend, torch.float32, student, teacher, labels, spec)
    # No entry counts in a row.
    student, teacher, labels = make(3, 50, 4)
    teacher.ids[1] = -1
    if tail is not Tail.RENORM or divergence == FORWARD:
        check(backend, torch.float32, student, teacher, labels, spec)
    # Rounding up: the list claims more than all of the mass.
    student, teacher, labels = make(2, 50, 4)
    teacher = TopKTeacher(teacher.ids, teacher.logprobs + 2.0)
    check(backend, torch.float32, student, teacher, labels, spec)
    # No rows.
    student, teacher, labels = make(0, 9, 2)
    assert run(backend.name, backend.device, torch.float32, student, teacher, labels, spec)[0] == 0


@pytest.mark.parametrize("divergence", [FORWARD, REVERSE])
def test_a_whole_list_is_the_dense_loss(backend: Backend, divergence: int) -> None:
    student = torch.randn(4, 30, dtype=torch.float64)
    teacher = torch.randn(4, 30, dtype=torch.float64)
    top = (teacher / 2.0).log_softmax(1).topk(30)
    listed = TopKTeacher(top.indices, top.values)
    dense = Spec(divergence, temperature=2.0, kd_weight=4.0)
    leaf = student.clone().requires_grad_()
    loss, _ = kdkernels.ops.kd_loss.kd_loss(leaf, teacher, None, None, None, dense)
    loss.backward()
    assert leaf.grad is not None
    for tail in TAILS:
        got = run(
            backend.name, backend.device, torch.float32, student, listed, None,
            dense._replace(tail=int(tail)),
        )  # fmt: skip
        torch.testing.assert_close(got[0].cpu().double(), loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[2].cpu().double(), leaf.grad, rtol=1e-4, atol=1e-6)


def test_a_bucket_is_never_negative_and_a_small_tail_keeps_its_digits(backend: Backend) -> None:
    # Rows that are sure: the mass outside of the list is 1e-9 and less.
    student, teacher, _ = make(6, 600, 5)
    student *= 0.1
    student.scatter_(1, teacher.ids, 24.0 + torch.randn(6, 5, dtype=torch.float64))
    exact = student.log_softmax(1).gather(1, teacher.ids)
    for divergence in (FORWARD, REVERSE):
        spec = Spec(divergence, kd_weight=1.0, tail=int(Tail.BUCKET))
        listed = TopKTeacher(teacher.ids, exact - 1e-6)
        # log p and log q are about 1; their difference is 1e-6.
        loss, *_ = check(backend, torch.float32, student, listed, None, spec, unit=1.0)
        assert loss > -3e-7
    # The same distribution: nothing but rounding, and no negative loss of any size.
    spec = Spec(FORWARD, kd_weight=1.0, tail=int(Tail.BUCKET))
    student, teacher, _ = make(8, 300, 20, temperature=1.0)
    own = TopKTeacher(teacher.ids, student.log_softmax(1).gather(1, teacher.ids))
    loss, _, grad = run(backend.name, backend.device, torch.float32, student, own, None, spec)
    assert abs(loss) < 1e-6 and grad.abs().max() < 1e-6


def test_infinite_values_as_the_reference_has_them(backend: Backend) -> None:
    student, teacher, _ = make(2, 40, 4)
    student[0, teacher.ids[0, 1]] = -torch.inf  # mass that the student cannot have
    for tail in TAILS:
        spec = Spec(FORWARD, kd_weight=1.0, temperature=2.0, tail=int(tail))
        loss, *_ = check(backend, torch.float32, student, teacher, None, spec)
        assert loss == torch.inf


def test_an_id_out_of_range(backend: Backend) -> None:
    student, teacher, labels = make(3, 40, 4)
    teacher.ids[1, 2] = 40
    spec = BASE._replace(divergence=FORWARD, tail=int(Tail.BUCKET))
    args = (student, teacher, labels, spec)
    if (backend.name, backend.device) in (("reference", "cpu"), ("native", "cpu")):
        message = (
            r"topk_kd_loss: topk_ids must be in \[0, 40\), or -1 for no entry, got 40 in row 1"
        )
        with pytest.raises(ValueError, match=message):
            run(backend.name, backend.device, torch.float32, *args)
        return
    loss, _, grad = run(backend.name, backend.device, torch.float32, *args)
    assert loss.isnan() and grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


def test_rows_and_their_gradient(backend: Backend) -> None:
    student, teacher, labels = make(5, 120, 8)
    labels[3] = -100
    spec = BASE._replace(divergence=REVERSE, tail=int(Tail.UNIFORM))
    upstream = torch.rand(5)
    results = []
    for name, device, dtype in ((backend.name, backend.device, torch.float32),
                                ("reference", "cpu", torch.float64),
                                ("reference", "cpu", torch.float32)):  # fmt: skip
        leaf = student.detach().to(device, dtype).requires_grad_()
        listed = TopKTeacher(teacher.ids.to(device), teacher.logprobs.float().to(device))
        rows = topk_kd_loss_rows(leaf, listed, labels.to(device), None, spec, backend=name)
        assert rows[3] == 0
        rows.backward(upstream.to(device, rows.dtype))
        results.append((rows.detach(), leaf.grad))
    for actual, oracle, same in zip(*results, strict=True):
        assert_within_budget(actual, oracle, same, torch.float32)


def test_in_place_and_strides(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference has no in-place form")
    spec = [float(x) for x in BASE._replace(divergence=FORWARD, tail=int(Tail.UNIFORM))]
    for dtype, classes in itertools.product((torch.float32, torch.bfloat16), (53, 1100)):
        student, teacher, labels = make(3, classes, 7)
        student = student.to(backend.device, dtype)
        listed = (teacher.ids.to(backend.device), teacher.logprobs.float().to(backend.device))
        others = (*listed, labels.to(backend.device), None, None, Spec.of(spec))
        loss, _, grad = topk_kd_loss_grad(backend.name, student, *others)
        wide = torch.zeros(3, classes + 3, dtype=dtype, device=backend.device)
        view = wide[:, 1 : classes + 1].copy_(student)
        again, _ = topk_kd_loss_grad_(backend.name, view, *others)
        alone, _, _ = topk_kd_loss_forward(backend.name, student, *others)
        if backend.name == "native":
            assert torch.equal(view, grad) and loss == alone == again
        # Off its boundary a row is summed in another order on a GPU.
        torch.testing.assert_close(view, grad)
        for value in (again, alone):
            torch.testing.assert_close(value, loss, rtol=1e-5, atol=0)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_properties(backend: Backend, data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 80))
    k = data.draw(st.integers(1, classes))
    divergence, tail = data.draw(st.sampled_from(KINDS))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 2.0, 5.0]))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    student, teacher, labels = make(3, classes, k, temperature=temperature)
    ids = torch.where(torch.rand(3, k) < 0.2, -1, teacher.ids)
    ids[:, 0] = teacher.ids[:, 0]
    spec = BASE._replace(divergence=divergence, tail=int(tail), temperature=temperature)
    listed = TopKTeacher(ids, teacher.logprobs)
    _, parts, _ = check(backend, torch.float32, student, listed, labels, spec)
    if tail is not Tail.NONE:
        assert parts[1] > -1e-6


def test_gradcheck_of_the_reference() -> None:
    student, teacher, labels = make(3, 12, 4)
    labels[1] = -100
    student.requires_grad_()
    for divergence, tail in KINDS:
        spec = BASE._replace(divergence=divergence, tail=int(tail), label_smoothing=0.1)

        def loss(x: Tensor, spec: Spec = spec) -> Tensor:
            return topk_kd_loss_reference(x, *teacher, labels, None, None, spec)[0]

        torch.autograd.gradcheck(loss, student)
        torch.autograd.gradgradcheck(loss, student)


def test_opcheck() -> None:
    if "native" not in kdkernels.available_backends("topk_kd_loss"):
        pytest.skip("no compiled kernels here")
    student, teacher, labels = make(3, 40, 4)
    spec = [float(x) for x in BASE._replace(divergence=FORWARD, tail=int(Tail.BUCKET))]
    args = (student.float(), teacher.ids, teacher.logprobs.float(), labels, None, None, spec)
    for primitive in (topk_kd_loss_forward, topk_kd_loss_grad, topk_kd_loss_grad_):
        torch.library.opcheck(primitive.overload("native"), args)


def test_compile_of_the_public_function() -> None:
    student, teacher, labels = make(6, 90, 5)
    ids, logprobs = teacher.ids, teacher.logprobs.float()

    def loss(x: Tensor) -> Tensor:
        result: Tensor = kdkernels.topk_kd_loss(
            x.view(2, 3, 90),
            ids.view(2, 3, 5),
            logprobs.view(2, 3, 5),
            labels.view(2, 3),
            shift=1,
            temperature=2.0,
        )
        return result

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = student.float().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


def test_leading_dimensions_mask_and_reductions() -> None:
    student, teacher, labels = make(6, 50, 4)
    shaped = (student.view(2, 3, 50), teacher.ids.view(2, 3, 4), teacher.logprobs.view(2, 3, 4))
    rows = kdkernels.topk_kd_loss(*shaped, labels.view(2, 3), reduction="none")
    assert rows.shape == (2, 3)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    mean = kdkernels.topk_kd_loss(*shaped, labels.view(2, 3), mask=mask)
    torch.testing.assert_close(mean, (rows * mask).sum() / 4)
    parts = kdkernels.topk_kd_loss(*shaped, labels.view(2, 3), return_parts=True, alpha=0.3)
    torch.testing.assert_close(parts.loss, 0.7 * parts.ce + 0.3 * parts.kd)
    half = kdkernels.topk_kd_loss(*shaped, labels.view(2, 3), num_items_in_batch=12)
    torch.testing.assert_close(half, rows.sum() / 12)
    module = kdkernels.TopKKDLoss(reduction="sum")
    torch.testing.assert_close(module(*shaped, labels.view(2, 3)), rows.sum())


X, IDS_OF_X, P = torch.randn(4, 10), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"topk_ids": IDS_OF_X[:3]}, ValueError,
         r"topk_kd_loss: topk_ids must be \[4, k\], got \[3, 3\]"),
        ({"topk_logprobs": P[:, :2]}, ValueError,
         r"topk_kd_loss: topk_logprobs must have the shape of topk_ids \[4, 3\], got \[4, 2\]"),
        ({"topk_ids": P}, TypeError,
         "topk_kd_loss: topk_ids must be int64 or int32, got float32"),
        ({"topk_logprobs": IDS_OF_X}, TypeError,
         "topk_kd_loss: topk_logprobs must be floating-point, got int64"),
        ({"topk_logprobs": P.clone().requires_grad_()}, ValueError,
         "topk_kd_loss: topk_logprobs must not require grad"),
        ({"topk_ids": IDS_OF_X - 2}, ValueError,
         r"topk_kd_loss: topk_ids must be in \[0, 10\), or -1 for no entry, got -2 in row 0"),
        ({"tail": "rest"}, ValueError,
         "topk_kd_loss: tail must be one of bucket, renorm, none, uniform, got 'rest'"),
        ({"divergence": "jsd"}, ValueError,
         "topk_kd_loss: divergence must be one of forward_kl, reverse_kl, got 'jsd'"),
        ({"softcap": (3.0, 4.0)}, TypeError,
         "topk_kd_loss: softcap must be a number, the student's, got tuple"),
        ({"vocab_size": 11}, ValueError,
         "topk_kd_loss: student must have at least 11 classes, got 10"),
        ({"student_logits": torch.randn(4, 0)}, ValueError,
         r"topk_kd_loss: student_logits must be \[..., classes\], got \[4, 0\]"),
        ({"alpha": 0.5}, ValueError,
         "topk_kd_loss: labels must be given with a cross-entropy weight of 0.5, got None"),
    ],
)  # fmt: skip
def test_refusals(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    full = {"student_logits": X, "topk_ids": IDS_OF_X, "topk_logprobs": P} | arguments
    with pytest.raises(error, match=message):
        kdkernels.topk_kd_loss(**full)


def test_double_precision_falls_to_the_reference() -> None:
    assert "float64" in kdkernels.explain("topk_kd_loss", X.double(), IDS_OF_X)
    student = X.double().requires_grad_()
    assert kdkernels.topk_kd_loss(student, IDS_OF_X, P).dtype == torch.float64
