"""Language models: loading, cutting, hidden states and heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from kdkernels.api.distill import fetch, lm_models
from kdkernels.api.distill.errors import DistillError


@pytest.fixture
def teacher(tiny_lm: Path) -> Any:
    return lm_models.load_causal_lm(str(tiny_lm))[0]


def test_student_is_the_first_layers(teacher: Any) -> None:
    student = lm_models.make_student(teacher, 2)
    assert student.config.num_hidden_layers == 2 and len(student.model.layers) == 2
    own, others = student.state_dict(), teacher.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in own.items())
    assert student.lm_head.weight is student.model.embed_tokens.weight, "a tied head stays tied"
    assert student.lm_head.weight.data_ptr() != teacher.lm_head.weight.data_ptr()
    assert len(teacher.model.layers) == 6, "the teacher stays whole"


def test_saved_student_reloads(teacher: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    student = lm_models.make_student(teacher, 3)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(again(tokens).logits, student(tokens).logits)


def test_hidden_states_and_head_give_the_logits(teacher: Any) -> None:
    lm_models.check_head(teacher, "model")
    tokens = torch.arange(20).view(2, 10)
    head = lm_models.head_of(teacher)
    logits = linear(lm_models.last_hidden(teacher, tokens), head.weight, head.bias)
    torch.testing.assert_close(logits, teacher(tokens).logits)


def test_logits_changed_after_the_head_are_refused(teacher: Any) -> None:
    teacher.lm_head.register_forward_hook(lambda module, given, out: 30 * torch.tanh(out / 30))
    with pytest.raises(DistillError, match=r"^model must compute its logits from the last hidden"):
        lm_models.check_head(teacher, "model")


def test_frozen_embeddings(teacher: Any) -> None:
    student = lm_models.make_student(teacher, 2)
    lm_models.freeze_embeddings(student)
    frozen = {name for name, weight in student.named_parameters() if not weight.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("layers", [0, 7])
def test_layers_there_are_not(teacher: Any, layers: int) -> None:
    with pytest.raises(DistillError, match=rf"^layers must lie in 1\.\.6 .*, got {layers}$"):
        lm_models.make_student(teacher, layers)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"^model must be smollm2-135m or a folder .*, got x$"):
        lm_models.load_causal_lm("x")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DistillError, match=r"^model must be a folder that transformers") as caught:
        lm_models.load_causal_lm(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_damaged_conversion_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("some")
    assert not lm_models._intact(tmp_path)
    sums = {"weights": fetch.sha256_of(tmp_path / "weights")}
    manifest = {"from": fetch.SMOLLM2.sha256, "files": sums}
    (tmp_path / lm_models.MANIFEST).write_text(json.dumps(manifest))
    assert lm_models._intact(tmp_path)
    (tmp_path / "weights").write_text("more")
    assert not lm_models._intact(tmp_path)


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_is_fetched_and_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads 93 MB; about half a minute.

    Run with ``pytest tests/distill -m "network and slow" -k smollm2``.
    """
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path))
    told: list[str] = []
    model, tokenizer = lm_models.load_causal_lm("smollm2-135m", told.append)
    assert any(line.startswith("licence: SmolLM2") for line in told)
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (30, 49152)
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(tokens).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
    del model
    told.clear()
    lm_models.load_causal_lm("smollm2-135m", told.append)
    assert told == [], "the second time nothing is downloaded or converted"
