"""The configuration of a run that distils a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kdkernels.api.distill.config import RunConfig
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.lm_data import WIKITEXT2_NAME
from kdkernels.api.distill.lm_models import SMOLLM2_NAME

ROUTES = ("hidden", "logits")


@dataclass(frozen=True)
class LmConfig(RunConfig):
    """Everything that determines a run of the language-model objective.

    Attributes:
        data: ``wikitext-2`` or a UTF-8 text file; None for ``wikitext-2``.
        batch_size: Blocks of tokens per step.
        alpha: Weight of the distillation loss; that of the next token is ``1 - alpha``.
        model: The teacher: ``smollm2-135m`` or a transformers folder.
        layers: How many of the teacher's first layers make up a student.
        seq_len: Tokens per block.
        tokens: Training tokens, spread over the text; None for all.
        eval_tokens: Test tokens; half as many of the validation text. None for all.
        top_k: Classes per token in the teacher's cache.
        cache: Folder of the teacher's cache; None for one in the run's folder.
        route: ``hidden``: losses from hidden states and heads. ``logits``: from full logits.
        full: Sizes for a GPU and all of the text.
    """

    objective: ClassVar[str] = "lm"
    option: ClassVar[str] = "--objective lm"

    name: str = "lm"
    alpha: float = 0.5
    lr: float = 3e-3
    batch_size: int = 2
    model: str = SMOLLM2_NAME
    layers: int = 4
    seq_len: int = 128
    tokens: int | None = 40960
    eval_tokens: int | None = 8192
    top_k: int = 64
    cache: str | None = None
    route: str = "hidden"
    full: bool = False

    @property
    def text(self) -> str:
        """The data set's name, or the file."""
        return self.data or WIKITEXT2_NAME

    @classmethod
    def presets(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes of a full or a quick run."""
        full, quick = given.get("full"), given.get("quick")
        require(not (full and quick), "full", "be left out with --quick", "both")
        return (FULL if full else {}) | (QUICK if quick else {})

    def validate(self) -> None:
        """Raises ``DistillError`` for the first value that breaks its contract."""
        super().validate()
        self._require_at_least(1, "layers", "tokens", "eval_tokens", "top_k")
        self._require_at_least(2, "seq_len")
        require(self.route in ROUTES, "route", f"be one of {ROUTES}", self.route)
        known = self.text == WIKITEXT2_NAME or Path(self.text).is_file()
        require(known, "data", f"be {WIKITEXT2_NAME} or an existing file", self.data)
        known = self.model == SMOLLM2_NAME or Path(self.model).is_dir()
        require(known, "model", f"be {SMOLLM2_NAME} or an existing folder", self.model)


FULL: dict[str, Any] = {
    "tokens": None,
    "eval_tokens": None,
    "seq_len": 512,
    "batch_size": 16,
    "epochs": 3,
    "lr": 1e-3,
    "train_embeddings": True,
}
QUICK: dict[str, Any] = {"tokens": 1024, "eval_tokens": 512}
