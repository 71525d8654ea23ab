"""The first layers of a language model learn from the whole of it, in Hugging Face's Trainer.

    python examples/hf_trainer.py                                  # SmolLM2-135M on WikiText-2
    python examples/hf_trainer.py --model DIR --data FILE.txt      # your own
    python examples/hf_trainer.py --resume                         # goes on after a kill

The student is a transformers folder at the end; its loss, and the teacher's, are printed.
"""

from __future__ import annotations

from pathlib import Path

import typer

import kdkernels
from kdkernels.api.distill.lm_data import lm_blocks
from kdkernels.api.distill.lm_models import freeze_embeddings, load_causal_lm, make_student


def main(
    model: str = "smollm2-135m",
    data: str = "wikitext-2",
    out: Path = Path("runs/hf-trainer"),
    layers: int = 4,
    steps: int = 200,
    seq_len: int = 128,
    quick: bool = False,
    resume: bool = False,
) -> None:
    """Trains, evaluates and saves the student."""
    steps = min(steps, 4) if quick else steps
    teacher, tokenizer = load_causal_lm(model, print)
    student = make_student(teacher, layers)
    freeze_embeddings(student)  # most of a small student; the head is read all the same
    batch, held_out = 4, 8 if quick else 64

    def blocks(split: str, count: int) -> list[dict[str, object]]:
        found = lm_blocks(data, tokenizer, split, seq_len, count * seq_len)
        return [{"input_ids": tokens, "labels": tokens} for _, tokens in found]

    arguments = kdkernels.hf.DistillArguments(
        output_dir=str(out),
        temperature=2.0,
        alpha=0.5,
        hidden_weight=0.1,  # the outputs of the layers as well
        hidden_layers="last",
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        learning_rate=1e-3,
        warmup_steps=0.1,
        logging_steps=max(steps // 20, 1),
        save_steps=max(steps // 4, 1),
        save_total_limit=2,
        prediction_loss_only=True,  # logits are for metrics; without them none are in memory
        report_to=[],
    )
    averager = kdkernels.WeightAverager(student, "ema", decay=0.98, start_step=steps // 2)
    trainer = kdkernels.hf.DistillTrainer(
        student,
        arguments,
        teacher=teacher,
        train_dataset=blocks("train", steps * batch),
        eval_dataset=blocks("test", held_out),
        processing_class=tokenizer,
    )
    kdkernels.hf.AveragingCallback(averager, export=out / "averaged").attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.save_model()
    parts = ", ".join(f"{name} {metrics[f'eval_{name}']:.3f}" for name in ("ce_loss", "kd_loss"))
    print(f"held-out text, averaged weights: {parts}; student in {out}")


if __name__ == "__main__":
    typer.run(main)
