"""With TRL's ``SFTTrainer``, whose fused forward pass gives no logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trained import VOCAB, close, distilled, lm, losses, settings, texts, tokenizer, weights

from kdkernels import TeacherCache, TeacherCacheWriter
from kdkernels.api import hf

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore:.return_outputs")


class SFT(hf.DistillMixin, trl.SFTTrainer):
    pass


@dataclass
class Arguments(hf.DistillOptions, trl.SFTConfig):
    pass


def data(number: int = 12) -> Any:
    rows = []
    for text in texts(number):
        length = int(text["attention_mask"].sum())
        rows.append({name: text[name][:length].tolist() for name in ("input_ids", "labels")})
    return datasets.Dataset.from_list(rows)


def sft(folder: Path, teacher: Any = None, student: Any = None, **options: Any) -> Any:
    options = {"bf16": False, "gradient_checkpointing": False, **options}
    arguments = Arguments(temperature=2.0, **settings(folder, **options))
    return SFT(
        lm() if student is None else student,
        arguments,
        teacher=lm(3, 32, seed=5) if teacher is None else teacher,
        train_dataset=data(),
        eval_dataset=data(5),
        processing_class=tokenizer(),
    )


def test_same_as_the_plain_trainer(tmp_path: Path) -> None:
    plain, trainer = distilled(tmp_path), sft(tmp_path)
    fused = trainer.model(
        input_ids=torch.ones(1, 3, dtype=torch.int64), labels=torch.ones(1, 3, dtype=torch.int64),
        fused_lm_head=True,
    )  # fmt: skip
    assert getattr(fused, "logits", None) is None
    for each in (plain, trainer):
        each.train()
    close(weights(trainer.model), weights(plain.model))
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    metrics, expected = trainer.evaluate(), plain.evaluate()
    for name in ("eval_loss", "eval_kd_loss", "eval_ce_loss"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4)


def test_with_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = sft(tmp_path, student=peft.get_peft_model(lm(), config))
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all("lora" in name for name in changed)


def test_packed_texts_from_a_cache(tmp_path: Path) -> None:
    """Without padding a batch is one row, whose examples are found by their positions."""
    folder, teacher = tmp_path / "cache", lm(3, 32, seed=5).eval()
    with TeacherCacheWriter(folder, k=8, vocab_size=VOCAB, temperature=2.0) as writer:
        for number, row in enumerate(data()):
            tokens = torch.tensor(row["input_ids"])
            with torch.no_grad():
                logits = teacher(input_ids=tokens[None]).logits[0]
            top = (logits / 2.0).log_softmax(-1).topk(8)
            writer.add(number, tokens, top.indices, top.values)
    trainer = sft(tmp_path, TeacherCache(folder), padding_free=True, max_length=None, max_steps=2)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    trainer.train()
    assert all(entry["kd_loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
