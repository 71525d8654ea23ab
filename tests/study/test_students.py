"""Students: random weights of the same configuration, embeddings of what occurs, other families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.train import Runtime
from kdkernels.api.study import students
from kdkernels.api.study.config import StudyConfig, make_config
from kdkernels.api.study.grid import Trial, trials_of
from kdkernels.api.study.students import UsedEmbedding, new_model
from kdkernels.api.study.train import Trainer

CPU = Runtime(torch.device("cpu"), bf16=False)


@pytest.fixture
def config(values: dict[str, Any]) -> StudyConfig:
    return make_config(values)


def trainer(folder: Path) -> Trainer:
    return Trainer(folder / "teachers", CPU, True, print)


def first(config: StudyConfig, initialisation: str, arm: str = "ft", seed: int = 0) -> Trial:
    return next(
        trial
        for trial in trials_of(config)
        if (trial.initialisation, trial.arm, trial.seed) == (initialisation, arm, seed)
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def test_scratch_is_the_same_model_with_other_weights(config: StudyConfig, tmp_path: Path) -> None:
    task = trainer(tmp_path).task(first(config, "pretrained"))
    pretrained = task.new_model(0)
    torch.manual_seed(1)
    one = students.drawn_anew(pretrained, 0)
    other = students.drawn_anew(pretrained, 0)
    assert type(one) is type(pretrained) and len(one.bert.encoder.layer) == 2
    same = {name: torch.equal(w, weights(other)[name]) for name, w in weights(one).items()}
    assert all(same.values())
    drawn = [name for name, w in weights(one).items() if w.dim() > 1]
    for name in drawn:
        assert not torch.equal(weights(one)[name], weights(pretrained)[name])
        spread = weights(one)[name].std().item()
        assert spread == pytest.approx(one.config.initializer_range, rel=0.4), name
    assert not torch.equal(weights(students.drawn_anew(pretrained, 1))[drawn[0]], one.get_parameter(
        drawn[0]))  # fmt: skip


def test_what_is_trained(config: StudyConfig, tmp_path: Path) -> None:
    task = trainer(tmp_path).task(first(config, "pretrained"))
    frozen = new_model(task, "pretrained", 0, False, False)
    assert not any(p.requires_grad for p in frozen.bert.embeddings.parameters())
    for model in (
        new_model(task, "pretrained", 0, False, True),
        new_model(task, "scratch", 0, False, False),
    ):
        assert all(p.requires_grad for p in model.parameters())
        # "never", [MASK] and [UNK] occur nowhere.
        words = model.bert.embeddings.word_embeddings
        assert isinstance(words, UsedEmbedding)
        assert len(words.weight) == model.config.vocab_size - 3 == len(task.used_tokens())


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("initialisation", ["pretrained", "scratch"])
def test_dropout(config: StudyConfig, tmp_path: Path, initialisation: str, dropout: bool) -> None:
    task = trainer(tmp_path).task(first(config, "pretrained"))
    model = new_model(task, initialisation, 0, dropout, False)
    rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    assert rates == ({model.config.hidden_dropout_prob} if dropout else {0.0})


def test_embeddings_of_what_occurs_train_as_all_of_them(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a whole run: with dropout off, and weight decay that the other rows alone would feel."""
    trial, figures = first(config, "scratch"), []
    for number, keep in enumerate((students.keep_used_embeddings, lambda model, used: None)):
        monkeypatch.setattr(students, "keep_used_embeddings", keep)
        figures.append(trainer(tmp_path / str(number)).run(trial, lambda event: None))
    assert figures[0]["parameters"] == figures[1]["parameters"] - 3 * 32
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-4)
    assert figures[0]["figures"] == figures[1]["figures"]


def _folder(kind: str, folder: Path) -> Path:
    """A tiny random GPT-2 or RoBERTa with a byte tokenizer; GPT's has no padding token."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import (
        GPT2Config,
        GPT2Model,
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaModel,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    raw = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pad = {} if kind == "gpt2" else {"pad_token": "<pad>"}
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", **pad
    ).save_pretrained(folder)
    size = {"vocab_size": len(vocabulary), "bos_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    if kind == "gpt2":
        small = GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=128, **size)
        GPT2Model(small).save_pretrained(folder)
    else:
        config = RobertaConfig(
            num_hidden_layers=3, hidden_size=16, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=130, pad_token_id=1, **size,
        )  # fmt: skip
        RobertaModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_other_families(values: dict[str, Any], tmp_path: Path, kind: str) -> None:
    model = str(_folder(kind, tmp_path / kind))
    config = make_config(
        values
        | {
            "students": {kind: {"model": model, "layers": [0, 2]}},
            "teachers": {"whole": {"model": model, "epochs": 1}},
            "epochs": 1,
        }
    )
    runs = trainer(tmp_path)
    for initialisation in ("pretrained", "scratch"):
        result = runs.run(first(config, initialisation, "kd"), lambda event: None)
        assert result["steps"] == 9 and result["teacher"]["examples"] == 140
        assert 0 <= result["figures"]["test"]["accuracy (%)"] <= 100
    frozen = new_model(runs.task(first(config, "pretrained")), "pretrained", 0, False, False)
    assert not frozen.get_input_embeddings().weight.requires_grad


def test_models_by_name(tmp_path: Path) -> None:
    assert students.model_folder(str(tmp_path), "students.a.model", print) == tmp_path
    message = r"students.a.model must be all-minilm-l6-v2, bert-tiny or an existing transformers"
    with pytest.raises(DistillError, match=message):
        students.model_folder("bert-huge", "students.a.model", print)
