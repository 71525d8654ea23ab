"""Supervised fine-tuning with TRL's SFTTrainer that also learns from a teacher, by LoRA if asked.

    python examples/trl_sft_kd.py                                  # SmolLM2-135M on WikiText-2
    python examples/trl_sft_kd.py --lora                           # adapters only
    python examples/trl_sft_kd.py --model DIR --data FILE.txt      # your own

TRL's trainer is as it comes, with the fused head that gives no logits: the loss is taken from
hidden states and heads. Needs trl, and peft for --lora.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from kdkernels.api import hf
from kdkernels.api.distill.lm_data import split_text
from kdkernels.api.distill.lm_models import load_causal_lm, make_student


@dataclass
class Arguments(hf.DistillOptions, SFTConfig):
    """TRL's arguments with those of the distillation."""


class DistillSFTTrainer(hf.DistillMixin, SFTTrainer):
    """TRL's trainer with the loss of the distillation."""


def main(
    model: str = "smollm2-135m",
    data: str = "wikitext-2",
    out: Path = Path("runs/trl-sft-kd"),
    layers: int = 8,
    steps: int = 200,
    lora: bool = False,
    quick: bool = False,
) -> None:
    """Trains, evaluates and saves the student."""
    steps = min(steps, 4) if quick else steps
    teacher, tokenizer = load_causal_lm(model, print)
    student = make_student(teacher, layers)
    if lora:
        from peft import LoraConfig, get_peft_model

        student = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", r=8))

    def lines(split: str, count: int) -> Dataset:
        found = [line for line in split_text(data, split, print).splitlines() if len(line) > 20]
        return Dataset.from_dict({"text": found[:count]})

    arguments = Arguments(
        output_dir=str(out),
        temperature=2.0,
        alpha=0.5,
        max_length=128,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3 if lora else 3e-4,
        bf16=torch.cuda.is_available(),
        logging_steps=max(steps // 20, 1),
        save_strategy="no",
        report_to=[],
    )
    trainer = DistillSFTTrainer(
        student,
        arguments,
        teacher=teacher,
        train_dataset=lines("train", 4 * steps),
        eval_dataset=lines("test", 8 if quick else 100),
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    parts = ", ".join(f"{name} {metrics[f'eval_{name}']:.3f}" for name in ("ce_loss", "kd_loss"))
    print(f"held-out text: {parts}; student in {out}")


if __name__ == "__main__":
    typer.run(main)
