"""A sparse teacher whose level follows the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trained import distilled
from transformers import BertConfig, BertForSequenceClassification

import kdkernels
from kdkernels import SparseTeacher
from kdkernels.api import hf

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
DATA = [{"input_ids": torch.arange(1, 6) + i, "labels": torch.tensor(i % 2)} for i in range(12)]


def bert(layers: int) -> Any:
    torch.manual_seed(layers)
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **SIZES))


def sparse_teacher() -> SparseTeacher:
    model = bert(2).eval()
    batch = {name: torch.stack([row[name] for row in DATA]) for name in DATA[0]}
    return SparseTeacher(model, SparseTeacher.score(model, [batch], student=bert(1)))


def levels(folder: Path, schedule: Any, **train: Any) -> list[int]:
    """How many heads the teacher has in each micro-batch."""
    sparse = sparse_teacher()
    callback = hf.SparseTeacherCallback(sparse, schedule)
    trainer = distilled(
        folder, bert(1), sparse.model, train_dataset=DATA, callbacks=[callback], max_steps=4,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    seen: list[int] = []
    hook = sparse.model.register_forward_pre_hook(
        lambda *_: seen.append(sum(heads for heads, _ in sparse.widths))
    )
    trainer.train(**train)
    hook.remove()
    return seen


def test_schedules(tmp_path: Path) -> None:
    pairs = [(1, 0.5), (3, 0.25)]
    assert levels(tmp_path, pairs) == [8, 8, 4, 4, 4, 4, 6, 6]
    resumed = levels(tmp_path, pairs, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed == [4, 4, 6, 6]
    assert levels(tmp_path, lambda step: 0.25 * (step % 2)) == [8, 8, 6, 6, 8, 8, 6, 6]


def test_refusals() -> None:
    with pytest.raises(TypeError, match="sparse must be a SparseTeacher, got int"):
        hf.SparseTeacherCallback(3, [(0, 0.5)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"schedule must have rising steps, got \[2, 1\]"):
        hf.SparseTeacherCallback(sparse_teacher(), [(2, 0.5), (1, 0.2)])
    assert kdkernels.hf.SparseTeacherCallback is hf.SparseTeacherCallback
