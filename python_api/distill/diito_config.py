"""The configuration of a run of causal distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kdkernels.api.distill.config import RunConfig, option_name
from kdkernels.api.distill.errors import DistillError, require
from kdkernels.api.distill.glue import TASKS as GLUE
from kdkernels.api.distill.swa_config import check_data
from kdkernels.api.distill.topics import SETS
from kdkernels.api.methods.alignment import NAMES, Alignment
from kdkernels.api.methods.diito import INDEX_MODES, POSITIONS

MASKED_LM = "mlm"
TASKS = ("sentiment", *SETS, *(name for name, task in GLUE.items() if task.classes), MASKED_LM)
# kd: without interchanges; kd-time: the same for as long as diito trains.
ARMS = ("kd", "diito", "kd-time")
WEIGHTS = ("kd_weight", "ce_weight", "cosine_weight", "cf_weight", "cf_cosine_weight")


@dataclass(frozen=True)
class DiitoConfig(RunConfig):
    """Everything that determines a run of ``--method diito``.

    Attributes:
        task: ``sentiment``, a set of topics, a GLUE task with classes, or ``mlm``.
        data: The user's own: texts (``sentiment``), a folder of GLUE's files, a text file or a
            folder of three (``mlm``).
        arms: Some of ``kd``, ``diito``, ``kd-time``.
        model: Folder of the pretrained model, teacher and student before training; None for the
            demo's.
        student_layers: Layers of the teacher that make up the student.
        labels: Number of training examples of the student; None for all.
        teacher_labels: Number of training examples of the teacher; None for all.
        dev: Number of dev examples; None for all.
        test: Number of test examples; None for all.
        teacher_epochs: Epochs of training the teacher; 0 takes the model as it is.
        teacher_lr: Its peak learning rate.
        max_length: Longest input in tokens.
        evaluations: How often dev figures are taken while training.
        alignment: ``single_middle``, ``middle_late``, ``multilayer``, or a file of one.
        index_mode: ``aligned``, or ``release``: as the released code.
        positions: ``consecutive``, ``random`` or ``masked``.
        share: Share of the shorter text that is exchanged.
        max_span: No text exchanges more positions.
        kd_weight: Weight of the divergence; these five None for the published ones.
        ce_weight: Weight of the labels' cross-entropy.
        cosine_weight: Weight of the last hidden states' cosine.
        cf_weight: Weight of the counterfactual divergence.
        cf_cosine_weight: Weight of the counterfactual hidden states' cosine.
        accumulate: Batches that make one step of the optimizer.
        weight_decay: Of AdamW.
        beta2: Of AdamW.
        eps: Of AdamW.
        warmup: Share of the training over which the learning rate rises.
        max_grad_norm: Gradients are clipped to it.
    """

    objective: ClassVar[str] = "diito"
    option: ClassVar[str] = "--method diito"
    unused: ClassVar[frozenset[str]] = frozenset({"alpha"})

    name: str = "diito"
    seeds: tuple[int, ...] = (0, 1, 2)
    temperature: float = 2.0
    epochs: int = 10
    lr: float = 2e-4
    task: str = "sentiment"
    arms: tuple[str, ...] = ARMS[:2]
    model: str | None = None
    student_layers: tuple[int, ...] = (0, 2, 4)
    labels: int | None = None
    teacher_labels: int | None = None
    dev: int | None = None
    test: int | None = None
    teacher_epochs: int = 3
    teacher_lr: float = 1e-4
    max_length: int = 128
    evaluations: int = 4
    alignment: str = "multilayer"
    index_mode: str = "aligned"
    positions: str = "consecutive"
    share: float = 0.3
    max_span: int | None = None
    kd_weight: float | None = None
    ce_weight: float | None = None
    cosine_weight: float | None = None
    cf_weight: float | None = None
    cf_cosine_weight: float | None = None
    accumulate: int = 1
    weight_decay: float = 0.01
    beta2: float = 0.999
    eps: float = 1e-8
    warmup: float = 0.06
    max_grad_norm: float = 1.0

    @property
    def masked_lm(self) -> bool:
        """Whether a masked language model is distilled, not a task's classifier."""
        return self.task == MASKED_LM

    @classmethod
    def presets(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes of a task, without data of one's own; those of a quick run."""
        task = given.get("task", cls.task)
        require(task in TASKS, "task", f"be one of {', '.join(TASKS)}", repr(task))
        found = dict(TASK_DEFAULTS.get(task, {}))
        if given.get("data") is not None:
            found = {key: value for key, value in found.items() if key not in NUMBERS}
        return found | (QUICK if given.get("quick") else {})

    def validate(self) -> None:
        """Raises ``DistillError`` for the first value that breaks its contract."""
        super().validate()
        self._require_at_least(1, "labels", "teacher_labels", "dev", "test", "evaluations")
        self._require_at_least(1, "max_span", "accumulate")
        self._require_at_least(0, "teacher_epochs", *WEIGHTS)
        self._require_at_least(4, "max_length")
        require(self.task in TASKS, "task", f"be one of {', '.join(TASKS)}", repr(self.task))
        require(0 < self.teacher_lr < 1, "teacher-lr", "lie between 0 and 1", self.teacher_lr)
        for key in ("share", "warmup"):
            value = getattr(self, key)
            require(0 <= value <= 1, key, "lie in [0, 1]", value)
        for key in ("beta2", "eps"):
            require(0 < getattr(self, key) < 1, key, "lie between 0 and 1", getattr(self, key))
        require(self.weight_decay >= 0, "weight-decay", "be at least 0", self.weight_decay)
        require(self.max_grad_norm > 0, "max-grad-norm", "be positive", self.max_grad_norm)
        for key, choices in (("index_mode", tuple(INDEX_MODES)), ("positions", POSITIONS)):
            value = getattr(self, key)
            contract = f"be one of {', '.join(choices)}"
            require(value in choices, option_name(key), contract, repr(value))
        contract = "be consecutive or random: only --task mlm has masked tokens"
        fits = self.masked_lm or self.positions != "masked"
        require(fits, "positions", contract, self.positions)
        named = len(self.student_layers) > 0
        require(named, "student-layers", "name at least one layer", "none")
        for arm in self.arms:
            require(arm in ARMS, "arms", f"name some of {', '.join(ARMS)}", repr(arm))
        require(len(self.arms) > 0, "arms", "name at least one arm", "none")
        require(len(set(self.arms)) == len(self.arms), "arms", "differ", ",".join(self.arms))
        both = "kd-time" not in self.arms or "diito" in self.arms
        require(both, "arms", "have diito beside kd-time", ",".join(self.arms))
        for key in ("model", "alignment"):
            self._check_path(key)
        if self.masked_lm:
            own = self.data is None or Path(self.data).exists()
            require(own, "data", "be an existing file or folder", self.data)
        else:
            check_data(self.task, self.data)

    def _check_path(self, key: str) -> None:
        value = getattr(self, key)
        if key == "model":
            found = value is None or Path(value).is_dir()
            require(found, key, "be an existing folder", value)
        elif value not in NAMES:
            contract = f"be one of {', '.join(NAMES)}, or an existing file"
            require(Path(value).is_file(), key, contract, repr(value))

    def aligned(self, teacher_layers: int) -> Alignment:
        """The alignment for a teacher of so many layers."""
        try:
            if self.alignment in NAMES:
                return Alignment.named(self.alignment, teacher_layers, len(self.student_layers))
            return Alignment.load(self.alignment)
        except ValueError as error:
            raise DistillError(str(error)) from error


TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "sentiment": {"labels": 500, "teacher_labels": 2000},
    "r8": {"max_length": 96},
    "r52": {"max_length": 96},
    MASKED_LM: {
        "labels": 3000,
        "teacher_labels": 12000,
        "dev": 500,
        "test": 1000,
        "epochs": 1,
        "lr": 5e-4,
        "teacher_epochs": 1,
        "teacher_lr": 3e-4,
        "max_length": 64,
        "alignment": "single_middle",
        "arms": ARMS,
    },
}
# How much of the data: all of one's own.
NUMBERS = ("labels", "teacher_labels", "dev", "test")
QUICK: dict[str, Any] = {
    "labels": 64,
    "teacher_labels": 64,
    "dev": 50,
    "test": 100,
    "seeds": (0,),
    "epochs": 1,
    "teacher_epochs": 1,
    "evaluations": 2,
}
