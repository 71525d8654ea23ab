"""A study's grid against the same trials in a plain Hugging Face Trainer with a live teacher.

    python bench/study_compare.py --out study.jsonl      # some 10 minutes on 2 cores

Both sides train the same students from the same weights on the same texts, with the same optimizer,
schedule and number of steps, and evaluate dev and test. The plain side is what one would write
without this package: one trial after another, batches padded as they come, the teacher's forward
pass in every step, losses of torch. Times include everything but downloads: teachers, tokenising,
loading, evaluating.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from kdkernels.api.distill import train
from kdkernels.api.distill.models import disable_dropout
from kdkernels.api.distill.pipeline import TEACHER_SEED
from kdkernels.api.distill.runner import choose_runtime, quiet_transformers
from kdkernels.api.study.config import SCRATCH, StudyConfig, make_config
from kdkernels.api.study.grid import Trial, trials_of
from kdkernels.api.study.runner import EXPORT, run_study
from kdkernels.api.study.students import drawn_anew
from kdkernels.api.study.train import Trainer as Texts

GRID: dict[str, Any] = {
    "name": "compare",
    "tasks": {"sentiment": {"labels": 1000, "dev": 500, "test": 1000, "max_length": 64}},
    "students": {"minilm-2": {"model": "all-minilm-l6-v2", "layers": [0, 5]}},
    "teachers": {"minilm-6": {"model": "all-minilm-l6-v2", "epochs": 2, "lr": 1e-4}},
    "initialisations": ["pretrained", "scratch"],
    "methods": ["ft", {"method": "ls", "label_smoothing": 0.1}, "kd", "self_kd"],
    "seeds": [0, 1, 2],
    "lr": {"pretrained": 4e-4, "scratch": 5e-4},
    "epochs": 2,
}
Scores = dict[tuple[str, str, int], float]


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenised texts with labels, as Trainer takes them."""

    def __init__(self, ids: Any, labels: Tensor) -> None:
        self._ids, self._labels = ids, labels

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self._ids[row], "labels": int(self._labels[row])}


def loss_of(trial: Trial, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    """The loss in eager PyTorch."""
    parameters = trial.loss.parameters
    if trial.method == "ls":
        return F.cross_entropy(logits, labels, label_smoothing=parameters["label_smoothing"])
    hard = F.cross_entropy(logits, labels)
    if teacher is None:
        return hard
    alpha, t = parameters["alpha"], parameters["temperature"]
    student, target = (logits / t).log_softmax(-1), (teacher / t).log_softmax(-1)
    soft = F.kl_div(student, target, reduction="batchmean", log_target=True)
    return (1 - alpha) * hard + alpha * t * t * soft


def plain(config: StudyConfig, bf16: bool, folder: Path) -> tuple[float, Scores]:
    """Every trial by Trainer; seconds, and the test accuracy of each."""
    texts = Texts(folder, train.Runtime(torch.device("cpu"), bf16), False, print)
    started, scores = time.perf_counter(), {}
    teachers: dict[str, Any] = {}
    for trial in trials_of(config):
        task: Any = texts.task(trial)
        model = task.new_model(trial.seed)
        if trial.initialisation == SCRATCH:
            model = drawn_anew(model, trial.seed)
            model.requires_grad_(True)
            disable_dropout(model)
        teacher = None
        if trial.loss.teacher == "teacher":
            if "whole" not in teachers:
                spec, whole = trial.teacher, texts.task(trial, True)
                assert spec is not None
                settings = (spec.epochs, spec.lr, TEACHER_SEED)
                teachers["whole"] = whole.new_model(TEACHER_SEED)
                fit(task, teachers["whole"], trial.baseline(), None, settings, bf16, folder)
            teacher = teachers["whole"]
        elif trial.loss.teacher == "self":
            teacher = teachers[f"{trial.initialisation} {trial.seed}"]
        settings = (trial.epochs, trial.lr, trial.seed)
        score = fit(task, model, trial, teacher, settings, bf16, folder)
        scores[trial.initialisation, trial.arm, trial.seed] = score
        if trial.method == "ft":
            teachers[f"{trial.initialisation} {trial.seed}"] = model
    return time.perf_counter() - started, scores


def fit(
    task: Any,
    model: Any,
    trial: Trial,
    teacher: Any,
    settings: tuple[int, float, int],
    bf16: bool,
    folder: Path,
) -> float:
    """Trains by Trainer and evaluates dev and test; the test accuracy."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    class Taught(Trainer):
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            logits = outputs.logits.float()
            if return_outputs:  # while evaluating
                return F.cross_entropy(logits, labels), outputs
            with torch.no_grad():
                target = None if teacher is None else teacher(**inputs).logits.float()
            return loss_of(trial, logits, labels, target)

    if teacher is not None:
        teacher.eval()
    epochs, lr, seed = settings
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, learning_rate=lr, seed=seed,
        per_device_train_batch_size=trial.batch_size, weight_decay=train.WEIGHT_DECAY,
        warmup_steps=int(train.WARMUP_FRACTION * epochs * -(-len(task._train.ids) // 32)),
        per_device_eval_batch_size=train.INFERENCE_BATCH, max_grad_norm=train.MAX_GRAD_NORM,
        bf16=bf16, use_cpu=True, save_strategy="no", logging_strategy="no", report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    runs = Taught(
        model=model,
        args=arguments,
        train_dataset=Rows(task._train.ids, task._train.labels),
        data_collator=DataCollatorWithPadding(task.tokenizer),
    )
    runs.train()
    accuracies = []
    for split in ("dev", "test"):
        part = task._eval[split]
        logits = runs.predict(Rows(part.ids, part.labels)).predictions
        accuracies.append(train.accuracy(torch.as_tensor(logits), part.labels))
    return accuracies[1]


def studied(config_path: Path, folder: Path) -> tuple[float, Scores]:
    """Every trial by the study, as the command runs it; seconds, and the test accuracy of each."""
    started = time.perf_counter()
    run_study(config_path, folder, None, None, None, False, Console(quiet=True))
    seconds, scores = time.perf_counter() - started, {}
    for line in (folder / EXPORT).read_text().splitlines():
        row = json.loads(line)
        figures = row["result"]["figures"]["test"]
        scores[row["initialisation"], row["arm"], row["seed"]] = figures["accuracy (%)"]
    return seconds, scores


def summary(scores: Scores, start: str, arm: str) -> str:
    """Mean and standard deviation over seeds."""
    values = [score for key, score in scores.items() if key[:2] == (start, arm)]
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def main() -> None:
    """Runs all sides and prints what they took."""
    import yaml

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="append the figures as a JSON line")
    parser.add_argument("--labels", type=int, help="training texts (1000)")
    options = parser.parse_args()
    quiet_transformers()
    if options.labels is not None:
        GRID["tasks"]["sentiment"]["labels"] = options.labels
    config = make_config(GRID)
    texts = Texts(Path(), choose_runtime(config), False, print)
    for trial in trials_of(config):  # downloads are nobody's time
        texts.task(trial)
    sides: dict[str, tuple[float, Scores]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(GRID))
        sides["Trainer, fp32"] = plain(config, False, folder / "fp32")
        sides["study"] = studied(path, folder / "study")
        if choose_runtime(config).bf16:
            sides["Trainer, bf16"] = plain(config, True, folder / "bf16")
    cells = dict.fromkeys(key[:2] for key in sides["study"][1])
    for side, (seconds, scores) in sides.items():
        ratio = seconds / sides["study"][0]
        print(f"{side:<16} {seconds:7.1f} s  {ratio:5.2f} of the study's time")
        for start, arm in cells:
            print(f"    {start:<12} {arm:<10} {summary(scores, start, arm)}")
    if options.out is not None:
        line = {
            "bench": "study_compare",
            "trials": len(trials_of(config)),
            "torch": torch.__version__,
            "cpu": torch.cpu.get_capabilities().get("cpu_name"),
            "threads": torch.get_num_threads(),
            "seconds": {side: seconds for side, (seconds, _) in sides.items()},
            "test": {
                side: {f"{start} {arm}": summary(scores, start, arm) for start, arm in cells}
                for side, (_, scores) in sides.items()
            },
        }
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
