"""Fine-tuning with stochastic weight averaging."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from kdkernels.api._spec import integer, number
from kdkernels.api.averager import WeightAverager

__all__ = ["SWA"]


class SWA:
    r"""Stochastic weight averaging for fine-tuning: a constant learning rate, and the average.

    In place of a schedule that decays to zero: warm-up, then the optimizer's own learning rate,
    from the start of averaging on times ``lr_factor``, and constant. The weights at the start and
    those after every ``every``-th step from it are averaged with equal weights::

        W_swa = (W_start + sum of W_k) / (n + 1)

    The optimizer trains the model's weights throughout; evaluate, choose and keep the average
    (:meth:`swapped`, :meth:`export`). A pass that renews statistics is needed with batch norm only,
    which language models do not have.

    Args:
        model: as for :class:`~kdkernels.WeightAverager`.
        optimizer: of its weights; its learning rates are taken as the peaks.
        total_steps: optimizer steps of the whole training.
        start: where averaging begins, as a share of ``total_steps``, in [0, 1).
        every: steps from one averaged model to the next (K of the paper).
        lr_factor: learning rate of the averaging phase, in peaks. Other than 1 it is reached in a
            line from the end of the warm-up to the start.
        warmup: share of ``total_steps`` over which the learning rate rises from zero.
        count_start: whether the weights at the start count as one model: the paper's convention.
            torch's ``AveragedModel`` leaves them out.
        **averager: further arguments of :class:`~kdkernels.WeightAverager`.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: values out of their ranges; a training too short for one averaged model.

    References:
        Lu et al., Improving Generalization of Pre-trained Language Models via Stochastic Weight
        Averaging, Findings of EMNLP 2022, arXiv 2212.05956; Izmailov et al., arXiv 1803.05407.

    Example:
        >>> import kdkernels, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> swa = kdkernels.SWA(model, optimizer, total_steps=20, start=0.5, every=2)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(3, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     averaged = swa.step()
        >>> int(swa.averager.n_averaged)  # the start, and steps 12, 14, 16, 18, 20
        6
        >>> with swa.swapped():
        ...     loss = model(torch.randn(3, 4)).square().mean()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        start: float = 0.5,
        every: int = 1,
        lr_factor: float = 1.0,
        warmup: float = 0.06,
        count_start: bool = True,
        **averager: Any,
    ) -> None:
        number("SWA", "lr_factor", lr_factor, 0.0, math.inf)
        number("SWA", "warmup", warmup, 0.0, 1.0)
        integer("SWA", "total_steps", total_steps, 1)
        self._start = start_step(total_steps, start)
        self._warmup, self._factor = int(warmup * total_steps), lr_factor
        self.averager = make_averager(
            model, total_steps, start=start, every=every, count_start=count_start, **averager
        )
        self._scheduler = LambdaLR(optimizer, self._share)
        self._step = 0

    def step(self) -> bool:
        """Once after every step of the optimizer; returns whether the weights were averaged."""
        self._step += 1
        self._scheduler.step()
        return self.averager.update(self._step)

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """The model has the averaged weights in the block; see ``WeightAverager.swapped``."""
        with self.averager.swapped() as model:
            yield model

    @property
    def started(self) -> bool:
        """Whether there is an average yet."""
        return self.averager.started

    def export(self, directory: Any, *, overwrite: bool = False) -> None:
        """Writes the averaged model; see ``WeightAverager.export``."""
        self.averager.export(directory, overwrite=overwrite)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs beside those of the model and the optimizer."""
        return {
            "step": self._step,
            "averager": self.averager.state_dict(),
            # The function is this object's own.
            "scheduler": {
                key: value
                for key, value in self._scheduler.state_dict().items()
                if key != "lr_lambdas"
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a :meth:`state_dict`; load the optimizer's own as well."""
        for key in ("step", "averager", "scheduler"):
            if key not in state:
                raise ValueError(f"SWA: state must have {key!r}, got none")
        self.averager.load_state_dict(state["averager"])
        lambdas = self._scheduler.state_dict()["lr_lambdas"]
        self._scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": lambdas})
        self._step = state["step"]

    def _share(self, step: int) -> float:
        """The learning rate of the step after so many, in peaks."""
        if step < self._warmup:
            return (step + 1) / self._warmup
        if step >= self._start:
            return self._factor
        passed = (step - self._warmup) / (self._start - self._warmup)
        return 1.0 + (self._factor - 1.0) * passed


def start_step(total_steps: int, start: float) -> int:
    """The step after which the weights are the first that are averaged."""
    number("SWA", "start", start, 0.0, 1.0)
    if start == 1.0:
        raise ValueError("SWA: start must lie in [0, 1), got 1.0")
    return int(start * total_steps)


def make_averager(
    model: nn.Module,
    total_steps: int,
    *,
    start: float,
    every: int,
    count_start: bool = True,
    **averager: Any,
) -> WeightAverager:
    """An averager that averages as :class:`SWA` does, to be told the steps from 1 on.

    With a constant learning rate the trained weights do not depend on ``start`` and ``every``: one
    training serves as many averagers as there are pairs to compare.
    """
    integer("SWA", "every", every, 1)
    first = start_step(total_steps, start)
    if first + every > total_steps:
        raise ValueError(
            f"SWA: every must be at most the {total_steps - first} steps from the start on, got "
            f"{every}"
        )
    if not count_start:
        first += every
    # With start_step the first update is the start; there is none after step 0.
    return WeightAverager(
        model, "swa", start_step=first, every=every, count_start=first == 0, **averager
    )
