"""A study's grid against the same trials in a plain Hugging Face Trainer with a live teacher.

    python bench/study_compare.py --out study.jsonl      # some 10 minutes on 2 cores
    python bench/study_compare.py --workers 1 --threads 1 --labels 600    # where cores are shared

Both sides train the same students from the same weights on the same texts, with the same optimizer,
schedule and number of steps, and evaluate dev and test. The plain side is what one would write
without this package: one trial after another, batches padded as they come, the teacher's forward
pass in every step, losses of torch. Times include everything but downloads: teachers, tokenising,
loading, evaluating. Processor seconds tell more than the clock's where others use the cores too.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
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
    "initialisations": ["pretrained"],
    "methods": ["ft", {"method": "ls", "label_smoothing": 0.1}, "kd", "self_kd"],
    "seeds": [0, 1, 2],
    "lr": {"pretrained": 4e-4},
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


def plain(config: StudyConfig, bf16: bool, folder: Path) -> Scores:
    """The test accuracy of every trial, by Trainer."""
    texts = Texts(folder, train.Runtime(torch.device("cpu"), bf16), False, print)
    scores: Scores = {}
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
    return scores


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


def studied(config_path: Path, folder: Path, workers: int | None, threads: int | None) -> Scores:
    """The test accuracy of every trial, by the study as the command runs it."""
    run_study(config_path, folder, None, workers, threads, False, Console(quiet=True))
    scores = {}
    for line in (folder / EXPORT).read_text().splitlines():
        row = json.loads(line)
        figures = row["result"]["figures"]["test"]
        scores[row["initialisation"], row["arm"], row["seed"]] = figures["accuracy (%)"]
    return scores


class Clock:
    """Seconds by the clock and of processors, its children's included."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), self._used()

    @staticmethod
    def _used() -> float:
        who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, who))

    def read(self) -> tuple[float, float]:
        """Both since the beginning."""
        return time.perf_counter() - self._wall, self._used() - self._processor


def summary(scores: Scores, start: str, arm: str) -> str:
    """Mean and standard deviation over seeds."""
    values = [score for key, score in scores.items() if key[:2] == (start, arm)]
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def main() -> None:
    """Runs all sides and prints what they took."""
    import yaml

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="append the figures as a JSON line")
    parser.add_argument("--labels", type=int, default=1000, help="training texts")
    parser.add_argument("--workers", type=int, help="of the study (one a core)")
    parser.add_argument("--threads", type=int, help="of each process (the study: its own rule)")
    options = parser.parse_args()
    quiet_transformers()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    GRID["tasks"]["sentiment"]["labels"] = options.labels
    config = make_config(GRID)
    texts = Texts(Path(), choose_runtime(config), False, print)
    for trial in trials_of(config):  # downloads are nobody's time
        texts.task(trial)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(GRID))
        sides: dict[str, Callable[[], Scores]] = {
            "study": lambda: studied(path, folder / "study", options.workers, options.threads),
            "Trainer, fp32": lambda: plain(config, False, folder / "fp32"),
        }
        if choose_runtime(config).bf16:
            sides["Trainer, bf16"] = lambda: plain(config, True, folder / "bf16")
        found = {}
        for side, run in sides.items():
            clock = Clock()
            scores = run()
            found[side] = (*clock.read(), scores)
            show(side, found[side], found["study"])
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(json.dumps(as_line(found, options)) + "\n")


Side = tuple[float, float, Scores]


def show(side: str, found: Side, ours: Side) -> None:
    """Prints what a side took, against the study, and its accuracies."""
    wall, processor, scores = found
    print(
        f"{side:<14} {wall:7.1f} s ({wall / ours[0]:5.2f} x)  {processor:7.1f} processor seconds "
        f"({processor / ours[1]:5.2f} x)"
    )
    for start, arm in dict.fromkeys(key[:2] for key in scores):
        print(f"    {start:<12} {arm:<10} {summary(scores, start, arm)}", flush=True)


def as_line(found: dict[str, Side], options: argparse.Namespace) -> dict[str, Any]:
    """The figures, with what they were measured on."""
    return {
        "bench": "study_compare",
        "labels": options.labels,
        "workers": options.workers,
        "threads": options.threads,
        "torch": torch.__version__,
        "cpu": torch.cpu.get_capabilities().get("cpu_name"),
        "seconds": {side: round(wall, 1) for side, (wall, _, _) in found.items()},
        "processor_seconds": {side: round(used, 1) for side, (_, used, _) in found.items()},
        "test": {
            side: {
                f"{start} {arm}": summary(scores, start, arm)
                for start, arm in dict.fromkeys(key[:2] for key in scores)
            }
            for side, (_, _, scores) in found.items()
        },
    }


if __name__ == "__main__":
    main()
