"""``kd_loss`` over every backend, against the float64 reference."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers.backends import Backend
from helpers.budget import assert_same_direction, assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdkernels.ops.kd_loss import Divergence, Spec, kd_loss, kd_loss_rows
from kdkernels.ops.kd_loss.op import kd_loss_forward, kd_loss_grad, kd_loss_grad_

D = Divergence
BASE = Spec(ce_weight=0.4, kd_weight=0.6, temperature=2.0)
DIVERGENCES = [
    Spec(ce_weight=1.0),
    *(BASE._replace(divergence=int(d)) for d in list(D)[1:]),
    BASE._replace(divergence=int(D.JSD), beta=0.1, temperature=1.0),
    BASE._replace(divergence=int(D.FORWARD_KL), temperature=1.0),
    BASE._replace(divergence=int(D.FORWARD_KL), temperature=0.7),
    BASE._replace(divergence=int(D.REVERSE_KL), temperature=3.0, ce_weight=0.0),
]
OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "scale": {"student_scale": 0.5, "teacher_scale": 2.0},
    "softcap": {"student_softcap": 5.0, "teacher_softcap": 3.0},
    "padding": {"classes": -3},  # three columns less than there are
    "sum": {"mean": False},
    "want_ce": {"want_ce": True, "ce_weight": 0.0},
}


@dataclass
class Inputs:
    """Arguments of one call."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    spec: Spec
    row_weights: Tensor | None = None
    denominator: Tensor | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str) -> Inputs:
        """The same values (as the tested dtype rounds them) in another dtype."""

        def move(x: Tensor | None, to: torch.dtype) -> Tensor | None:
            return None if x is None else x.to(device=device, dtype=to)

        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        student, teacher = move(self.student, dtype), move(self.teacher, dtype)
        assert student is not None and teacher is not None
        return Inputs(
            student.detach().requires_grad_(),
            teacher,
            self.labels.to(device),
            self.spec,
            move(self.row_weights, accumulate),
            move(self.denominator, accumulate),
            self.more,
        )

    def run(self, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, parts and gradient."""
        needs_teacher = self.spec.needs_teacher
        loss, parts = kd_loss(
            self.student,
            self.teacher if needs_teacher else None,
            self.labels,
            self.row_weights,
            self.denominator,
            self.spec,
            backend=backend,
            **self.more,
        )
        (grad,) = torch.autograd.grad(loss, self.student)
        return loss.detach(), parts, grad


def make(rows: int, columns: int, spec: Spec, *, scale: float = 2.0, ignore: bool = True) -> Inputs:
    """Random logits; one row ignored (and full of NaN) where there are several."""
    student, teacher = torch.randn(2, rows, columns, dtype=torch.float64) * scale
    classes = columns if spec.classes == -1 else max(columns + spec.classes, 1)
    if spec.classes != -1:
        spec = spec._replace(classes=classes)
    labels = torch.randint(0, classes, (rows,))
    if ignore and rows > 1:
        labels[1] = spec.ignore_index
        student[1] = torch.nan
        teacher[1] = torch.inf
    return Inputs(student, teacher, labels, spec)


def check(inputs: Inputs, backend: Backend, dtype: torch.dtype) -> None:
    """Loss, parts and gradient within the error budget."""
    given_ = inputs.to(dtype, backend.device)
    oracle = given_.to(torch.float64, backend.device)
    low = given_.to(dtype, backend.device)
    actual = given_.run(backend.name)
    expected = oracle.run("reference")
    reference = low.run("reference")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    # The loss is a sum of terms of either sign (negative entropy) that may cancel.
    ce, divergence, lse_squared, _ = expected[1].abs()
    spec = inputs.spec
    terms = spec.ce_weight * ce + spec.kd_weight * divergence + spec.z_loss * lse_squared
    unit = float(terms) if torch.isfinite(terms) else 0.0
    assert_within_budget(actual[0], expected[0], reference[0], accumulate, unit=unit)
    assert_within_budget(actual[1][:3], expected[1][:3], reference[1][:3], accumulate)
    assert actual[1][3] == expected[1][3]
    assert actual[0].dtype == accumulate and actual[2].dtype == dtype
    # A gradient is a difference of probabilities: where they cancel, their rounding stays.
    unit = probability_unit(oracle)
    assert_within_budget(actual[2], expected[2], reference[2], dtype, unit=unit)
    if unit > 0 and torch.isfinite(expected[2]).all() and expected[2].abs().max() >= unit / 4:
        assert_same_direction(actual[2], expected[2].to(dtype).double(), dtype)


def probability_unit(inputs: Inputs) -> float:
    """Size of the largest probability as it enters the gradient, before differences are taken."""
    spec = inputs.spec
    valid = inputs.labels != spec.ignore_index
    student = inputs.student.detach()[valid]
    if student.numel() == 0:
        return 0.0
    top = float((student / spec.temperature).softmax(1).nan_to_num().max())
    weight = spec.ce_weight + spec.kd_weight / spec.temperature
    return top * weight / (len(student) if spec.mean else 1)


def widths(backend: Backend) -> tuple[int, ...]:
    # 1 and 2: degenerate; 17: one vector and a bit; 1024 and 1025: round a block of the CPU kernel;
    # 5003: several blocks, odd, so every row starts unaligned.
    return (1, 2, 17, 300) if backend.interpreted else (1, 2, 3, 17, 1024, 1025, 5003)


@pytest.mark.parametrize(
    "spec", DIVERGENCES, ids=lambda s: f"{D(s.divergence).name}-T{s.temperature}"
)
def test_matches_reference(backend: Backend, spec: Spec) -> None:
    for columns in widths(backend):
        check(make(3, columns, spec), backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", list(D), ids=lambda d: d.name)
def test_dtypes(backend: Backend, divergence: Divergence, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend} does not take {dtype}")
    columns = 261 if backend.interpreted else 2051
    check(make(4, columns, BASE._replace(divergence=int(divergence))), backend, dtype)


@pytest.mark.parametrize("divergence", list(D), ids=lambda d: d.name)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(backend: Backend, divergence: Divergence, option: str) -> None:
    spec = BASE._replace(divergence=int(divergence))._replace(**OPTIONS[option])
    columns = 70 if backend.interpreted else 1100
    check(make(4, columns, spec), backend, torch.float32)


@pytest.mark.parametrize("divergence", list(D), ids=lambda d: d.name)
def test_large_offsets(backend: Backend, divergence: Divergence) -> None:
    """A common offset of the logits costs no digits."""
    spec = BASE._replace(divergence=int(divergence), label_smoothing=0.1)
    inputs = make(3, 300, spec)
    # Rounded first, so that float32 holds the sum as exactly as float64 does.
    inputs.student = (inputs.student * 256).round() / 256 + 4096.0
    inputs.teacher = (inputs.teacher * 256).round() / 256 - 2048.0
    check(inputs, backend, torch.float32)


def test_infinite_term_without_weight(backend: Backend) -> None:
    """Reported, not multiplied by 0 into the loss."""
    spec = Spec(divergence=int(D.FORWARD_KL), kd_weight=1.0, want_ce=True)
    inputs = make(1, 9, spec, ignore=False)
    inputs.labels[0] = 3
    inputs.student[0, 3] = inputs.teacher[0, 3] = -torch.inf
    loss, parts, _ = inputs.to(torch.float32, backend.device).run(backend.name)
    assert torch.isfinite(loss) and parts[0] == torch.inf


def test_row_weights_and_denominator(backend: Backend) -> None:
    inputs = make(5, 40, BASE._replace(divergence=int(D.FORWARD_KL)))
    inputs.row_weights = torch.rand(5, dtype=torch.float64)
    inputs.row_weights[1] = torch.nan  # the weight of an ignored row is not looked at
    check(inputs, backend, torch.float32)
    inputs.denominator = torch.tensor(7.5, dtype=torch.float64)
    check(inputs, backend, torch.float32)
    inputs.denominator = torch.tensor(0.0, dtype=torch.float64)
    check(inputs, backend, torch.float32)


@pytest.mark.parametrize("divergence", [D.FORWARD_KL, D.REVERSE_KL, D.JSD, D.TVD, D.SPIKE])
def test_masked_classes(backend: Backend, divergence: Divergence) -> None:
    """-inf in both models: no mass, no gradient, no share of the smoothing."""
    inputs = make(4, 50, BASE._replace(divergence=int(divergence), label_smoothing=0.1))
    inputs.labels[inputs.labels >= 0] = 1
    for logits in (inputs.student, inputs.teacher):
        logits[:, 10:20] = -torch.inf
        logits[0, 21:] = -torch.inf
    check(inputs, backend, torch.float32)
    _, _, grad = inputs.to(torch.float32, backend.device).run(backend.name)
    assert (grad[:, 10:20] == 0).all()


def test_masked_in_one_model(backend: Backend) -> None:
    """The divergence is infinite exactly where the formula is."""
    inputs = make(1, 30, Spec(divergence=int(D.FORWARD_KL), kd_weight=1.0))
    inputs.teacher[0, 3] = -torch.inf
    check(inputs, backend, torch.float32)
    inputs.student[0, 4] = -torch.inf
    moved = inputs.to(torch.float32, backend.device)
    loss, _, grad = moved.run(backend.name)
    assert loss == torch.inf
    if backend.name != "reference":  # autograd through the infinite loss gives NaN
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("divergence", [D.FORWARD_KL, D.REVERSE_KL, D.JSD, D.TVD])
def test_extreme_logits(backend: Backend, divergence: Divergence) -> None:
    inputs = make(4, 64, BASE._replace(divergence=int(divergence)), ignore=False)
    for logits in (inputs.student, inputs.teacher):
        logits[0, 5], logits[1, 6] = 1e4, -1e4
        logits[2] = 1e4
        logits[3, 7:20] = -torch.inf
        logits[3, 8] = 1e4
    inputs.labels[:] = 5
    loss, parts, grad = inputs.to(torch.float32, backend.device).run(backend.name)
    assert torch.isfinite(loss).all() and torch.isfinite(parts).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("divergence", [D.FORWARD_KL, D.REVERSE_KL, D.JSD, D.TVD])
def test_equal_models_have_no_gradient(
    backend: Backend, divergence: Divergence, temperature: float, dtype: torch.dtype
) -> None:
    if backend.name == "reference":
        pytest.skip("autograd rounds the two softmaxes of the reference apart")
    spec = Spec(divergence=int(divergence), kd_weight=1.0, temperature=temperature, beta=0.3)
    inputs = make(3, 333 if backend.interpreted else 3333, spec)
    inputs.teacher = inputs.student.clone()
    loss, _, grad = inputs.to(dtype, backend.device).run(backend.name)
    assert loss == 0
    assert (grad == 0).all()


def test_rows_of_every_count(backend: Backend) -> None:
    for rows in (0, 1, 2, 33):
        inputs = make(rows, 9, BASE._replace(divergence=int(D.FORWARD_KL)))
        loss, parts, grad = inputs.to(torch.float32, backend.device).run(backend.name)
        assert grad.shape == (rows, 9)
        assert parts[3] == (inputs.labels != -100).sum()
        if rows == 0:
            assert loss == 0


def test_no_valid_row(backend: Backend) -> None:
    inputs = make(3, 9, BASE._replace(divergence=int(D.FORWARD_KL)))
    inputs.labels[:] = -100
    inputs.student[:] = torch.nan
    loss, parts, grad = inputs.to(torch.float32, backend.device).run(backend.name)
    assert loss == 0 and (parts == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("layout", ["wide_rows", "columns_first", "offset"])
def test_noncontiguous(backend: Backend, layout: str) -> None:
    inputs = make(5, 37, BASE._replace(divergence=int(D.FORWARD_KL))).to(
        torch.float32, backend.device
    )
    expected = inputs.run("reference")

    def lay_out(x: Tensor) -> Tensor:
        if layout == "columns_first":
            return x.detach().t().contiguous().t()
        columns = x.shape[1] + 11
        start = 3 if layout == "offset" else 0
        wide = torch.full((x.shape[0], columns), torch.nan, device=x.device, dtype=x.dtype)
        wide[:, start : start + x.shape[1]] = x.detach()
        return wide[:, start : start + x.shape[1]]

    inputs.student = lay_out(inputs.student).requires_grad_()
    inputs.teacher = lay_out(inputs.teacher)
    actual = inputs.run(backend.name)
    for a, b in zip(actual, expected, strict=True):
        assert_within_budget(a, b, b, torch.float32)


def test_mixed_dtypes(backend: Backend) -> None:
    if backend.name == "emulated":
        pytest.skip("the CUDA kernel takes student and teacher of one dtype")
    inputs = make(3, 50, BASE._replace(divergence=int(D.FORWARD_KL))).to(
        torch.float32, backend.device
    )
    inputs.teacher = inputs.teacher.to(torch.bfloat16)
    try:
        actual = inputs.run(backend.name)
    except NotImplementedError as error:
        pytest.skip(str(error))
    expected = inputs.run("reference")
    for a, b in zip(actual, expected, strict=True):
        assert_within_budget(a, b, b, torch.float32)


@pytest.mark.parametrize("divergence", list(D), ids=lambda d: d.name)
def test_gradcheck(backend: Backend, divergence: Divergence) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip(f"{backend} does not take float64")
    spec = BASE._replace(divergence=int(divergence), label_smoothing=0.1, z_loss=0.01)
    inputs = make(3, 7, spec._replace(student_softcap=4.0), ignore=False).to(
        torch.float64, backend.device
    )

    def loss(student: Tensor) -> Tensor:
        teacher = inputs.teacher if inputs.spec.needs_teacher else None
        return kd_loss(
            student, teacher, inputs.labels, None, None, inputs.spec, backend=backend.name
        )[0]

    assert torch.autograd.gradcheck(loss, (inputs.student,))


@pytest.mark.parametrize("divergence", [D.NONE, D.FORWARD_KL, D.JSD], ids=lambda d: d.name)
def test_per_row_losses(backend: Backend, divergence: Divergence) -> None:
    """Any upstream gradient of the rows is honoured, twice."""
    inputs = make(5, 60, BASE._replace(divergence=int(divergence))).to(
        torch.float32, backend.device
    )
    inputs.row_weights = torch.rand(5, device=backend.device)
    teacher = inputs.teacher if inputs.spec.needs_teacher else None
    upstream = torch.randn(5, device=backend.device)

    def run(name: str) -> tuple[Tensor, Tensor, Tensor]:
        rows = kd_loss_rows(
            inputs.student, teacher, inputs.labels, inputs.row_weights, inputs.spec, backend=name
        )
        first = torch.autograd.grad(rows, inputs.student, upstream, retain_graph=True)[0]
        second = torch.autograd.grad(rows, inputs.student, 2 * upstream)[0]
        return rows.detach(), first, second

    for a, b in zip(run(backend.name), run("reference"), strict=True):
        assert_within_budget(a, b, b, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradient_and_second_backward(backend: Backend, dtype: torch.dtype) -> None:
    inputs = make(4, 80, BASE._replace(divergence=int(D.FORWARD_KL))).to(dtype, backend.device)
    loss, _ = kd_loss(
        inputs.student, inputs.teacher, inputs.labels, None, None, inputs.spec, backend=backend.name
    )
    once = torch.autograd.grad(loss, inputs.student, retain_graph=True)[0].clone()
    for factor in (3.0, 0.0, 0.5):
        upstream = torch.tensor(factor, device=backend.device)
        (grad,) = torch.autograd.grad(loss, inputs.student, upstream, retain_graph=True)
        assert_within_budget(grad, once.double() * factor, once * factor, dtype)
    (grad,) = torch.autograd.grad(loss, inputs.student, torch.tensor(-2.0, device=backend.device))
    assert_within_budget(grad, once.double() * -2, once * -2, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", list(D), ids=lambda d: d.name)
def test_inplace(backend: Backend, divergence: Divergence, dtype: torch.dtype) -> None:
    """The gradient takes the place of the logits, and is the same to the bit."""
    if backend.name == "reference":
        pytest.skip("the reference has no in-place form")
    spec = BASE._replace(divergence=int(divergence), student_softcap=6.0, label_smoothing=0.1)
    inputs = make(4, 70, spec).to(dtype, backend.device)
    _, _, expected = inputs.run(backend.name)
    leaf = inputs.student
    inputs.student = leaf.detach().clone().requires_grad_() + 0.0  # not a leaf
    storage = inputs.student.data_ptr()
    inputs.more = {"inplace": True}
    _, _, grad = inputs.run(backend.name)
    assert torch.equal(grad, expected)
    assert torch.equal(inputs.student.detach(), expected)
    assert inputs.student.data_ptr() == storage


def test_inplace_is_noticed_by_who_saved_the_logits(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference has no in-place form")
    inputs = make(3, 8, Spec(ce_weight=1.0), ignore=False).to(torch.float32, backend.device)
    logits = inputs.student.exp()  # saves its result for backward
    loss, _ = kd_loss(
        logits, None, inputs.labels, None, None, inputs.spec, inplace=True, backend=backend.name
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_large_vocabulary(backend: Backend) -> None:
    columns = 4099 if backend.interpreted else 262147
    check(make(2, columns, BASE._replace(divergence=int(D.FORWARD_KL))), backend, torch.float32)


def test_offsets_past_32_bits(backend: Backend) -> None:
    """Two rows more than 2**31 elements apart; only the rows themselves touch memory."""
    if backend.name == "reference" or backend.interpreted:
        pytest.skip("the check is for compiled kernels with their own address arithmetic")
    columns, stride = 5, 2**31 + 7
    from torch import UntypedStorage  # plain: torch.empty is poisoned, which would touch 8 GiB

    storage = UntypedStorage(2 * stride * 2, device=backend.device)
    far = torch.tensor([], dtype=torch.bfloat16, device=backend.device).set_(
        storage, 0, (2, columns), (stride, 1)
    )
    inputs = make(2, columns, BASE._replace(divergence=int(D.FORWARD_KL)), ignore=False).to(
        torch.bfloat16, backend.device
    )
    _, _, expected = inputs.run(backend.name)
    far.copy_(inputs.student.detach())
    inputs.student = far.requires_grad_()
    _, _, grad = inputs.run(backend.name)
    assert torch.equal(grad, expected)


def test_promised_accuracy(backend: Backend) -> None:
    """Loss to 1e-6 and gradient to 2e-7 (relative norm) of float64, in float32."""
    columns = 2000 if backend.interpreted else 32000
    rows = 4 if backend.interpreted else 64
    for temperature, divergence in itertools.product((1.0, 2.0, 3.0), (D.FORWARD_KL, D.REVERSE_KL)):
        spec = BASE._replace(divergence=int(divergence), temperature=temperature)
        inputs = make(rows, columns, spec, ignore=False)
        single = inputs.to(torch.float32, backend.device)
        actual = single.run(backend.name)
        expected = single.to(torch.float64, backend.device).run("reference")
        assert abs(actual[0].double() / expected[0] - 1) <= 1e-6
        if backend.name != "reference":
            assert (actual[2].double() - expected[2]).norm() / expected[2].norm() <= 2e-7


# derandomize: the same examples in every run, so that CI fails on a change, not on a draw.
@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape_and_mask(backend: Backend, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 6))
    columns = data.draw(st.integers(1, 90))
    divergence = data.draw(st.sampled_from(list(D)))
    spec = BASE._replace(
        divergence=int(divergence),
        temperature=data.draw(st.sampled_from([0.5, 1.0, 2.0, 5.0])),
        beta=data.draw(st.floats(0.05, 0.95)),
        label_smoothing=data.draw(st.sampled_from([0.0, 0.2, 1.0])),
        mean=data.draw(st.booleans()),
    )
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    inputs = make(rows, columns, spec, ignore=False)
    for row in range(rows):
        if data.draw(st.booleans()):
            inputs.labels[row] = -100
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    check(inputs, backend, dtype)


def arguments(inputs: Inputs) -> tuple[Any, ...]:
    teacher = inputs.teacher if inputs.spec.needs_teacher else None
    return (inputs.student.detach(), teacher, inputs.labels, inputs.row_weights, None, inputs.spec)


@pytest.mark.parametrize(
    "primitive", [kd_loss_forward, kd_loss_grad, kd_loss_grad_], ids=lambda p: p.name
)
def test_opcheck(backend: Backend, primitive: Any) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is plain PyTorch, not an operator")
    for spec in (Spec(ce_weight=1.0), BASE._replace(divergence=int(D.FORWARD_KL))):
        inputs = make(3, 11, spec, ignore=False).to(torch.float32, backend.device)
        torch.library.opcheck(primitive.overload(backend.name), arguments(inputs))
        inputs.student = inputs.student.detach().t().contiguous().t()[:, :11]
        wide = torch.zeros(3, 16, device=backend.device)
        wide[:, :11] = inputs.student
        inputs.student = wide[:, :11]
        torch.library.opcheck(primitive.overload(backend.name), arguments(inputs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend: Backend, dynamic: bool) -> None:
    """One graph, no break, the same numbers; sizes may vary."""
    spec = BASE._replace(divergence=int(D.FORWARD_KL))

    def step(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss, _ = kd_loss(student * 2, teacher, labels, None, None, spec, backend=backend.name)
        return loss * 3

    # aot_eager: what matters is the capture; inductor's code generation is torch's own matter.
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 6, 9) if dynamic else (4,):
        inputs = make(rows, 20, spec, ignore=False).to(torch.float32, backend.device)
        results = []
        for function in (step, compiled):
            loss = function(inputs.student, inputs.teacher, inputs.labels)
            results.append((loss.detach(), torch.autograd.grad(loss, inputs.student)[0]))
        for a, b in zip(*results, strict=True):
            assert_within_budget(a, b, b, torch.float32)


def test_autocast_and_checkpoint(backend: Backend) -> None:
    spec = BASE._replace(divergence=int(D.FORWARD_KL))
    inputs = make(3, 12, spec, ignore=False).to(torch.bfloat16, backend.device)

    def step(student: Tensor) -> Tensor:
        return kd_loss(
            student, inputs.teacher, inputs.labels, None, None, spec, backend=backend.name
        )[0]

    with torch.autocast(backend.device, dtype=torch.bfloat16):
        loss = step(inputs.student)
        again = torch.utils.checkpoint.checkpoint(step, inputs.student, use_reentrant=False)
    assert loss.dtype == torch.float32
    a = torch.autograd.grad(loss, inputs.student)[0]
    b = torch.autograd.grad(again, inputs.student)[0]
    assert torch.equal(a, b)


def test_labels_out_of_range(backend: Backend) -> None:
    inputs = make(3, 12, Spec(ce_weight=1.0), ignore=False).to(torch.float32, backend.device)
    inputs.labels[2] = 12
    if backend.name in ("native", "reference") and backend.device == "cpu":
        with pytest.raises(
            ValueError, match=r"kd_loss: labels must be in \[0, 12\).*got 12 in row 2"
        ):
            inputs.run(backend.name)
    else:
        loss, _, grad = inputs.run(backend.name)
        assert loss.isnan()
        assert grad[2].isnan().any() and torch.isfinite(grad[:2]).all()


def test_inplace_refuses_what_it_would_destroy(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference has no in-place form")
    labels = torch.zeros(4, dtype=torch.int64, device=backend.device)
    leaf = torch.randn(2, 14, device=backend.device, requires_grad=True)
    overlapping = (torch.randn(1, 7, device=backend.device, requires_grad=True) * 2).expand(4, 7)
    for student, message in ((leaf.view(4, 7), "nor a view of one"), (overlapping, "overlap")):
        with pytest.raises(ValueError, match=message):
            kd_loss(
                student, None, labels, None, None, Spec(ce_weight=1.0), inplace=True,
                backend=backend.name,
            )  # fmt: skip


def test_float16_gradient_meets_the_loss_scale_before_rounding(backend: Backend) -> None:
    """As a GradScaler needs it: small elements must not become 0 first."""
    rows = 8 if backend.interpreted else 512
    spec = BASE._replace(divergence=int(D.FORWARD_KL))
    inputs = make(rows, 200, spec, ignore=False).to(torch.float16, backend.device)
    inputs.denominator = torch.tensor(2e6, device=backend.device)  # of a very large batch
    scale = torch.tensor(65536.0, device=backend.device)

    def scaled(given_: Inputs, name: str) -> Tensor:
        loss, _ = kd_loss(
            given_.student, given_.teacher, given_.labels, None, given_.denominator, spec,
            backend=name,
        )  # fmt: skip
        return torch.autograd.grad(loss, given_.student, scale.to(loss.dtype))[0]

    oracle = scaled(inputs.to(torch.float64, backend.device), "reference")
    actual = scaled(inputs, backend.name)
    assert_same_direction(actual, oracle.half().double(), torch.float16)
    assert ((actual == 0) & (oracle.half() != 0)).sum() == 0


def test_double_backward_is_right_or_refused(backend: Backend) -> None:
    inputs = make(3, 9, Spec(ce_weight=1.0), ignore=False).to(torch.float32, backend.device)
    loss, _ = kd_loss(
        inputs.student, None, inputs.labels, None, None, inputs.spec, backend=backend.name
    )
    if backend.name != "reference":
        with pytest.raises(RuntimeError, match="backend must be 'reference' for create_graph"):
            torch.autograd.grad(loss, inputs.student, create_graph=True)
        return
    (grad,) = torch.autograd.grad(loss, inputs.student, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), inputs.student)
    assert second.abs().sum() > 0


def test_func_transforms_use_the_reference(backend: Backend) -> None:
    inputs = make(3, 9, Spec(ce_weight=1.0), ignore=False).to(torch.float32, backend.device)
    student = inputs.student.detach()

    def loss(x: Tensor, name: str | None) -> Tensor:
        return kd_loss(x, None, inputs.labels, None, None, inputs.spec, backend=name)[0]

    _, expected = torch.func.jvp(lambda x: loss(x, "reference"), (student,), (student,))
    assert expected != 0
    _, automatic = torch.func.jvp(lambda x: loss(x, None), (student,), (student,))
    assert automatic == expected
    if backend.name != "reference":
        with pytest.raises(NotImplementedError, match="forward-mode differentiation need the ref"):
            torch.func.jvp(lambda x: loss(x, backend.name), (student,), (student,))


def test_teacher_from_inference_mode(backend: Backend) -> None:
    inputs = make(3, 9, BASE._replace(divergence=int(D.FORWARD_KL)), ignore=False).to(
        torch.float32, backend.device
    )
    with torch.inference_mode():
        teacher = inputs.teacher * 1.0
    if backend.name == "reference":
        pytest.skip("autograd itself refuses inference tensors")
    rows = kd_loss_rows(
        inputs.student, teacher, inputs.labels, None, inputs.spec, backend=backend.name
    )
    rows.sum().backward()
    assert torch.isfinite(inputs.student.grad).all()


def test_repeatable(backend: Backend) -> None:
    columns = 500 if backend.interpreted else 40000
    inputs = make(8, columns, BASE._replace(divergence=int(D.JSD))).to(
        torch.bfloat16, backend.device
    )
    first, second = inputs.run(backend.name), inputs.run(backend.name)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(3)}, r"student must be \[rows, classes\], got shape \[3\]"),
        ({"student": torch.zeros(3, 4).long()}, "student must be float32.*got int64"),
        ({"student": torch.zeros(3, 0)}, r"student must be \[rows, classes\], got shape \[3, 0\]"),
        ({"student": torch.zeros(3, 4).to_sparse()}, "student must be a strided tensor"),
        (
            {"teacher": torch.zeros(3, 4, dtype=torch.float64), "backend": "native"},
            "float64 teacher only with a float64 student",
        ),
        (
            {"teacher": torch.zeros(3, 5)},
            r"teacher must have the shape of student \[3, 4\], got \[3, 5\]",
        ),
        ({"teacher": torch.zeros(3, 4, requires_grad=True)}, "teacher must not require grad"),
        ({"teacher": None}, "teacher must be given for this divergence, got None"),
        ({"teacher": torch.zeros(3, 4, device="meta")}, "teacher must be on cpu, got meta"),
        ({"labels": None}, "labels must be given for a loss on labels, got None"),
        ({"labels": torch.zeros(4).long()}, r"labels must be \[3\], got shape \[4\]"),
        ({"labels": torch.zeros(3)}, "labels must be int64, got float32"),
        ({"row_weights": torch.zeros(2)}, r"row_weights must be \[3\], got shape \[2\]"),
        ({"row_weights": torch.ones(3, requires_grad=True)}, "row_weights must not require grad"),
        ({"spec": BASE._replace(divergence=1, classes=9)}, "at least 9 classes, got 4"),
        ({"backend": "cudnn"}, "backend must be one of native, triton, reference.*got 'cudnn'"),
        (
            {"student": torch.zeros(3, 4), "inplace": True, "backend": "native"},
            "student must not be a leaf",
        ),
        ({"backend": "reference", "inplace": True}, "inplace must be False for the reference"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "student": torch.zeros(3, 4),
        "teacher": torch.zeros(3, 4),
        "labels": torch.zeros(3).long(),
        "row_weights": None,
        "denominator": None,
        "spec": BASE._replace(divergence=int(D.FORWARD_KL)),
    } | change
    if "leaf" in message:
        call["student"] = call["student"].requires_grad_()
    names = ("student", "teacher", "labels", "row_weights", "denominator", "spec")
    positional = [call.pop(name) for name in names]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        kd_loss(*positional, **call)


def test_no_sync_on_cuda(backend: Backend) -> None:
    if backend.device != "cuda":
        pytest.skip("there is nothing to synchronise on the CPU")
    inputs = make(4, 100, BASE._replace(divergence=int(D.FORWARD_KL))).to(torch.bfloat16, "cuda")
    inputs.run(backend.name)
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.run(backend.name)
    finally:
        torch.cuda.set_sync_debug_mode("default")
