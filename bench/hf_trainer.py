"""Distillation in Hugging Face's Trainer: ``kdkernels.hf`` against an override of ``compute_loss``.

    OMP_WAIT_POLICY=PASSIVE python bench/hf_trainer.py --out hf.jsonl --threads 2   # 3 minutes

A student of SmolLM2-135M's first layers learns from the whole of it on WikiText-2, float32, on both
sides from the same weights, with the same batches and optimizer. The eager side is what one would
write without this package: the logits of both models, of the rows that have a label, in
``F.cross_entropy`` and ``F.kl_div``. Turns alternate; a step's time is the median of a turn, the
ratio that of the turns' medians; processor seconds tell more where others use the cores too. Peak
memory is that of a training in a process of its own above what it holds before. The loss curves
are compared first: a wrong training is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from kdkernels.api.distill import lm_data, lm_models
from kdkernels.api.distill.runner import quiet_transformers
from kdkernels.api.hf import DistillArguments, DistillTrainer
from kdkernels.bench.memory import resident_peak

TEMPERATURE, ALPHA = 2.0, 0.5
SIDES = ("fused", "eager")
# Loss curves of float32 trainings whose sums are in another order.
TOLERANCE = 1e-4


class Eager(Trainer):
    """The logits of both models in losses of torch."""

    teacher: Any

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the rows with a label."""
        student = model(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            teacher = self.teacher(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
        labels = inputs["labels"][:, 1:].flatten()
        rows = labels != -100
        if not rows.all():
            student, teacher, labels = student[rows], teacher[rows], labels[rows]
        hard = F.cross_entropy(student, labels, reduction="sum")
        log_s, log_t = ((x / TEMPERATURE).log_softmax(-1) for x in (student, teacher))
        soft = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        loss = (1 - ALPHA) * hard + ALPHA * TEMPERATURE**2 * soft
        return loss / num_items_in_batch


class Clock(TrainerCallback):
    """Seconds of each step, by the clock and of processors."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._begun = (0.0, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins."""
        self._begun = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step ends."""
        wall, processor = self._begun
        self.seconds.append((time.perf_counter() - wall, time.process_time() - processor))


class Setting:
    """Models and data, which both sides share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.teacher, tokenizer = lm_models.load_causal_lm(options.model, print)
        count = options.steps * options.batch * options.seq_len
        blocks = lm_data.lm_blocks(options.data, tokenizer, "train", options.seq_len, count, print)
        prompt = round(options.prompt * options.seq_len)
        self.data = []
        for _, tokens in blocks:
            labels = tokens.clone()
            labels[:prompt] = -100
            self.data.append({"input_ids": tokens, "labels": labels})

    def trainer(self, side: str, folder: str) -> tuple[Trainer, Clock]:
        """A trainer of one side, with a student of its own."""
        student = lm_models.make_student(self.teacher, self.options.layers)
        student.requires_grad_(True)  # the teacher that it was cut from may be frozen already
        if self.options.freeze:
            lm_models.freeze_embeddings(student)
        clock = Clock()
        common: dict[str, Any] = {
            "output_dir": folder, "max_steps": self.options.steps, "learning_rate": 3e-4,
            "per_device_train_batch_size": self.options.batch, "use_cpu": True, "report_to": [],
            "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        given: dict[str, Any] = {"train_dataset": self.data, "callbacks": [clock]}
        made: Any
        if side == "fused":
            arguments = DistillArguments(temperature=TEMPERATURE, alpha=ALPHA, **common)
            made = DistillTrainer(student, arguments, teacher=self.teacher, **given)
        else:
            made = Eager(student, TrainingArguments(**common), **given)
            made.teacher = self.teacher
        from transformers import PrinterCallback

        made.remove_callback(PrinterCallback)
        return made, clock


def turn(setting: Setting, side: str) -> tuple[list[float], list[tuple[float, float]]]:
    """Losses and seconds of the steps of one training."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = setting.trainer(side, folder)
        trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], clock.seconds


def peak_of(side: str, options: argparse.Namespace) -> int | None:
    """Bytes above the models, in a process of its own; None where the system does not tell."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    command = [sys.executable, "-m", "kdkernels.bench.hf_trainer", "--peak", side]
    for name in ("model", "data", "layers", "batch", "seq_len", "prompt", "threads"):
        if name in given:
            command += [f"--{name.replace('_', '-')}", str(given[name])]
    command += ["--steps", "2", *(["--freeze"] if options.freeze else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None
    return int(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Curves, times and memory of both sides."""
    setting = Setting(options)
    curves: dict[str, list[float]] = {}
    medians: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for _ in range(options.turns):
        for side in SIDES:
            losses, seconds = turn(setting, side)
            if side in curves and losses != curves[side]:
                raise SystemExit(f"{side}: two equal trainings must have equal losses")
            curves[side] = losses
            steps = seconds[1:]  # the first fills caches
            medians[side].append([statistics.median(kind) for kind in zip(*steps, strict=True)])
        pairs = zip(curves["fused"], curves["eager"], strict=True)
        worst = max(abs(fused - eager) / eager for fused, eager in pairs)
        if worst > TOLERANCE:
            raise SystemExit(f"the two loss curves must agree to {TOLERANCE}, got {worst:.1e}")
        line = ", ".join(f"{side} {medians[side][-1][0]:.2f} s a step" for side in SIDES)
        print(f"{line}; losses differ by {worst:.1e} at most", flush=True)
    middle = {side: [statistics.median(x) for x in zip(*medians[side], strict=True)]
              for side in SIDES}  # fmt: skip
    ratios = [eager / fused for fused, eager in zip(middle["fused"], middle["eager"], strict=True)]
    peaks = {side: peak_of(side, options) for side in SIDES}
    known = {side: round(peak / 1e6) for side, peak in peaks.items() if peak is not None}
    print(
        f"{ratios[0]:.2f} x the steps a second ({ratios[1]:.2f} x by processor seconds); peak "
        f"above the models in MB: {known}"
    )
    settings = ("model", "layers", "batch", "seq_len", "prompt", "freeze", "steps", "threads")
    return {
        "bench": "hf_trainer",
        **{name: getattr(options, name) for name in settings},
        "torch": torch.__version__,
        "cpu": torch.cpu.get_capabilities().get("cpu_name"),
        "seconds_a_step": {side: round(middle[side][0], 3) for side in SIDES},
        "processor_seconds_a_step": {side: round(middle[side][1], 3) for side in SIDES},
        "ratio": round(ratios[0], 3),
        "ratio_of_processor_seconds": round(ratios[1], 3),
        "peak_mb": known,
        "losses": curves,
    }


def main() -> None:
    """Measures and prints; ``--peak`` is what the memory's own process does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=lm_models.SMOLLM2_NAME, help="the teacher")
    parser.add_argument("--data", default=lm_data.WIKITEXT2_NAME)
    parser.add_argument("--layers", type=int, default=4, help="of the student")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--prompt", type=float, default=0.0, help="share of tokens without a label")
    parser.add_argument("--freeze", action="store_true", help="the student's embedding and head")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="append the figures as a JSON line")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_transformers()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.peak is not None:
        setting = Setting(options)
        print(resident_peak(lambda: turn(setting, options.peak)))
        return
    found = measure(options)
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
