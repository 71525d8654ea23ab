"""The loss of a batch, and the loop around it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdkernels.api.distill import measure, models, text, train
from kdkernels.api.distill.errors import DistillError

RUNTIME = train.Runtime(torch.device("cpu"), bf16=False)


def recipe(**changes: Any) -> train.Recipe:
    values: dict[str, Any] = {"epochs": 3, "lr": 3e-3, "batch_size": 16, "seed": 0}
    return train.Recipe(**(values | changes))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["labels", "logits", "both"])
def test_objective_is_the_formula(kind: str, alpha: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 3, dtype=torch.double), torch.randn(6, 3)
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    cross_entropy = F.cross_entropy(student, labels)
    divergence = 4.0 * F.kl_div(
        F.log_softmax(student / 2.0, -1),
        F.log_softmax(teacher.double() / 2.0, -1),
        log_target=True,
        reduction="batchmean",
    )
    loss = train.objective(
        student.float(),
        None if kind == "labels" else teacher,
        None if kind == "logits" else labels,
        recipe(temperature=2.0, alpha=alpha),
    )
    expected = {
        "labels": cross_entropy,
        "logits": alpha * divergence,
        "both": (1 - alpha) * cross_entropy + alpha * divergence,
    }[kind]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)


@pytest.fixture
def task(
    tiny_teacher: Path, make_text: Callable[[int, random.Random], str]
) -> tuple[Any, train.TrainSet, train.EvalSet]:
    classifier = models.load_classifier(tiny_teacher, ["neg", "pos"], "teacher", 0)
    source = random.Random(1)
    labels = [i % 2 for i in range(200)]
    texts = [make_text(label, source) for label in labels]
    ids = text.encode(classifier.tokenizer, texts, 32)
    train_set = train.TrainSet(ids[:150], torch.tensor(labels[:150]))
    return classifier.model, train_set, train.EvalSet(ids[150:], torch.tensor(labels[150:]))


def test_fit_learns_and_reports(task: tuple[Any, train.TrainSet, train.EvalSet]) -> None:
    model, train_set, dev = task
    events: list[dict[str, Any]] = []
    result = train.fit(model, [train_set], dev, recipe(epochs=6), RUNTIME, 0, events.append)
    assert result.curve[-1][1] > 90.0
    assert result.curve[-1][0] == result.steps == len(events) == 60
    assert result.examples == 6 * 150
    assert [event["step"] for event in events if "loss" in event] == [20, 40, 60]
    assert sum("dev_accuracy" in event for event in events) == len(result.curve)


def test_same_seed_same_weights(task: tuple[Any, train.TrainSet, train.EvalSet]) -> None:
    model, train_set, dev = task
    models.disable_dropout(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    logits = []
    for seed in (0, 0, 1):
        model.load_state_dict(start)
        train.fit(model, [train_set], dev, recipe(epochs=1, seed=seed), RUNTIME, 0, lambda _: None)
        logits.append(train.predict(model, dev.ids, RUNTIME, 0))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_predict_keeps_the_order(task: tuple[Any, train.TrainSet, train.EvalSet]) -> None:
    model, train_set, _ = task
    counted: list[int] = []
    together = train.predict(model, train_set.ids, RUNTIME, 0, counted.append)
    assert sum(counted) == len(train_set.ids)
    for row in (0, 7, 149):
        alone = train.predict(model, [train_set.ids[row]], RUNTIME, 0)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_accumulated_batches_are_one_step() -> None:
    """The same weights as with batches twice as large."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 5), torch.randn(24, 2)
    rows = [list(range(first, first + 4)) for first in range(0, 24, 4)]
    ends, counts, rates = [], [], []
    for steps, accumulate in (
        (rows, 2),
        ([a + b for a, b in zip(rows[::2], rows[1::2], strict=True)], 1),
    ):
        torch.manual_seed(1)
        model = torch.nn.Linear(5, 2)
        seen: list[dict[str, Any]] = []
        loop = train.Loop[list[int]](
            loss=lambda part, model=model: F.mse_loss(model(x[part]), y[part]),
            evaluate=lambda: 0.0,
            metric="none",
            size=len,
            on_event=seen.append,
        )
        given = recipe(evaluations=0, accumulate=accumulate, betas=(0.8, 0.9), eps=1e-6)
        found = train.run(model, steps, loop, given)
        ends.append([p.detach() for p in model.parameters()])
        counts.append((found.steps, found.examples))
        rates.append([event["loss"] for event in seen if "loss" in event])
    assert counts == [(3, 24)] * 2
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(rates[0], rates[1])


def test_learning_rate_rises_then_falls_to_zero() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = train.make_optimizer([parameter], lr=1.0)
    schedule = train.linear_decay(optimizer, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates.index(max(rates)) == 5 and max(rates) == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[6:]))
    assert 0 < rates[-1] < 0.02


def test_loss_times_compare_fused_with_eager() -> None:
    times = measure.loss_times(8, 3, 2.0, RUNTIME)
    assert set(times) == {"labels", "logits"}
    assert all(value > 0 for pair in times.values() for value in pair.values())


def test_inference_rates_of_two_models(task: tuple[Any, train.TrainSet, train.EvalSet]) -> None:
    model, train_set, _ = task
    rates = measure.inference_rates(
        {"one": (model, train_set.ids, 0), "two": (model, train_set.ids[:8], 0)}, RUNTIME
    )
    assert set(rates) == {"one", "two"} and min(rates.values()) > 0


def test_a_wrong_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "objective", lambda rows, *_: rows.sum())
    with pytest.raises(DistillError, match="fused loss on labels must equal the eager one"):
        measure.loss_times(8, 3, 2.0, RUNTIME)
