"""Heads: what models do after them, those that cannot be read, and students under PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trained import VOCAB, close, distilled, lm, losses, texts, weights
from torch import nn

from kdkernels.api import hf
from kdkernels.api.hf.head import check_logits, core, find_head, logit_options

SOFTCAP = {"kind": "Gemma2", "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
# name: student, teacher, and what their configurations say.
MODELS: dict[str, tuple[dict[str, Any], tuple[float, float | None]]] = {
    "Gemma2": (SOFTCAP, (1.0, 2.0)),
    "Cohere": ({"kind": "Cohere", "logit_scale": 0.25}, (0.25, None)),
    "Granite": ({"kind": "Granite", "logits_scaling": 4.0}, (0.25, None)),
    "Falcon-H1": (
        {
            "kind": "FalconH1", "lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2,
            "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1,
        },
        (0.5, None),
    ),
    "GPT2": ({"kind": "GPT2", "n_layer": 1, "attn_pdrop": 0.0, "resid_pdrop": 0.0}, (1.0, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_scale_and_cap(tmp_path: Path, name: str) -> None:
    """Of student and teacher, as their logits have them."""
    options, expected = MODELS[name]
    found = []
    for route in ("hidden", "logits"):
        teacher = lm(seed=5, **options)
        assert logit_options(teacher) == expected
        trainer = distilled(tmp_path, lm(**options), teacher, route=route, max_steps=2)
        trainer.train()
        found.append(trainer)
    close(*(weights(each.model) for each in found))
    assert losses(found[0]) == pytest.approx(losses(found[1]), rel=1e-5)


def test_rows_of_models_without_a_loss_type(tmp_path: Path) -> None:
    """The Trainer does not know that GPT-2 shifts its labels and counts one row a text more."""
    options = MODELS["GPT2"][0]
    trainer = distilled(tmp_path, lm(**options), lm(seed=5, **options))
    batch = {name: torch.stack([text[name] for text in texts(3)]) for name in texts(1)[0]}
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)
    assert count == (batch["labels"][:, 1:] != -100).sum() != (batch["labels"] != -100).sum()


def test_one_model_with_a_cap_and_one_without(tmp_path: Path) -> None:
    runs = [
        distilled(tmp_path, lm(**SOFTCAP), route=route, max_steps=2)
        for route in ("hidden", "logits")
    ]
    for each in runs:
        each.train()
    close(*(weights(each.model) for each in runs))


class Doubled(nn.Module):
    """A head's output, changed behind its back."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.loss_type = model, model.config, model.loss_type

    def get_output_embeddings(self) -> nn.Module:
        found: nn.Module = self.model.get_output_embeddings()
        return found

    def forward(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        outputs["logits"] = 2 * outputs["logits"]
        return outputs


def test_other_changes_of_the_logits_are_refused() -> None:
    batch = {"input_ids": torch.arange(8).view(2, 4)}
    model = lm().train()
    model.config.final_logit_softcapping = 30.0  # which this architecture does not heed
    with pytest.raises(ValueError, match="student must scale by 1.0 and cap by 30.0 .*got Llama"):
        check_logits(model, find_head(model, "student"), batch, "student")
    assert model.training
    with pytest.raises(ValueError, match="scale by 1.0 and cap by None .*Doubled.*route='logits'"):
        model = Doubled(lm())
        check_logits(model, find_head(model, "teacher"), batch, "teacher")


def test_a_head_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    class Aside(type(lm())):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            hidden = self.model(inputs["input_ids"]).last_hidden_state
            return {"logits": nn.functional.linear(hidden, self.lm_head.weight)}

    student = Aside(lm().config)
    message = "the student's head must run once in a forward pass, got 0 runs"
    trainer = distilled(tmp_path, student)
    assert trainer._loss.route == "hidden"
    batch = {k: v[None] for k, v in texts(1)[0].items()}
    with pytest.raises(RuntimeError, match=message):
        trainer.compute_loss(student, batch)


def test_padded_vocabularies(tmp_path: Path) -> None:
    """151936 against 152064, in small: the rows behind the real ones are nobody's."""
    teacher = lm(2, 32, seed=5, vocab_size=VOCAB + 15)
    trainer = distilled(tmp_path, teacher=teacher)
    with pytest.raises(ValueError, match=f"{VOCAB}.*{VOCAB + 15}|{VOCAB + 15}.*{VOCAB}"):
        trainer.train()
    runs = []
    for extra in (0, 15):
        teacher = lm(2, 32, seed=5, vocab_size=VOCAB + 15)
        teacher.resize_token_embeddings(VOCAB + extra)
        trainer = distilled(tmp_path, teacher=teacher, vocab_size=VOCAB)
        trainer.train()
        runs.append(weights(trainer.model))
    close(*runs)


def test_heads_that_cannot_be_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for options in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options)
        student = peft.get_peft_model(lm(tie_word_embeddings=False), config)
        with pytest.raises(ValueError, match="student must have a head that PEFT does not wrap"):
            distilled(tmp_path, student)
    distilled(tmp_path, student, route="logits", max_steps=1).train()
    teacher = lm(2, tie_word_embeddings=False)
    quantised = nn.Linear(16, VOCAB, bias=False)
    quantised.weight = nn.Parameter(torch.zeros(VOCAB, 16, dtype=torch.int8), requires_grad=False)
    teacher.lm_head = quantised
    trainer = distilled(tmp_path, teacher=teacher)
    with pytest.raises(
        ValueError, match="teacher must have a head with a weight of floats, .*int8"
    ):
        trainer.train()
    classifier = find_classifier()
    with pytest.raises(ValueError, match="student must have output embeddings for route='hidden'"):
        distilled(tmp_path, classifier, route="hidden")


def find_classifier() -> Any:
    import transformers

    return transformers.AutoModelForSequenceClassification.from_config(lm().config)


def test_adapters_only(tmp_path: Path) -> None:
    """The loss reads the frozen head; gradients go to the adapters alone, as they would have."""
    peft = pytest.importorskip("peft")
    runs = []
    for route in ("hidden", "logits"):
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
        student = peft.get_peft_model(lm(), config)
        before = weights(student)
        trainer = distilled(
            tmp_path, student, route=route, hidden_weight=0.3, save_strategy="steps", save_steps=4
        )
        trainer.train()
        runs.append(weights(student))
        changed = {name for name, value in runs[-1].items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if "lora" in name}
        assert core(student).get_output_embeddings().weight.grad is None
    close(*runs)
    saved = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "distill_projections.pt"} <= saved
    assert "model.safetensors" not in saved


def test_prompts_without_tokens_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = distilled(tmp_path, peft.get_peft_model(lm(), config))
    with pytest.raises(ValueError, match=r"one row a token \[2, 9\], got \[2, 12\]"):
        trainer.train()


def test_head_of_a_teacher(tmp_path: Path) -> None:
    teacher = hf.prepare_teacher(lm(2, **SOFTCAP))
    signals = teacher({k: v[None] for k, v in texts(1)[0].items()})
    assert signals.head is not None and signals.head.softcap == 2.0
    assert signals.hidden is not None and not signals.hidden.requires_grad
    assert not signals.head.weight.requires_grad
