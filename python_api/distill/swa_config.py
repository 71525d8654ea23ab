"""The configuration of a run that fine-tunes with stochastic weight averaging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kdkernels.api.distill.config import RunConfig, option_name
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.glue import TASKS as GLUE
from kdkernels.api.distill.topics import SETS

CLASSIFICATION = ("sentiment", *SETS)
TASKS = (*CLASSIFICATION, "ner", "qa", "lm", *GLUE)
ARMS = ("ft", "swa", "kd", "kd-swa")
# From labels alone.
LABEL_ARMS = ARMS[:2]
CONVENTIONS = ("paper", "torch")
# Options of language models, and of the others.
LM_ONLY = ("tokens", "eval_tokens")
NOT_LM = ("labels", "transfer", "dev", "test")


def check_data(task: str, data: str | None) -> None:
    """Raises ``DistillError`` unless this names data of one's own that the task takes, or none."""
    if task in GLUE:
        contract = f"name the folder of GLUE's files for --task {task}"
        fetched = data is None and task == "sts-b"
        require(
            fetched or (data is not None and Path(data).is_dir()), "data", contract, data or "none"
        )
        return
    require(data is None or Path(data).is_file(), "data", "exist", data)
    require(data is None or task not in SETS, "data", f"be left out with --task {task}", data)


@dataclass(frozen=True)
class SwaConfig(RunConfig):
    """Everything that determines a run of ``--method swa``.

    Attributes:
        task: ``sentiment``, ``r8``, ``r52``, ``20news``, ``ner``, ``qa``, ``lm``, or one of GLUE's.
        data: The user's own: texts (``sentiment``), CoNLL columns (``ner``), SQuAD's JSON (``qa``),
            plain text (``lm``); the folder of GLUE's files for its tasks.
        arms: Some of ``ft``, ``swa``, ``kd``, ``kd-swa``; none: all that the task has.
        epochs: Epochs over the labelled data.
        transfer_epochs: Epochs over the transfer texts, of the arms with a teacher.
        model: Folder of the pretrained model; None for the demo's, of ``lm`` SmolLM2-135M.
        student_layers: Layers of it that are fine-tuned; None for all.
        labels: Number of training examples; None for all.
        transfer: Number of unlabelled texts for the teacher; None for all.
        dev: Number of dev examples; None for all.
        test: Number of test examples; None for all.
        tokens: Training tokens of ``lm``; None for all.
        eval_tokens: Test tokens of ``lm``, half as many dev tokens; None for all.
        teacher_epochs: Epochs of fine-tuning the teacher, the whole model.
        teacher_lr: Its peak learning rate.
        max_length: Longest input in tokens; of ``lm`` the length of a block.
        evaluations: How often dev figures are taken while training.
        swa_start: Where averaging starts, as shares of the training. Several are compared.
        swa_every: Steps between averaged models (K). Several are compared.
        swa_lr: Constant learning rate of the averaging phase; None for ``lr``.
        convention: ``paper``: the weights at the start are one model; ``torch``: they are not.
        patience: Evaluations without a better dev figure before training stops; the weights with
            the best one are kept. None: to the end.
    """

    objective: ClassVar[str] = "swa"
    option: ClassVar[str] = "--method swa"
    tasks: ClassVar[tuple[str, ...]] = TASKS

    name: str = "swa"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    temperature: float = 2.0
    epochs: int = 3
    lr: float = 4e-4
    task: str = "sentiment"
    arms: tuple[str, ...] = ()
    transfer_epochs: int = 1
    model: str | None = None
    student_layers: tuple[int, ...] | None = None
    labels: int | None = None
    transfer: int | None = None
    dev: int | None = None
    test: int | None = None
    tokens: int | None = None
    eval_tokens: int | None = None
    teacher_epochs: int = 3
    teacher_lr: float = 1e-4
    max_length: int = 128
    evaluations: int = 6
    swa_start: tuple[float, ...] = (0.5,)
    swa_every: tuple[int, ...] = (1,)
    swa_lr: float | None = None
    convention: str = "paper"
    patience: int | None = None

    @classmethod
    def presets(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes of a task, without data of one's own; those of a quick run."""
        task = given.get("task", cls.task)
        require(task in cls.tasks, "task", f"be one of {', '.join(cls.tasks)}", repr(task))
        found = dict(TASK_DEFAULTS.get(task, {}))
        if given.get("data") is not None:
            found = {key: value for key, value in found.items() if key not in NUMBERS}
        if given.get("quick"):
            found |= QUICK_LM if task == "lm" else QUICK_GLUE if task in GLUE else QUICK
            if "transfer" in found:
                found["transfer"] = QUICK_TRANSFER
        return found

    def validate(self) -> None:
        """Raises ``DistillError`` for the first value that breaks its contract."""
        super().validate()
        self._require_at_least(1, "labels", "transfer", "dev", "test", "tokens", "eval_tokens")
        self._require_at_least(1, "teacher_epochs", "transfer_epochs", "evaluations", "patience")
        self._require_at_least(4, "max_length")
        known = f"be one of {', '.join(self.tasks)}"
        require(self.task in self.tasks, "task", known, repr(self.task))
        require(0 < self.teacher_lr < 1, "teacher-lr", "lie between 0 and 1", self.teacher_lr)
        for key in NOT_LM if self.task == "lm" else LM_ONLY:
            value = getattr(self, key)
            require(value is None, option_name(key), f"be left out with --task {self.task}", value)
        require(self.model is None or Path(self.model).is_dir(), "model", "exist", self.model)
        check_data(self.task, self.data)
        self._check_arms()
        self._check_averaging()

    def _check_arms(self) -> None:
        for arm in self.arms:
            require(arm in ARMS, "arms", f"name some of {', '.join(ARMS)}", repr(arm))
        require(len(set(self.arms)) == len(self.arms), "arms", "differ", ",".join(self.arms))
        taught = [arm for arm in self.arms if arm not in LABEL_ARMS]
        contract = "need no teacher where there are no texts to transfer on (--task sentiment has)"
        require(self.task == "sentiment" or not taught, "arms", contract, ",".join(taught))

    def _check_averaging(self) -> None:
        for key, values in (("swa_start", self.swa_start), ("swa_every", self.swa_every)):
            require(len(values) > 0, option_name(key), "name at least one value", "none")
            require(len(set(values)) == len(values), option_name(key), "differ", list(values))
        good = all(0 <= start < 1 for start in self.swa_start)
        require(good, "swa-start", "lie in [0, 1)", list(self.swa_start))
        require(min(self.swa_every) >= 1, "swa-every", "be at least 1", list(self.swa_every))
        rate = self.swa_lr
        require(rate is None or 0 < rate < 1, "swa-lr", "lie between 0 and 1", rate)
        contract = "be the same as lr where several starts are compared: they share a training"
        require(rate in (None, self.lr) or len(self.swa_start) == 1, "swa-lr", contract, rate)
        contract = f"be one of {', '.join(CONVENTIONS)}"
        require(self.convention in CONVENTIONS, "convention", contract, repr(self.convention))
        pairs = len(self.swa_start) * len(self.swa_every)
        contract = "be left out where several averages are compared"
        require(self.patience is None or pairs == 1, "patience", contract, self.patience)


TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "sentiment": {"student_layers": (0, 5), "labels": 2000, "transfer": 10000},
    "r8": {"student_layers": (0, 5), "max_length": 96},
    "r52": {"student_layers": (0, 5), "max_length": 96},
    "20news": {"student_layers": (0, 5), "labels": 6000, "test": 2500},
    "ner": {"labels": 5000, "lr": 2e-4},
    # Two layers of the model learn next to nothing of this.
    "qa": {"labels": 2000, "dev": 300, "test": 1000, "lr": 2e-4, "epochs": 2, "max_length": 192},
    "lm": {
        "student_layers": (0, 1, 2, 3),
        "lr": 3e-3,
        "batch_size": 2,
        "epochs": 1,
        "tokens": 40960,
        "eval_tokens": 8192,
    },
}
# How much of the data: all of one's own.
NUMBERS = ("labels", "transfer", "dev", "test", "tokens", "eval_tokens")
QUICK: dict[str, Any] = {
    "labels": 64,
    "test": 200,
    "seeds": (0,),
    "epochs": 1,
    "teacher_epochs": 1,
    "evaluations": 2,
}
QUICK_TRANSFER = 128
# WNLI has 71 test pairs.
QUICK_GLUE: dict[str, Any] = QUICK | {"test": 64}
QUICK_LM: dict[str, Any] = {"tokens": 1024, "eval_tokens": 512, "seeds": (0,), "evaluations": 2}
