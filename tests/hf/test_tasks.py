"""Other students than causal language models, and losses of labels alone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trained import (
    VOCAB,
    close,
    distilled,
    lm,
    settings,
    texts,
    transformers,
    weights,
)
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import kdkernels
from kdkernels.api import hf

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
}  # fmt: skip
# Of Adam the biases of keys, which have no gradient but noise, take whole steps.
SGD = {"optim": "sgd", "learning_rate": 0.1}


def bert(kind: str, layers: int, **options: Any) -> Any:
    torch.manual_seed(layers)
    config = transformers.BertConfig(num_hidden_layers=layers, **SIZES, **options)
    return getattr(transformers, f"BertFor{kind}")(config)


def examples(**labels: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for index in range(12):
        tokens = torch.randint(1, 50, (8,), generator=generator)
        mask = (torch.arange(8) < 8 - index % 4).long()
        own = {name: make(index, tokens * mask) for name, make in labels.items()}
        found.append({"input_ids": tokens * mask, "attention_mask": mask, **own})
    return found


def some_tokens(index: int, tokens: torch.Tensor) -> torch.Tensor:
    return torch.where((torch.arange(8) % 3 == index % 3) & (tokens > 0), tokens, -100)


# What is trained: kind of model, its options, the data.
TASKS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "texts": ("SequenceClassification", {"num_labels": 3}, examples(labels=lambda i, x: i % 3)),
    "tokens": ("TokenClassification", {"num_labels": 50}, examples(labels=some_tokens)),
    "masked": ("MaskedLM", {}, examples(labels=some_tokens)),
    "spans": (
        "QuestionAnswering", {},
        # The last of them was cut off.
        examples(start_positions=lambda i, x: i % 8, end_positions=lambda i, x: 8 - i % 2),
    ),
}  # fmt: skip


def eager(logits: Any, teacher: Any, batch: dict[str, Any]) -> torch.Tensor:
    total = []
    for name, labels in hf.teacher.LOGITS.items():
        if name in logits:
            student = logits[name].flatten(0, -2)
            target = batch[labels].flatten()
            target = torch.where(target < student.shape[-1], target, -100)
            rows = target != -100
            both = (logits[name], teacher[name])
            log_s, log_t = (x.flatten(0, -2).div(2).log_softmax(-1) for x in both)
            soft = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)[rows].mean()
            total.append(0.5 * F.cross_entropy(student, target) + 0.5 * 4 * soft)
    return torch.stack(total).mean()


@pytest.mark.parametrize("task", TASKS)
def test_loss_of_logits(tmp_path: Path, task: str) -> None:
    kind, options, data = TASKS[task]
    student, teacher = bert(kind, 1, **options), bert(kind, 2, **options)
    trainer = distilled(tmp_path, student, teacher, train_dataset=data, eval_dataset=data)
    assert trainer._loss.route == "logits"
    batch = trainer._prepare_inputs(trainer.data_collator(data[:5]))
    given = {k: v for k, v in batch.items() if "label" not in k and "positions" not in k}
    student.eval()
    with torch.no_grad():
        expected = eager(student(**given), teacher.eval()(**given), batch)
        loss, outputs = trainer.compute_loss(student, batch, return_outputs=True)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(next(iter(outputs.values())), next(iter(student(**given).values())))
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_kd_loss"] > 0 and metrics["eval_ce_loss"] > 0


@pytest.mark.parametrize("task", ["texts", "tokens"])
def test_accumulated_batches(tmp_path: Path, task: str) -> None:
    kind, options, data = TASKS[task]
    runs = []
    for rows, steps in ((4, 1), (1, 4)):
        trainer = distilled(
            tmp_path, bert(kind, 1, **options), bert(kind, 2, **options), train_dataset=data[:4],
            per_device_train_batch_size=rows, gradient_accumulation_steps=steps, hidden_weight=0.2,
            train_sampling_strategy="sequential", **SGD,
        )  # fmt: skip
        trainer.train()
        runs.append(weights(trainer.model))
    close(*runs)


def test_masked_language_model_by_hidden_states(tmp_path: Path) -> None:
    kind, options, data = TASKS["masked"]
    runs = []
    for route in ("logits", "hidden"):
        student, teacher = bert(kind, 1, **options), bert(kind, 2, **options)
        trainer = distilled(tmp_path, student, teacher, train_dataset=data, route=route, **SGD)
        trainer.train()
        runs.append(weights(student))
    close(*runs)


@pytest.mark.parametrize("route", ["hidden", "logits"])
def test_sequence_to_sequence(tmp_path: Path, route: str) -> None:
    """Labels of the decoder are aligned with its output; T5 scales what its head gets."""

    def t5(layers: int) -> Any:
        torch.manual_seed(layers)
        config = transformers.T5Config(
            vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=layers, num_heads=2,
            decoder_start_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)

    data = texts(4)
    teacher = t5(2).eval()
    trainer = distilled(tmp_path, t5(1), teacher, train_dataset=data, route=route)
    batch = trainer._prepare_inputs(trainer.data_collator(data))
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model.eval(), batch)
        logits = [model(**batch).logits for model in (trainer.model, teacher)]
    expected = kdkernels.kd_loss(*logits, batch["labels"], temperature=2.0)
    torch.testing.assert_close(found, expected)
    trainer.train()


def test_mixture_of_experts(tmp_path: Path) -> None:
    """The load-balancing loss of the model is added as the Trainer adds it."""
    options = {"kind": "Mixtral", "output_router_logits": True, "router_aux_loss_coef": 0.5}
    options |= {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
    arguments = settings(tmp_path, gradient_accumulation_steps=1)
    plain = Trainer(lm(**options), TrainingArguments(**arguments), train_dataset=texts())
    trainer = hf.DistillTrainer(
        lm(**options), hf.DistillArguments(**arguments), train_dataset=texts()
    )
    for each in (plain, trainer):
        each.train()
    close(weights(trainer.model), weights(plain.model))


def test_unsuited_models(tmp_path: Path) -> None:
    regression = bert("SequenceClassification", 1, num_labels=1, problem_type="regression")
    with pytest.raises(ValueError, match="must be a classifier of one label, got .*'regression'"):
        distilled(tmp_path, regression, regression)
    regression.config.problem_type = None
    with pytest.raises(ValueError, match="must be a classifier of one label, got .*'regression'"):
        distilled(tmp_path, regression, regression)


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "label_smoothing": ({"label_smoothing": 0.1}, kdkernels.label_smoothing_loss),
    "tfkd_reg": ({"alpha": 0.1, "temperature": 20.0}, kdkernels.tfkd_reg_loss),
    "confidence_penalty": ({"beta": 0.2}, kdkernels.confidence_penalty_loss),
}


@pytest.mark.parametrize("kind", KINDS)
def test_label_losses(tmp_path: Path, kind: str) -> None:
    options, loss = KINDS[kind]
    function = hf.label_loss_func(kind, shift=1, **options)
    assert pickle.loads(pickle.dumps(function)).args[0] == kind
    runs = []
    for rows, steps in ((4, 1), (1, 4)):
        arguments = settings(
            tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps
        )
        trainer = Trainer(
            lm(), TrainingArguments(**arguments), train_dataset=texts(), compute_loss_func=function
        )
        trainer.train()
        runs.append(weights(trainer.model))
    close(*runs)
    batch = {k: torch.stack([text[k] for text in texts(3)]) for k in texts(1)[0]}
    labels = batch.pop("labels")
    outputs = lm()(**batch)
    expected = loss(outputs.logits, labels, shift=1, num_items_in_batch=7, **options)
    torch.testing.assert_close(function(outputs, labels, num_items_in_batch=7), expected)


def test_refused_label_losses() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        hf.label_loss_func("focal")
    function = hf.label_loss_func("tfkd_reg", alpha=0.1, temperature=20.0)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shift must be given for logits of tokens: 1 for a caus"):
        function({"logits": torch.zeros(2, 3, 5)}, tokens)
    with pytest.raises(ValueError, match="outputs must hold logits, got None"):
        function({"logits": None}, tokens)
    with pytest.raises(ValueError, match="labels must be given"):
        function({"logits": torch.zeros(2, 5)}, None)
