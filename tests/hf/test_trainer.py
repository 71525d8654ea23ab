"""``DistillTrainer`` against what one writes without it, and against itself."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import trained
from helpers.trained import close, distilled, lm, losses, texts, weights
from transformers import HfArgumentParser, Trainer, TrainingArguments

import kdkernels
from kdkernels.api import hf


def eager(folder: Path, **options: Any) -> Any:
    arguments = TrainingArguments(**trained.settings(folder, **options))
    data = {"train_dataset": texts(), "eval_dataset": texts(5)}
    return trained.Eager(lm(), arguments, teacher=lm(3, 32, seed=5), temperature=2.0, **data)


def test_against_eager_losses(tmp_path: Path) -> None:
    expected, trainer = eager(tmp_path), distilled(tmp_path)
    assert trainer._loss.route == "hidden"
    for each in (expected, trainer):
        each.train()
    close(weights(trainer.model), weights(expected.model))
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"])


def test_logits_route_is_the_same_loss(tmp_path: Path) -> None:
    runs = [distilled(tmp_path, route=route) for route in ("hidden", "logits")]
    for each in runs:
        each.train()
    close(*(weights(each.model) for each in runs))


def test_cross_entropy_alone_is_the_trainers_own(tmp_path: Path) -> None:
    plain = Trainer(lm(), TrainingArguments(**trained.settings(tmp_path)), train_dataset=texts())
    arguments = hf.DistillArguments(**trained.settings(tmp_path))
    trainer = hf.DistillTrainer(lm(), arguments, train_dataset=texts())
    for each in (plain, trainer):
        each.train()
    close(weights(trainer.model), weights(plain.model))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["ce_loss"] == pytest.approx(entry["loss"]) for entry in logged)
    assert not any("kd_loss" in entry for entry in logged)


@pytest.mark.parametrize("hidden_weight", [0.0, 0.3])
def test_accumulated_batches(tmp_path: Path, hidden_weight: float) -> None:
    """The rows of micro-batches with few and with many labels count alike."""
    sizes = [(4, 1), (2, 2), (1, 4)]
    options = {"hidden_weight": hidden_weight, "train_sampling_strategy": "sequential"}
    runs = [
        distilled(
            tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, **options
        )
        for rows, steps in sizes
    ]
    for each in runs:
        each.train()
    for each in runs[1:]:
        close(weights(each.model), weights(runs[0].model))
        assert losses(each) == pytest.approx(losses(runs[0]), rel=1e-5)


def test_parts_in_logs_and_evaluations(tmp_path: Path) -> None:
    trainer = distilled(tmp_path, alpha=0.25, hidden_weight=0.3, logging_steps=2)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        parts = 0.75 * entry["ce_loss"] + 0.25 * entry["kd_loss"] + entry["hidden_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
    metrics = trainer.evaluate(metric_key_prefix="test")
    rows = {name: 0.0 for name in ("ce", "kd")}
    count = 0
    for text in texts(5):
        labels = torch.nn.functional.pad(text["labels"][1:], (0, 1), value=-100)
        given = {k: v[None] for k, v in text.items() if k != "labels"}
        with torch.no_grad():
            logits = [m.eval()(**given).logits[0] for m in (trainer.model, trainer._teacher.model)]
        parts = kdkernels.kd_loss(
            *logits, labels, temperature=2.0, reduction="sum", return_parts=True
        )
        rows["ce"] += parts.ce.item()
        rows["kd"] += parts.kd.item()
        count += int(parts.n_valid)
    assert metrics["test_ce_loss"] == pytest.approx(rows["ce"] / count, rel=1e-5)
    assert metrics["test_kd_loss"] == pytest.approx(rows["kd"] / count, rel=1e-5)
    assert metrics["test_hidden_loss"] > 0


def test_outputs(tmp_path: Path) -> None:
    """With the logits of the model itself where they are wanted, and none where they are not."""
    trainer = distilled(tmp_path)
    batch = trainer._prepare_inputs({k: v[None] for k, v in texts(2)[1].items()})
    before = set(batch)
    loss, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    given = {k: v for k, v in batch.items() if k != "labels"}
    assert torch.equal(outputs.logits, trainer.model(**given).logits)
    assert set(batch) == before
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), loss)
    seen: list[Any] = []
    head = trainer.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, given, output: seen.append(output.shape[-1]))
    predicted = trainer.predict(texts(5))
    assert predicted.predictions.shape == (5, trained.TOKENS, trained.VOCAB)
    assert set(seen) == {trained.VOCAB}
    seen.clear()
    trainer.args.prediction_loss_only = True
    trainer.evaluate()
    hook.remove()
    assert set(seen) == {1}


@pytest.mark.parametrize("route", ["hidden", "logits"])
def test_no_labels_at_all(tmp_path: Path, route: str) -> None:
    """Batches without a row that counts have a loss of 0 and no gradient."""
    data = [{**text, "labels": torch.full_like(text["labels"], -100)} for text in texts(8)]
    trainer = distilled(tmp_path, train_dataset=data, eval_dataset=data, route=route)
    before = weights(trainer.model)
    trainer.train()
    assert losses(trainer) == [0.0] * 4
    after = weights(trainer.model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert trainer.evaluate()["eval_kd_loss"] == 0.0


def test_labels_that_are_shifted_already(tmp_path: Path) -> None:
    trainer = distilled(tmp_path)
    batch = {k: torch.stack([text[k] for text in texts(3)]) for k in texts(1)[0]}
    expected = trainer.compute_loss(trainer.model.eval(), batch)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    for labels in ({"shift_labels": shifted}, {"shift_labels": shifted, "labels": batch["labels"]}):
        given = {k: v for k, v in batch.items() if k != "labels"}
        torch.testing.assert_close(trainer.compute_loss(trainer.model, given | labels), expected)


def test_bfloat16(tmp_path: Path) -> None:
    """Autocast of the student, a teacher in 16 bits."""
    expected = distilled(tmp_path)
    teacher = hf.prepare_teacher(lm(3, 32, seed=5), dtype=torch.bfloat16)
    trainer = distilled(tmp_path, teacher=teacher, bf16=True)
    for each in (expected, trainer):
        each.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=0.02)
    assert losses(trainer) != losses(expected)


def test_compiled(tmp_path: Path) -> None:
    expected, trainer = (
        distilled(tmp_path, **options)
        for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"})
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for each in (expected, trainer):
        each.train()
    close(weights(trainer.model), weights(expected.model))
    # One graph for all steps.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
def test_activation_checkpointing(tmp_path: Path) -> None:
    runs = [
        distilled(tmp_path, hidden_weight=0.3, gradient_checkpointing=on) for on in (False, True)
    ]
    for each in runs:
        each.train()
    close(*(weights(each.model) for each in runs))


def test_command_line() -> None:
    options = ["--temperature", "2.5", "--alpha", "0.9", "--hidden_layers", "1:2,2:4"]
    parser = HfArgumentParser(hf.DistillArguments)
    given = ["--output_dir", "runs", "--use_cpu", "--learning_rate", "0.1", *options]
    (found,) = parser.parse_args_into_dataclasses(given)
    assert (found.temperature, found.alpha, found.learning_rate) == (2.5, 0.9, 0.1)
    assert found.layer_map().rule == ((1, 2), (2, 4)) and found.vocab_size is None


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="teacher must be a model, .*got str"):
        distilled(tmp_path, teacher="a name")
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0, got 0.1"):
        distilled(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="alpha must"):
        hf.DistillOptions(alpha=2.0)
    with pytest.raises(ValueError, match="hidden_layers must be a rule or pairs .*'1:x'"):
        hf.DistillOptions(hidden_layers="1:x")
    with pytest.raises(ValueError, match="hidden_layers must count layers from 1, got '0:1'"):
        hf.DistillOptions(hidden_layers="0:1")
    with pytest.raises(ValueError, match="route must"):
        hf.DistillOptions(route="top")
    arguments = hf.DistillArguments(**trained.settings(tmp_path))
    with pytest.raises(ValueError, match="distill must not be given with args"):
        hf.DistillTrainer(lm(), arguments, teacher=lm(), distill=hf.DistillOptions())
    with pytest.raises(ValueError, match="hidden_weight must be 0 without a live teacher"):
        hf.DistillTrainer(lm(), hf.DistillArguments(str(tmp_path), hidden_weight=1.0, use_cpu=True))
    with pytest.raises(ValueError, match="compute_loss_func must not be given"):
        hf.DistillTrainer(lm(), arguments, compute_loss_func=lambda *_: None)


@pytest.mark.parametrize(
    "module", [hf.mixin, hf.options, hf.teacher, hf.label_loss], ids=lambda m: m.__name__
)
def test_examples(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
