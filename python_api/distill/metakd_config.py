"""The configuration of a run of Meta-KD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kdkernels.api.distill.config import RunConfig, option_name
from kdkernels.api.distill.errors import require
from kdkernels.api.methods.meta_states import FAITHFUL_TO

TASKS = ("sentiment", "multiemo", "mnli", "amazon")
# own: trained on the one domain; mixed: on all of them; meta: on all of them, as a meta-teacher.
TEACHERS = ("own", "mixed", "meta")
# What a student's loss has other than Meta-KD's own.
LOSSES: dict[str, dict[str, Any]] = {
    "tinybert": {"weighted": False, "gamma2": 0.0},
    "metakd": {},
    "no-weights": {"weighted": False},
    "no-transfer": {"gamma2": 0.0},
    "no-scores": {},
    "no-hidden": {"hidden_weight": 0.0, "embedding_weight": 0.0},
    "no-attention": {"attention_weight": 0.0},
    "code": {"faithful_to": "code"},
}
PLAIN, META = "tinybert", "metakd"
ARMS = tuple(f"{teacher}-{loss}" for teacher in TEACHERS for loss in (PLAIN, META))
ABLATIONS = tuple(f"meta-{loss}" for loss in LOSSES if loss not in (PLAIN, META))
# With a few examples an epoch is a step or two: it is repeated up to so many times.
MOST_REPEATS = 10


def teacher_of(arm: str) -> str:
    """The teacher of an arm."""
    return arm.partition("-")[0]


def loss_of(arm: str) -> str:
    """The loss of an arm."""
    return arm.partition("-")[2]


@dataclass(frozen=True)
class MetaKdConfig(RunConfig):
    """Everything that determines a run of ``--method meta-kd``.

    Attributes:
        task: ``sentiment``, ``multiemo``, ``mnli`` (``data``: the folder of its files) or
            ``amazon`` (likewise); not looked at with a CSV or JSONL file of one's own.
        data: A file of the user's own with a column of domains, or a task's folder.
        domain_column: Name of that column.
        arms: Teacher and loss: some of ``own``, ``mixed``, ``meta`` with one of ``tinybert``,
            ``metakd``; with ``meta`` also the ablations.
        model: Folder of the pretrained model, teacher and student before training; None for the
            demo's.
        student_layers: Layers of the model that make up a student.
        domains: Domains to train students of; none: all.
        leave_out: Domain that no teacher is trained on; students are of it alone.
        labels: Number of training examples of each domain; None for all.
        share: Shares of them that students see; each is an experiment of its own.
        dev: Number of dev examples of each domain; None for all.
        test: Number of test examples of each domain; None for all.
        epochs: Epochs of each of a student's stages.
        teacher_epochs: Epochs of a teacher.
        teacher_lr: Peak learning rate of a teacher.
        max_length: Longest input in tokens.
        stages: 2, or 1: all terms at once.
        gamma1: Weight of the corruption in the meta-teacher.
        gamma2: Weight of the transferable term.
        faithful_to: ``paper``, or ``code``: everything as released.
        teachers: Folder of another run with the same data, whose teachers are taken.
        domain_dropout: Of the meta-teacher's domain classifier.
    """

    objective: ClassVar[str] = "meta-kd"
    option: ClassVar[str] = "--method meta-kd"
    unused: ClassVar[frozenset[str]] = frozenset({"alpha"})

    name: str = "meta-kd"
    seeds: tuple[int, ...] = (0, 1, 2)
    temperature: float = 2.0
    epochs: int = 4
    lr: float = 4e-4
    task: str = "sentiment"
    domain_column: str = "domain"
    arms: tuple[str, ...] = ARMS
    model: str | None = None
    student_layers: tuple[int, ...] = (0, 2, 4)
    domains: tuple[str, ...] = ()
    leave_out: str | None = None
    labels: int | None = None
    share: tuple[float, ...] = (1.0,)
    dev: int | None = None
    test: int | None = None
    teacher_epochs: int = 3
    teacher_lr: float = 1e-4
    max_length: int = 128
    stages: int = 2
    gamma1: float = 0.5
    gamma2: float = 0.5
    faithful_to: str = "paper"
    teachers: str | None = None
    domain_dropout: float = 0.1

    @classmethod
    def presets(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes of a task, without data of one's own; those of a quick run."""
        found: dict[str, Any] = {} if given.get("data") is not None else dict(SIZES)
        if given.get("leave_out") is not None:
            found["arms"] = tuple(arm for arm in ARMS if teacher_of(arm) != "own")
        return found | (QUICK if given.get("quick") else {})

    def validate(self) -> None:
        """Raises ``DistillError`` for the first value that breaks its contract."""
        super().validate()
        self._require_at_least(1, "labels", "dev", "test", "teacher_epochs")
        self._require_at_least(0, "gamma1", "gamma2")
        self._require_at_least(4, "max_length")
        require(self.task in TASKS, "task", f"be one of {', '.join(TASKS)}", repr(self.task))
        require(0 < self.teacher_lr < 1, "teacher-lr", "lie between 0 and 1", self.teacher_lr)
        require(self.stages in (1, 2), "stages", "be 1 or 2", self.stages)
        dropout = self.domain_dropout
        require(0 <= dropout < 1, "domain-dropout", "lie in [0, 1)", dropout)
        known = f"be one of {', '.join(FAITHFUL_TO)}"
        require(self.faithful_to in FAITHFUL_TO, "faithful-to", known, repr(self.faithful_to))
        named = len(self.student_layers) > 0
        require(named, "student-layers", "name at least one layer", "none")
        for share in self.share:
            require(0 < share <= 1, "share", "lie in (0, 1]", share)
        for key in ("share", "arms", "domains"):
            values = getattr(self, key)
            differ = len(set(values)) == len(values)
            require(differ, key, "differ", ",".join(map(str, values)))
        require(len(self.share) > 0, "share", "name at least one share", "none")
        self._check_arms()
        for key in ("model", "data"):
            value = getattr(self, key)
            found = (
                value is None or Path(value).is_dir() or (key == "data" and Path(value).exists())
            )
            kind = "folder" if key == "model" else "file or folder"
            require(found, key, f"be an existing {kind}", value)

    def _check_arms(self) -> None:
        known = (*ARMS, *ABLATIONS)
        for arm in self.arms:
            require(arm in known, "arms", f"name some of {', '.join(known)}", repr(arm))
        require(len(self.arms) > 0, "arms", "name at least one arm", "none")
        if self.leave_out is not None:
            own = [arm for arm in self.arms if teacher_of(arm) == "own"]
            contract = f"have no teacher of {self.leave_out} with leave-out"
            require(not own, "arms", contract, ",".join(own))
            contract = f"be left out with {option_name('leave_out')}"
            require(not self.domains, "domains", contract, ",".join(self.domains))

    def repeats(self, share: float) -> int:
        """How many times as many epochs a student of so few examples trains."""
        return min(MOST_REPEATS, round(1 / share))


# Of each domain; sized for a CPU.
SIZES: dict[str, Any] = {"labels": 600, "dev": 100, "test": 500, "max_length": 48}
QUICK: dict[str, Any] = {
    "labels": 32,
    "dev": 20,
    "test": 40,
    "seeds": (0,),
    "epochs": 1,
    "teacher_epochs": 1,
}
