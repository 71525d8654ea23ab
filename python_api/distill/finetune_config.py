"""The configuration of ``kdkernels finetune``: one arm of a run with weight averaging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kdkernels.api.distill.swa_config import QUICK, TASKS, SwaConfig

# What a task says about itself; how much of its data and of a model a run takes is no part of it.
OF_THE_TASK = frozenset({"max_length"})


@dataclass(frozen=True)
class FinetuneConfig(SwaConfig):
    """Everything that determines a run of ``kdkernels finetune``.

    Attributes:
        model: Folder of the model, of any transformers encoder; None for the demo's.
        student_layers: Layers of it that are fine-tuned; None for all.
        lr: Peak learning rate.
        train_embeddings: Whether the embeddings are trained; frozen otherwise.
    """

    objective: ClassVar[str] = "finetune"
    option: ClassVar[str] = "kdkernels finetune"
    tasks: ClassVar[tuple[str, ...]] = tuple(task for task in TASKS if task != "lm")
    unused: ClassVar[frozenset[str]] = frozenset(
        {
            "temperature",
            "alpha",
            "arms",
            "transfer_epochs",
            "transfer",
            "tokens",
            "eval_tokens",
            "teacher_epochs",
            "teacher_lr",
            "swa_start",
            "swa_every",
            "swa_lr",
            "convention",
        }
    )

    name: str = "finetune"
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: float = 1e-4
    train_embeddings: bool = True
    arms: tuple[str, ...] = ("ft",)

    @classmethod
    def presets(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The longest input of a task; the sizes of a quick run."""
        wanted = OF_THE_TASK | (QUICK.keys() if given.get("quick") else set())
        found = super().presets(given).items()
        return {key: value for key, value in found if key in wanted - cls.unused}
