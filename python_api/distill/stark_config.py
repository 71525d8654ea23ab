"""The configuration of a run of sparse teachers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kdkernels.api.distill.config import RunConfig, option_name
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.glue import TASKS as GLUE
from kdkernels.api.distill.swa_config import check_data
from kdkernels.api.distill.topics import SETS
from kdkernels.api.gate_scores import PER

TASKS = ("sentiment", *SETS, *GLUE)
# How a teacher is cut: by StarK's scores, or at random.
ARMS = ("stark", "random")
PLAIN = "kd"
STUDENTS = ("dropped", "pruned")


@dataclass(frozen=True)
class Cut:
    """An arm: students of the dense teacher, or of one that is cut.

    Attributes:
        kind: ``kd``, ``stark`` or ``random``.
        level: Share of heads and neurons that go.
        lam: Share of expressiveness in the scores; None where there are none.
    """

    kind: str
    level: float = 0.0
    lam: float | None = None

    @property
    def name(self) -> str:
        """Its name in files and tables: ``stark-30-lam0.5``."""
        lam = "" if self.lam is None else f"-lam{self.lam:g}"
        return self.kind if self.kind == PLAIN else f"{self.kind}-{100 * self.level:g}{lam}"


@dataclass(frozen=True)
class StarkConfig(RunConfig):
    """Everything that determines a run of ``--method stark``.

    Attributes:
        task: ``sentiment``, a set of topics or a task of GLUE.
        data: The user's own: texts (``sentiment``), or a folder of GLUE's files.
        arms: ``stark``, ``random``, or both, beside plain distillation.
        model: Folder of the pretrained model, the teacher before training; None for the demo's.
        alpha: Weight of the teacher; the labels of training texts have the rest. Texts without
            labels learn from the teacher alone.
        labels: Number of training examples, those that are held out among them; None for all.
        transfer: Number of texts without labels, where there are such; None for all.
        dev: Number of dev examples; None for all.
        test: Number of test examples; None for all.
        teacher_epochs: Epochs of training the teacher; 0 takes the model as it is.
        teacher_lr: Its peak learning rate.
        max_length: Longest input in tokens.
        evaluations: How often dev figures are taken while training.
        levels: Shares of heads and neurons that are cut; plain distillation is level 0.
        lams: Shares of expressiveness in the scores; the first is the run's, others are compared.
        per: ``batch`` or ``example``: what absolute gradients are taken of.
        held_out: Share of the training examples that give the scores and train nothing.
        faithful: The dev examples give the scores and choose the level, as in the released code.
        student_kind: ``dropped``: layers of the teacher; ``pruned``: the teacher cut by
            expressiveness.
        student_layers: Layers of the teacher that make up a student of dropped layers.
        student_level: Share of heads and neurons that are cut of a pruned student.
    """

    objective: ClassVar[str] = "stark"
    option: ClassVar[str] = "--method stark"

    name: str = "stark"
    seeds: tuple[int, ...] = (0, 1, 2)
    temperature: float = 2.0
    alpha: float = 0.5
    epochs: int = 1
    lr: float = 4e-4
    task: str = "sentiment"
    arms: tuple[str, ...] = ARMS
    model: str | None = None
    labels: int | None = None
    transfer: int | None = None
    dev: int | None = None
    test: int | None = None
    teacher_epochs: int = 3
    teacher_lr: float = 1e-4
    max_length: int = 128
    evaluations: int = 2
    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    lams: tuple[float, ...] = (0.5,)
    per: str = "batch"
    held_out: float = 0.2
    faithful: bool = False
    student_kind: str = STUDENTS[0]
    student_layers: tuple[int, ...] = (0, 1)
    student_level: float = 0.7

    @property
    def cuts(self) -> list[Cut]:
        """The arms in order."""
        kinds: list[tuple[str, float | None]] = []
        if "stark" in self.arms:
            kinds += [("stark", lam) for lam in self.lams]
        if "random" in self.arms:
            kinds.append(("random", None))
        levels = [level for level in self.levels if level > 0]
        return [Cut(PLAIN), *(Cut(kind, level, lam) for kind, lam in kinds for level in levels)]

    @classmethod
    def presets(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The demo's sizes, without data of one's own; those of a quick run."""
        sentiment = given.get("task", cls.task) == "sentiment" and given.get("data") is None
        found = dict(DEMO) if sentiment else {"epochs": 3}
        return found | (QUICK if given.get("quick") else {})

    def validate(self) -> None:
        """Raises ``DistillError`` for the first value that breaks its contract."""
        super().validate()
        self._require_at_least(1, "labels", "transfer", "dev", "test", "evaluations")
        self._require_at_least(0, "teacher_epochs")
        self._require_at_least(4, "max_length")
        require(self.task in TASKS, "task", f"be one of {', '.join(TASKS)}", repr(self.task))
        require(0 < self.teacher_lr < 1, "teacher-lr", "lie between 0 and 1", self.teacher_lr)
        require(0 < self.held_out < 1, "held-out", "lie between 0 and 1", self.held_out)
        require(0 <= self.student_level < 1, "student-level", "lie in [0, 1)", self.student_level)
        for key, low, high in (("levels", 0.0, 0.95), ("lams", 0.0, 1.0)):
            values = getattr(self, key)
            for value in values:
                require(low <= value <= high, key, f"lie in [{low:g}, {high:g}]", value)
            require(len(set(values)) == len(values), key, "differ", ",".join(map(str, values)))
        some = any(level > 0 for level in self.levels)
        require(some, "levels", "name at least one above 0", ",".join(map(str, self.levels)))
        require(len(self.lams) > 0, "lams", "name at least one", "none")
        for key, choices in (("per", PER), ("student_kind", STUDENTS)):
            value = getattr(self, key)
            require(
                value in choices, option_name(key), f"be one of {', '.join(choices)}", repr(value)
            )
        named = len(self.student_layers) > 0
        require(named, "student-layers", "name at least one layer", "none")
        for arm in self.arms:
            require(arm in ARMS, "arms", f"name some of {', '.join(ARMS)}", repr(arm))
        require(len(self.arms) > 0, "arms", "name at least one arm", "none")
        require(len(set(self.arms)) == len(self.arms), "arms", "differ", ",".join(self.arms))
        found = self.model is None or Path(self.model).is_dir()
        require(found, "model", "be an existing folder", self.model)
        if self.task != "sts-b" or self.data is not None:
            check_data(self.task, self.data)


# Of the sentiment task: 1,600 labels train and 400 give the scores.
DEMO: dict[str, Any] = {"labels": 2000, "transfer": 4000}
QUICK: dict[str, Any] = {
    "labels": 80,
    "transfer": 64,
    "dev": 50,
    "test": 100,
    "seeds": (0,),
    "epochs": 1,
    "teacher_epochs": 1,
    "levels": (0.3, 0.7),
}
