"""The term on hidden states: which layers, through which projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.api import _sites
from kdkernels.api._files import write_file
from kdkernels.api.hf import head as heads
from kdkernels.api.hf.options import DistillOptions
from kdkernels.api.hidden import hidden_match_many
from kdkernels.api.layers import Projections

NAME = "DistillMixin"
# Beside the student's weights in a checkpoint.
FILE = "distill_projections.pt"


class HiddenTerm:
    """The distance of the outputs of student layers to those of teacher layers.

    Args:
        student: a model of transformers, wrapped or not.
        teacher: another one.
        options: kind, layers and weight.
        seed: of the projections' first values, which are those of every process.

    Attributes:
        student_paths: Modules to capture of the student, one a pair.
        teacher_paths: Likewise of the teacher.
        projections: Learned maps between the widths; None where none is needed.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, options: DistillOptions, seed: int
    ) -> None:
        models = {"student": student, "teacher": teacher}
        paths = {who: _sites.layers_of(NAME, who, model) for who, model in models.items()}
        pairs = options.layer_map().pairs(len(paths["student"]), len(paths["teacher"]))
        # A layer of one may belong to several of the other, and a path is captured once.
        self._student = [paths["student"][s - 1] for s, _ in pairs]
        self._teacher = [paths["teacher"][t - 1] for _, t in pairs]
        self.student_paths = list(dict.fromkeys(self._student))
        self.teacher_paths = list(dict.fromkeys(self._teacher))
        self._kind, self._weight = options.hidden_kind, options.hidden_weight
        widths = [_width(model) for model in models.values()]
        self.projections: Projections | None = None
        if options.hidden_projection or widths[0] != widths[1]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.projections = Projections(*([width] * len(pairs) for width in widths))

    def __call__(
        self,
        student: Mapping[str, Tensor],
        teacher: Sequence[Tensor],
        mask: Tensor | None,
        count: Tensor | None,
    ) -> Tensor:
        """The weighted distance, the mean over the tokens that count.

        Args:
            student: outputs by path.
            teacher: outputs in the order of ``teacher_paths``.
            mask: ``[batch, tokens]``, tokens that are no padding; None for all.
            count: divides the sum instead: tokens of all micro-batches of a step.
        """
        said = dict(zip(self.teacher_paths, teacher, strict=True))
        pairs = []
        for path, of_teacher in zip(self._student, self._teacher, strict=True):
            x = student[path]
            pairs.append((x, said[of_teacher].to(x.device, non_blocking=True)))
        options: dict[str, Any] = {"kind": self._kind, "projections": self.projections}
        total: Tensor = hidden_match_many(pairs, mask=mask, num_items_in_batch=count, **options)
        return self._weight * total

    def average_gradients(self) -> None:
        """Over processes: DistributedDataParallel does not know the projections."""
        distributed = torch.distributed
        if self.projections is None or not distributed.is_initialized():
            return
        for p in self.projections.parameters():
            if p.grad is not None:
                distributed.all_reduce(p.grad)
                p.grad /= distributed.get_world_size()

    def save(self, folder: str | PathLike[str]) -> None:
        """Writes the projections into a checkpoint; whole or not at all."""
        if self.projections is not None:
            values = self.projections.state_dict()
            write_file(Path(folder) / FILE, lambda file: torch.save(values, file))

    def load(self, folder: str | PathLike[str]) -> None:
        """Reads them again.

        Raises:
            FileNotFoundError: the checkpoint has none.
        """
        if self.projections is None:
            return
        file = Path(folder) / FILE
        if not file.exists():
            raise FileNotFoundError(
                f"{NAME}: resume_from_checkpoint must be a checkpoint with {FILE}, got {folder}"
            )
        self.projections.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


def token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """``[batch, tokens]``, 1 where there is no padding; None where there is none at all."""
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def token_count(inputs: Mapping[str, Any]) -> Tensor:
    """How many tokens of a batch are no padding."""
    mask = token_mask(inputs)
    if mask is not None:
        return (mask != 0).sum()
    return torch.tensor(inputs["input_ids"].numel())


def _width(model: nn.Module) -> int:
    config: Any = heads.core(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(config.hidden_size)
