"""The average of a model's weights, kept beside it while it trains."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.api import _averaged
from kdkernels.api._averaged import local
from kdkernels.api._files import write_folder
from kdkernels.api._spec import choice, integer, number
from kdkernels.ops.weight_average import Plan, weight_average_, weight_average_swap_

__all__ = ["WeightAverager"]

KINDS = ("swa", "ema")
BUFFERS = ("copy", "average", "skip")
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)
# Of state_dict(); it changes with what is in it.
FORMAT = 1


class _Part(NamedTuple):
    """What one call of the op averages: parameters or buffers of one device."""

    plan: Plan
    buffers: bool
    places: list[int]  # of the entries
    moves: list[tuple[Tensor, Tensor]]  # (staging, source) where the average is on another device


class WeightAverager:
    r"""Keeps an average of a model's weights beside it.

    ``swa``: the mean of the models seen by the updates. ``ema``: ``decay * average + (1 - decay) *
    weights``; the first update copies in either kind. ``count_start=True`` starts from the weights
    at construction instead, which then count as one model: the convention of the paper,
    ``W_swa = (W_start + sum of the models) / (n + 1)``, where torch's is ``sum of the models / n``.
    With ``start_step`` the update at that step is the start, and both are the same.

    Args:
        model: any module, also wrapped by DistributedDataParallel or ``torch.compile``, or sharded
            by ``fully_shard`` (FSDP2; each process averages its part).
        kind: ``swa`` or ``ema``.
        decay: of ``ema``, in [0, 1].
        warmup: ``ema`` with ``decay_t = min(decay, (1 + n) / (10 + n))`` after ``n`` updates.
        start_step: updates before it do nothing.
        every: from then on each ``every``-th step is averaged (K of the paper).
        dtype: of the average. float32; bfloat16 and float16 are kept as a pair of tensors, the
            second what the first lacks: the memory of float32, 16 or 21 bits of fraction. Updates
            below their last digit are lost: at decay 0.99 a bfloat16 pair follows a change of the
            weights by 10% to 0.05% of it, at 0.999 to 4%, at 0.9999 by less than half; a float16
            pair to 0.7% at 0.9999. float64 for models that hold such weights.
        buffers: ``copy``: those of the model at the last update (integers, statistics of batch
            norm); ``average``: floating ones averaged, others copied; ``skip``: the averaged model
            has those that the model has at the time.
        device: where to keep the average, e.g. ``"cpu"`` for a GPU's model, with one copy of the
            parameters on the way there; ``None``: with the model, also when it moves.
        count_start: see above.
        trainable_only: leave out parameters that require no grad: they equal their average. So a
            PEFT model's average is as small as its adapters. Thawing one later is an error.

    Raises:
        TypeError: arguments of a wrong type; a model sharded by FullyShardedDataParallel.
        ValueError: values that do not fit; nothing to average.
        RuntimeError: from methods that must not be called inside of :meth:`swapped`, or a model
            whose parameters changed their dtype or shape.

    Note:
        Tied weights are averaged once, under the name that ``model.named_parameters()`` of the
        model without wrappers gives. The step counter is a tensor on the device: an update does not
        synchronise (with ``device=`` elsewhere it must wait for the copy). Make the averager after
        ``fully_shard``.

    References:
        Izmailov et al., arXiv 1803.05407; Lu et al., arXiv 2212.05956 (every K steps, from early
        on, the start counted); for the float32 average of bfloat16 weights see
        ``kdkernels/ops/weight_average/README.md``.

    Example:
        >>> import kdkernels, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> averager = kdkernels.WeightAverager(model, "swa", start_step=2, every=2)
        >>> done = []
        >>> for step in range(1, 7):
        ...     model(torch.randn(3, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     done.append(averager.update(step))
        >>> done
        [False, True, False, True, False, True]
        >>> with averager.swapped():  # evaluates the mean of three models
        ...     loss = model(torch.randn(3, 4)).square().mean()

        In a framework with hooks, such as Lightning, ``update`` goes where a batch has ended, and
        ``swapped`` around the validation::

            class Averaging(lightning.Callback):
                def setup(self, trainer, module, stage):
                    self.averager = kdkernels.WeightAverager(module, "ema")
                def on_train_batch_end(self, trainer, module, *_):
                    self.averager.update(trainer.global_step)
                def on_validation_start(self, trainer, module):
                    self.block = contextlib.ExitStack()
                    if self.averager.started:
                        self.block.enter_context(self.averager.swapped())
                def on_validation_end(self, trainer, module):
                    self.block.close()
                def state_dict(self):
                    return self.averager.state_dict()
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "swa",
        *,
        decay: float = 0.999,
        warmup: bool = False,
        start_step: int = 0,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
        buffers: str = "copy",
        device: torch.device | str | None = None,
        count_start: bool = False,
        trainable_only: bool = True,
    ) -> None:
        name = "WeightAverager"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
        choice(name, "kind", kind, KINDS)
        choice(name, "buffers", buffers, BUFFERS)
        number(name, "decay", decay, 0.0, 1.0)
        integer(name, "start_step", start_step, 0)
        integer(name, "every", every, 1)
        if dtype not in DTYPES:
            raise ValueError(
                f"{name}: dtype must be float32, bfloat16, float16 or float64, got {dtype}"
            )
        if warmup and kind != "ema":
            raise ValueError(f"{name}: warmup must be False for kind='swa', got True")
        self._model, self._kind, self._decay, self._warmup = model, kind, decay, warmup
        self._start_step, self._every, self._dtype = start_step, every, dtype
        self._buffers, self._trainable_only = buffers, trainable_only
        # With its index, as tensors have it.
        self._device = None if device is None else torch.empty(0, device=device).device
        self._inside = self._started = False
        self._find()
        self._bind()
        if count_start and start_step == 0:
            self._average()

    def update(self, step: int) -> bool:
        """Averages the weights as they are; returns whether this is a step that does.

        Args:
            step: of training, whether counted from 0 or 1; steps before ``start_step`` and those
                that are no multiple of ``every`` from it do nothing.
        """
        self._check_outside("update")
        integer("WeightAverager", "step", step, 0)
        if step < self._start_step or (step - self._start_step) % self._every:
            return False
        self._average()
        return True

    @property
    def started(self) -> bool:
        """Whether there is an average yet."""
        return self._started

    @property
    def n_averaged(self) -> Tensor:
        """How many models are in the average, ``[]`` int64 on the device; reading it waits."""
        return self._count.clone()

    def averages(self) -> dict[str, Tensor]:
        """The averages by name, themselves and not copies (of a pair the first; local parts)."""
        self._check_outside("averages")
        return dict(zip((e.name for e in self._entries), self._shadow, strict=True))

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """The model computes with the averaged weights in the block, and has its own after it.

        To the bit, and also when the block raises. A float32 average of float32 or bfloat16 weights
        is exchanged with them, without memory for another copy (rounding to bfloat16 takes ties
        away from zero); otherwise the weights are kept in a copy meanwhile. The model's mode
        (``eval()``) is left alone.

        Raises:
            RuntimeError: there is no average yet, or blocks are nested; at the end, parameters
                that were written to in the block: they are restored, their average is lost.
        """
        self._check_outside("swapped")
        if not self._started:
            raise RuntimeError(
                "WeightAverager: swapped must come after an update that averages, got none"
            )
        self._bind()
        restore = self._swap_in()
        self._inside = True
        versions = [_averaged.version(x) for x in self._locals]
        try:
            yield self._model
        except BaseException:
            self._swap_out(restore)
            raise
        written = [
            entry.name
            for entry, x, version in zip(self._entries, self._locals, versions, strict=True)
            if not entry.buffer and _averaged.version(x) != version
        ]
        self._swap_out(restore)
        if written:
            raise RuntimeError(
                "WeightAverager: parameters must not be written to inside of swapped, got a change "
                f"of {written[0]}: it is restored, its average is lost"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; loads with ``torch.load(weights_only=True)``.

        The tensors are the averager's own, as in ``Module.state_dict``: later updates change them.
        Of a sharded model they are sharded tensors, for ``torch.distributed.checkpoint``.
        """
        self._check_outside("state_dict")
        self._reshard()
        shards = [
            [_averaged.like(x, e.tensor()) for x, e in zip(xs, self._entries, strict=False)]
            for xs in (self._shadow, self._rest)
        ]
        names = [entry.name for entry in self._entries]
        return {
            "format": FORMAT,
            "kind": self._kind,
            "dtype": str(self._dtype).removeprefix("torch."),
            "buffers": self._buffers,
            "n_averaged": self._count.clone(),
            "averages": dict(zip(names, shards[0], strict=True)),
            "compensations": dict(zip(names, shards[1], strict=False)),
            "copies": {e.name: x for e, x in zip(self._copied, self._copies, strict=True)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a :meth:`state_dict`; training goes on to the bit as if never interrupted.

        Decay and schedule are those of this averager. Nothing is changed unless everything fits.

        Raises:
            ValueError: another kind, dtype, buffers policy, names or shapes.
        """
        self._check_outside("load_state_dict")
        own = self.state_dict()
        if missing := [key for key in own if key not in state]:
            raise ValueError(f"WeightAverager: state must have {missing[0]!r}, got none")
        for key in ("format", "kind", "dtype", "buffers"):
            if state[key] != own[key]:
                raise ValueError(
                    f"WeightAverager: {key} of the state must be {own[key]!r}, got {state[key]!r}"
                )
        for key in ("averages", "compensations", "copies"):
            _averaged.check_tensors(key, own[key], state[key])
        with torch.no_grad():
            for key in ("averages", "compensations", "copies"):
                for name, tensor in own[key].items():
                    local(tensor).copy_(local(state[key][name]))
            self._count.copy_(torch.as_tensor(state["n_averaged"]))
        self._started = bool(self._count > 0)

    def export(self, directory: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the averaged model through its own ``save_pretrained``, whole or not at all.

        The folder is written under a temporary name beside it and renamed. Of several processes the
        first writes; of a sharded model all must call, and the first holds the whole model on the
        CPU. Weights have the model's dtypes.

        Args:
            directory: to make; one that is not empty only with ``overwrite``, which removes what is
                in it.
            overwrite: replace a folder that holds something.

        Raises:
            TypeError: a model without ``save_pretrained``.
            FileExistsError: the folder holds something.
            RuntimeError: as :meth:`swapped`.
        """
        self._check_outside("export")
        model = _averaged.unwrapped(self._model)
        save = getattr(model, "save_pretrained", None)
        if save is None:
            raise TypeError(
                f"WeightAverager: model must have save_pretrained to be exported, got "
                f"{type(model).__name__}"
            )
        with self.swapped():
            state = _averaged.whole_state(model)
            options = {} if state is None else {"state_dict": state}
            if _averaged.first_process():
                write_folder(
                    Path(directory),
                    lambda folder: save(str(folder), **options),
                    overwrite=overwrite,
                )

    def _find(self) -> None:
        """Lists what is averaged, copied and left out, and makes the averages."""
        self._shards = _averaged.sharded(self._model)
        self._reshard()
        found = list(_averaged.entries(self._model))
        self._frozen: list[_averaged.Entry] = []
        self._entries: list[_averaged.Entry] = []
        self._copied: list[_averaged.Entry] = []
        for entry in found:
            tensor = entry.tensor()
            if tensor.device.type == "meta":
                raise ValueError(
                    f"WeightAverager: {entry.name} must hold values, got a meta tensor"
                )
            if not entry.buffer:
                left_out = self._trainable_only and not tensor.requires_grad
                (self._frozen if left_out else self._entries).append(entry)
        if not self._entries:
            raise ValueError(
                "WeightAverager: model must have parameters to average, got "
                f"{len(self._frozen)} that require no grad (trainable_only=False averages those)"
            )
        for entry in found:
            tensor = entry.tensor()
            if entry.buffer and self._buffers != "skip" and not _averaged.overlapping(tensor):
                average = self._buffers == "average" and tensor.is_floating_point()
                (self._entries if average else self._copied).append(entry)
        self._dtypes = [entry.tensor().dtype for entry in self._entries]
        self._where: list[int] = []
        sources = [local(entry.tensor()).detach() for entry in self._entries]
        options: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        self._shadow = [torch.zeros_like(x, **options) for x in sources]
        half = self._dtype in HALVES
        self._rest = [torch.zeros_like(x) for x in self._shadow] if half else []
        copied = [entry.tensor().detach() for entry in self._copied]
        self._copies = [x.to(self._device or x.device, copy=True) for x in copied]
        self._count = torch.zeros((), dtype=torch.int64, device=self._shadow[0].device)

    def _bind(self) -> None:
        """Follows the model: parameters that have moved, or that others have taken the place of."""
        self._reshard()
        for entry in self._frozen:
            if entry.tensor().requires_grad:
                raise RuntimeError(
                    f"WeightAverager: {entry.name} must stay frozen, got requires_grad=True: make "
                    "the averager after it, or with trainable_only=False"
                )
        now = [local(entry.tensor()) for entry in self._entries]
        where = [x.data_ptr() for x in now]  # a change of dtype or shape moves a tensor too
        if where == self._where:
            return
        for entry, x, dtype, average in zip(
            self._entries, now, self._dtypes, self._shadow, strict=True
        ):
            if x.dtype != dtype or x.shape != average.shape:
                raise RuntimeError(
                    f"WeightAverager: {entry.name} must stay {dtype} {list(average.shape)}, got "
                    f"{x.dtype} {list(x.shape)}: make a new averager for a changed model"
                )
        if self._device is None:
            self._shadow = _moved(self._shadow, now)
            self._rest = _moved(self._rest, now[: len(self._rest)])
            self._copies = _moved(self._copies, [e.tensor() for e in self._copied])
            self._count = self._count.to(self._shadow[0].device)
        self._locals, self._where = now, where
        self._parts = self._planned()

    def _reshard(self) -> None:
        # After a forward pass without gradients FSDP leaves whole parameters in its root, and would
        # go on computing with them.
        for module in self._shards:
            module.reshard()

    def _planned(self) -> list[_Part]:
        groups: dict[tuple[torch.device, bool], list[int]] = {}
        for i, (entry, x) in enumerate(zip(self._entries, self._shadow, strict=True)):
            groups.setdefault((x.device, entry.buffer), []).append(i)
        parts = []
        for (device, buffers), places in groups.items():
            sources, moves = [], []
            for i in places:
                # Not detached: a parameter follows its model, an alias would keep the old memory.
                source = self._locals[i]
                if _elsewhere(source, device):
                    # Pinned, a copy from the GPU need not wait for each tensor.
                    pin = device.type == "cpu" and source.is_cuda
                    staging = torch.empty_like(source, device=device, pin_memory=pin)
                    moves.append((staging, source))
                    source = staging
                sources.append(source)
            rest = [self._rest[i] for i in places] if self._rest else []
            averages = [self._shadow[i] for i in places]
            try:
                plan = Plan(averages, sources, compensations=rest)
            except ValueError as error:
                names = [self._entries[i].name for i in places]
                raise ValueError(_named(str(error), names)) from None
            parts.append(_Part(plan, buffers, places, moves))
        return parts

    @torch.no_grad()
    def _average(self) -> None:
        self._bind()
        weight = _averaged.weight(self._kind, self._count, self._decay, self._warmup)
        for part in self._parts:
            for staging, source in part.moves:
                staging.copy_(source, non_blocking=True)
            if part.moves and part.plan.device.type == "cpu":
                _wait_for(part.moves[0][1].device)
            weight_average_(part.plan, weight.to(part.plan.device, non_blocking=True))
        for entry, copy in zip(self._copied, self._copies, strict=True):
            copy.copy_(entry.tensor())
        self._count.add_(1)
        self._started = True

    @torch.no_grad()
    def _swap_in(self) -> list[tuple[Tensor, Tensor]]:
        """Returns what is not exchanged with what it was before."""
        written: list[tuple[Tensor, Tensor, Tensor | None]] = [
            (e.tensor(), x, None) for e, x in zip(self._copied, self._copies, strict=True)
        ]
        exchanged = []
        for part in self._parts:
            if _exchangeable(part):
                exchanged.append(part.plan)
                continue
            for i in part.places:
                rest = self._rest[i] if self._rest else None
                written.append((self._locals[i], self._shadow[i], rest))
        # All memory is taken before the first weight changes.
        restore = [(x, x.detach().clone()) for x, _, _ in written]
        for x, average, rest in written:
            x.copy_(average if rest is None else average.float() + rest.float())
        for plan in exchanged:
            weight_average_swap_(plan)
        torch.clear_autocast_cache()  # holds weights in another dtype
        return restore

    @torch.no_grad()
    def _swap_out(self, restore: list[tuple[Tensor, Tensor]]) -> None:
        self._reshard()
        torch.clear_autocast_cache()
        for part in self._parts:
            if _exchangeable(part):
                weight_average_swap_(part.plan, back=True)
        for x, before in restore:
            x.copy_(before)
        self._inside = False

    def _check_outside(self, what: str) -> None:
        if self._inside:
            raise RuntimeError(
                f"WeightAverager: {what} must be called outside of swapped, got a call inside"
            )


def _elsewhere(source: Tensor, device: torch.device) -> bool:
    return source.device != device


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _exchangeable(part: _Part) -> bool:
    # Buffers may be written to in the block, which an exchange does not survive.
    if part.buffers or part.moves or part.plan.compensations:
        return False
    return all(
        a.dtype == p.dtype or (a.dtype, p.dtype) == (torch.float32, torch.bfloat16)
        for a, p in zip(part.plan.averages, part.plan.params, strict=True)
    )


def _moved(tensors: list[Tensor], models: list[Tensor]) -> list[Tensor]:
    return [x.to(model.device) for x, model in zip(tensors, models, strict=True)]


def _named(message: str, names: list[str]) -> str:
    """An error of the op, in the names of the model."""
    message = message.replace("weight_average:", "WeightAverager:")
    places = r"\b(?:params|averages|compensations)\[(\d+)\]"
    return re.sub(places, lambda found: names[int(found[1])], message)
