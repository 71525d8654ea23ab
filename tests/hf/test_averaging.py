"""The callback in transformers' Trainer: evaluates, saves, resumes and exports the average."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import kdkernels
from kdkernels import WeightAverager

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

DATA = [{"input_ids": torch.arange(5) + i, "labels": torch.tensor(i % 2)} for i in range(12)]


def training(folder: Path, **options: Any) -> tuple[Any, WeightAverager, list[bool]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=40, intermediate_size=16, hidden_dropout_prob=0, **sizes
    )
    model = transformers.BertForSequenceClassification(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, eval_strategy="steps", eval_steps=1, save_steps=2,
        per_device_train_batch_size=2, learning_rate=0.01, report_to=[], disable_tqdm=True,
        use_cpu=True, seed=1,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=DATA, eval_dataset={"a": DATA[:2], "b": DATA[2:4]}
    )
    averager = WeightAverager(model, start_step=2)
    averaged: list[bool] = []

    def seen(*_: Any) -> None:
        if not model.training:  # an evaluation: the averages are then in the model
            averaged.append(averager._inside)

    model.register_forward_pre_hook(seen)
    kdkernels.hf.AveragingCallback(averager, **options).attach(trainer)
    return trainer, averager, averaged


def test_trainer(tmp_path: Path) -> None:
    trainer, whole, averaged = training(tmp_path / "whole", export=tmp_path / "averaged")
    save, complete = trainer._save_rng_state, []

    def before_the_last_file(folder: str) -> None:
        complete.append((Path(folder) / "weight_averager.pt").exists())
        save(folder)

    trainer._save_rng_state = before_the_last_file
    trainer.train()
    assert complete == [True] * 3
    # Two datasets a step; there is an average from step 2 on.
    assert averaged == [False] * 2 + [True] * 10
    assert whole.n_averaged == 5
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "averaged")
    for name, p in loaded.named_parameters():
        assert torch.equal(p, whole.averages()[name])

    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", resumed / "checkpoint-4")
    trainer, averager, _ = training(resumed)
    trainer.train(resume_from_checkpoint=True)
    assert averager.n_averaged == 5
    for name, average in averager.averages().items():
        assert torch.equal(average, whole.averages()[name])
    (resumed / "checkpoint-6" / "weight_averager.pt").unlink()
    trainer, _, _ = training(resumed)
    trainer.args.max_steps = 8
    with pytest.raises(FileNotFoundError, match="must be a checkpoint with weight_averager.pt"):
        trainer.train(resume_from_checkpoint=True)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="averager must be a WeightAverager, got int"):
        kdkernels.hf.AveragingCallback(3)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        kdkernels.nothing  # noqa: B018
