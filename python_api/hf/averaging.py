"""A callback of transformers' Trainer that averages the weights."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from kdkernels.api._averaged import first_process
from kdkernels.api._files import write_file
from kdkernels.api.averager import WeightAverager

__all__ = ["AveragingCallback"]

STATE = "weight_averager.pt"


class AveragingCallback(TrainerCallback):
    """Averages after each optimizer step, evaluates the average, saves and resumes it.

    :meth:`attach` adds it to a trainer. Evaluations before the first average are of the model
    itself. Checkpoints hold the model's own weights, and the average's in ``weight_averager.pt``.

    Args:
        averager: of the trainer's model; its steps are ``global_step``, from 1 on.
        export: folder for the averaged model at the end of training; one that is there is replaced.
        resume_from: checkpoint to take the average from when training resumes; ``None``: the
            ``checkpoint-<step>`` of the output folder.

    Raises:
        FileNotFoundError: when training resumes from a checkpoint without an average.

    Example:
        A trainer that evaluates, saves and at the end exports the average::

            averager = kdkernels.WeightAverager(model, "swa", start_step=500, every=10)
            trainer = transformers.Trainer(model, arguments, ...)
            kdkernels.hf.AveragingCallback(averager, export="averaged").attach(trainer)
            trainer.train()
    """

    def __init__(
        self,
        averager: WeightAverager,
        *,
        export: str | PathLike[str] | None = None,
        resume_from: str | PathLike[str] | None = None,
    ) -> None:
        if not isinstance(averager, WeightAverager):
            kind = type(averager).__name__
            raise TypeError(f"AveragingCallback: averager must be a WeightAverager, got {kind}")
        self._averager, self._export, self._resume_from = averager, export, resume_from
        self._attached = False

    def attach(self, trainer: Trainer) -> None:
        """Adds itself, and from now on evaluates the average and saves it before a checkpoint is
        complete: no event precedes either.
        """
        evaluate, averager, depth = trainer.evaluate, self._averager, 0
        save_model = trainer.save_model

        def of_the_average(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth or not averager.started:
                return evaluate(*args, **kwargs)  # of several datasets it calls itself
            depth += 1
            try:
                with averager.swapped():
                    return evaluate(*args, **kwargs)
            finally:
                depth -= 1

        def with_the_average(output_dir: Any = None, _internal_call: bool = False) -> None:
            save_model(output_dir, _internal_call)
            if _internal_call:
                self._save(Path(output_dir))

        replaced: Any = trainer  # where transformers is installed its type forbids this
        replaced.evaluate, replaced.save_model = of_the_average, with_the_average
        self._attached = True
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the average from the checkpoint that training resumes from."""
        if state.global_step == 0:
            return
        folder = self._resume_from or _checkpoint(args, state)
        file = Path(folder) / STATE
        if not file.exists():
            raise FileNotFoundError(
                f"AveragingCallback: resume_from must be a checkpoint with {STATE}, got {folder}"
            )
        self._averager.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        self._averager.update(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Beside the checkpoint's files; whole or not at all."""
        if not self._attached:
            self._save(_checkpoint(args, state))

    def _save(self, folder: Path) -> None:
        values = self._averager.state_dict()
        if first_process() and folder.is_dir():
            write_file(folder / STATE, lambda file: torch.save(values, file))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Exports, if asked to."""
        if self._export is not None and self._averager.started:
            self._averager.export(self._export, overwrite=True)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
