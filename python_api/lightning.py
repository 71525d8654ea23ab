"""For Lightning, which must be installed: ``kdkernels.lightning``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from kdkernels.api.averager import WeightAverager
from kdkernels.api.functional import KDParts, kd_loss

__all__ = ["WeightAveragingCallback", "distill_step"]


class WeightAveragingCallback(pl.Callback):
    """Averages the weights after each optimizer step, validates and tests with the average.

    Lightning's checkpoints hold the model's own weights in ``state_dict`` and the average beside
    them, in the callback's state, so that training resumes with both. Validation before the first
    average is of the model itself. Parameters that require no gradient, such as a teacher's that
    hangs in the module, are not averaged.

    Args:
        kind: ``ema`` or ``swa``.
        **options: of :class:`kdkernels.WeightAverager`: ``decay``, ``start_step``, ``every``,
            ``dtype``, ... Steps are those of the optimizer, from 1 on, however many batches are
            accumulated for one.

    Attributes:
        averager: The average, once training has been set up; None before.

    Raises:
        TypeError, ValueError: as :class:`kdkernels.WeightAverager`, when training is set up.

    Example:
        A trainer that validates the average, and a model that has it after training::

            averaging = kdkernels.lightning.WeightAveragingCallback("ema", decay=0.999)
            trainer = lightning.Trainer(callbacks=[averaging], max_epochs=3)
            trainer.fit(module, train_loader, dev_loader)
            with averaging.averager.swapped():
                module.student.save_pretrained("averaged")
    """

    def __init__(self, kind: str = "ema", **options: Any) -> None:
        self.averager: WeightAverager | None = None
        self._kind, self._options = kind, options
        self._model: nn.Module | None = None
        self._seen = 0
        self._block = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the average, which a checkpoint may replace."""
        if stage == "fit" and self._model is not pl_module:
            self.averager = WeightAverager(pl_module, self._kind, **self._options)
            self._model, self._seen = pl_module, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Steps of an earlier training are not averaged again."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """After a batch that made a step of the optimizer."""
        if trainer.global_step != self._seen and self.averager is not None:
            self._seen = trainer.global_step
            self.averager.update(self._seen)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swaps the average in."""
        self._swap(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swaps the weights back, before any callback saves them."""
        self._block.close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swaps the average in."""
        self._swap(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swaps the weights back."""
        self._block.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Swaps the weights back: the checkpoint of an interrupted training holds them."""
        self._block.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the average."""
        return {} if self.averager is None else self.averager.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the average from a checkpoint."""
        if state_dict and self.averager is not None:
            self.averager.load_state_dict(state_dict)

    def _swap(self, module: pl.LightningModule) -> None:
        if self._model is module and self.averager is not None and self.averager.started:
            self._block.enter_context(self.averager.swapped())


def distill_step(
    module: pl.LightningModule,
    batch: Mapping[str, Tensor],
    student: nn.Module,
    teacher: nn.Module,
    *,
    stage: str = "train",
    **options: Any,
) -> Tensor:
    """One step of distillation from logits, for ``training_step`` and ``validation_step``.

    Both models run on the batch without its ``labels``, the teacher in evaluation mode and without
    a gradient; :func:`kdkernels.kd_loss` of their logits is logged with its parts as
    ``<stage>_loss``, ``<stage>_kd`` and ``<stage>_ce``, and returned.

    Args:
        module: what logs.
        batch: ``input_ids`` and so on ``[batch, ...]`` by name, and ``labels`` if there are any.
        student: called with the batch by name; returns logits ``[..., classes]`` or an output that
            has them as ``logits``, as transformers' models do.
        teacher: the same with the student's classes. Keep it out of the module's submodules (in a
            tuple, say), and checkpoints hold the student alone; it is moved to the module's device
            here.
        stage: what names in the log begin with.
        **options: of :func:`kdkernels.kd_loss`: ``temperature``, ``alpha``, ``shift=1`` for causal
            language models, ...

    Returns:
        The loss, ``[]`` float32, with a gradient for the student.

    Raises:
        ValueError, TypeError: as :func:`kdkernels.kd_loss`.

    Example:
        In a module with a ``student`` and a ``teachers = (teacher,)``::

            def training_step(self, batch, _):
                return kdkernels.lightning.distill_step(
                    self, batch, self.student, self.teachers[0], temperature=2.0, alpha=0.5
                )
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    first = next(teacher.parameters(), None)
    if first is not None and first.device != module.device:
        teacher.to(module.device)
    with torch.no_grad():
        teacher_logits = _logits(teacher.eval()(**inputs))
    student_logits = _logits(student(**inputs))
    parts: KDParts = kd_loss(
        student_logits, teacher_logits, batch.get("labels"), return_parts=True, **options
    )
    values = {"loss": parts.loss.detach(), "kd": parts.kd, "ce": parts.ce}
    module.log_dict(
        {f"{stage}_{name}": value for name, value in values.items()},
        batch_size=len(student_logits),
        prog_bar=True,
    )
    return parts.loss


def _logits(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
