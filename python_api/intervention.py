"""Interchange interventions inside a model: a context manager that swaps at named modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.api import _sites
from kdkernels.api._spec import choice
from kdkernels.api.interchange import MODES, interchange, interchange_at, interchange_subspace

__all__ = ["Interchange", "Positions", "Spans"]


class Spans(NamedTuple):
    """Where a span of a source goes in each row of a base; all ``[batch]`` integer tensors.

    See :func:`kdkernels.interchange`: the ``length`` positions from ``source_start`` on of the
    source's row ``source_row`` (``None``: the same row) go to those from ``base_start`` on.
    """

    base_start: Tensor
    source_start: Tensor
    length: Tensor
    source_row: Tensor | None = None

    def to(self, device: torch.device | str) -> Spans:
        """The same on another device."""
        start, of, length = (x.to(device, non_blocking=True) for x in self[:3])
        row = self.source_row
        return Spans(start, of, length, None if row is None else row.to(device, non_blocking=True))


class Positions(NamedTuple):
    """Pairs of single positions, ``[n, 2]`` (row, position) each; see ``interchange_at``."""

    base_index: Tensor
    source_index: Tensor

    def to(self, device: torch.device | str) -> Positions:
        """The same on another device."""
        return Positions(*(x.to(device, non_blocking=True) for x in self))


Where = Spans | Positions


class Interchange:
    r"""Runs a model with spans of a source's hidden states in place of its own, at named modules.

    In the ``with`` block the output of each site becomes :func:`kdkernels.interchange` of that
    output and its source; what runs behind it goes on from there. Nothing is overwritten: it works
    behind any activation, and the base's own tensors stay as they are.

    Args:
        model: any module, also wrapped by DistributedDataParallel or ``torch.compile``.
        sites: a name, or names, of submodules as in ``model.named_modules()`` of the model that is
            not wrapped, such as a layer. Its output, of a tuple or mapping the first element, is
            ``[batch, seq, hidden]``.
        source: ``[rows, source_seq, hidden]``, e.g. out of a :class:`kdkernels.Capture` of the
            source run. Several sites: a mapping from each site to its own, such as the capture
            itself, or one tensor for all. Gets a gradient unless it is detached.
        where: :class:`Spans` or :class:`Positions`, or a mapping from sites to them.
        dims: columns as in :func:`kdkernels.interchange` (those of some heads), or a mapping.
        basis: ``[hidden, k]``, swaps that subspace (:func:`kdkernels.interchange_subspace`), or a
            mapping; with spans, all columns and ``mode="swap"``.
        mode: ``swap``, ``add`` or ``subtract``.
        backend: as in :func:`kdkernels.interchange`.

    Raises:
        TypeError: arguments or outputs of a wrong type.
        ValueError: a site that does not exist, is given twice, has no source, or lies inside an
            activation checkpoint; states or spans that do not fit.
        RuntimeError: on leaving the block, a site that did not run; in the block, one that runs for
            the second time, or inside a reentrant checkpoint of your own.

    Note:
        Activation checkpointing of whole layers is fine, reentrant or not: the swap is outside of
        what is computed again. A site deeper inside a checkpointed layer is refused. Where a
        checkpoint of your own surrounds a site, run the backward pass of this run, and of no other
        through that checkpoint, in the block; else torch raises ``CheckpointError``.

        Under DistributedDataParallel, several runs of one model before one backward pass need
        ``broadcast_buffers=False``: broadcasting writes into what the first run has kept.

    References:
        Geiger et al., Inducing Causal Structure for Interpretable Neural Networks, arXiv
        2112.00826; Wu et al., Causal Distillation for Language Models, arXiv 2112.02505.

    Example:
        >>> import kdkernels, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> base, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        >>> with kdkernels.Capture(model, ["0"]) as source:
        ...     expected = model(other)
        >>> zero = torch.zeros(2, dtype=torch.int64)
        >>> spans = kdkernels.Spans(base_start=zero, source_start=zero + 1, length=zero + 2)
        >>> with kdkernels.Interchange(model, "0", source, spans):
        ...     out = model(base)
        >>> torch.equal(out[:, :2], expected[:, 1:]), torch.equal(out[:, 2:], model(base)[:, 2:])
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        sites: str | Sequence[str],
        source: Tensor | Mapping[str, Tensor],
        where: Where | Mapping[str, Where],
        *,
        dims: Any = None,
        basis: Tensor | Mapping[str, Tensor] | None = None,
        mode: str = "swap",
        backend: str | None = None,
    ) -> None:
        name = "Interchange"
        _sites.check_model(name, model)
        named = [sites] if isinstance(sites, str) else sites
        self._paths = _sites.check_paths(name, "sites", named)
        choice(name, "mode", mode, tuple(MODES))
        self._modules = {path: _module(model, path) for path in self._paths}
        self._swaps = {
            path: _Swap(
                _of("source", source, path),
                _of("where", where, path),
                _of("dims", dims, path),
                _of("basis", basis, path),
                mode,
                backend,
            )
            for path in self._paths
        }
        # Lists, as torch.compile traces what fills them.
        self._fired: dict[str, list[bool]] = {path: [] for path in self._paths}
        self._replaced: ExitStack | None = None

    def __enter__(self) -> Interchange:
        if self._replaced is not None:
            raise RuntimeError("Interchange: the block must be left before it is entered again")
        for path, passed in self._modules.items():
            _check_checkpoints(path, passed[:-1])
            self._fired[path].clear()
        with ExitStack() as stack:  # undone if one of them fails
            for path, passed in self._modules.items():
                make = partial(_swapping, path, self._fired[path], self._swaps[path])
                stack.enter_context(_sites.replaced("Interchange", passed[-1], make))
            self._replaced = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        replaced, self._replaced = self._replaced, None
        if replaced is not None:
            replaced.close()
        silent = [path for path in self._paths if not self._fired[path]]
        if kind is None and silent:
            raise RuntimeError(
                f"Interchange: every site must run in the block, got nothing from "
                f"{', '.join(silent)}: was the model called, and is it the one given to "
                "Interchange? A model that is exported, or compiled by torch.compile without "
                "guards, runs past it"
            )


@dataclass(frozen=True)
class _Swap:
    """What happens at one site."""

    source: Tensor
    where: Where
    dims: Any
    basis: Tensor | None
    mode: str
    backend: str | None

    def __post_init__(self) -> None:
        name = "Interchange"
        if not isinstance(self.source, Tensor):
            got = type(self.source).__name__
            raise TypeError(f"{name}: source must be a tensor or a mapping of them, got {got}")
        if not isinstance(self.where, Spans | Positions):
            got = type(self.where).__name__
            raise TypeError(f"{name}: where must be Spans or Positions, got {got}")
        if self.basis is not None:
            if not isinstance(self.where, Spans):
                raise ValueError(f"{name}: where must be Spans with a basis, got Positions")
            if self.dims is not None or self.mode != "swap":
                got = f"dims={self.dims!r}, mode={self.mode!r}"
                raise ValueError(f"{name}: basis must come without dims and mode, got {got}")

    def __call__(self, base: Tensor) -> Tensor:
        where, source = self.where, self.source
        if self.basis is not None:
            assert isinstance(where, Spans)
            return interchange_subspace(
                base, source, self.basis, **where._asdict(), backend=self.backend
            )
        options = {"dims": self.dims, "mode": self.mode, "backend": self.backend}
        if isinstance(where, Spans):
            return interchange(base, source, **where._asdict(), **options)
        return interchange_at(base, source, *where, **options)


def _swapping(
    path: str, fired: list[bool], swap: _Swap, original: Callable[..., Any]
) -> Callable[..., Any]:
    """A ``forward`` whose result has the source's states in it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        compiling = torch.compiler.is_compiling()
        if not compiling and _sites.in_reentrant():
            raise RuntimeError(
                f"Interchange: {path} must be outside of reentrant activation checkpoints, which "
                "would run again without the swap: checkpoint with use_reentrant=False"
            )
        # A checkpoint around the site runs again in the backward pass.
        again = not compiling and torch._C._current_graph_task_id() != -1
        if fired and not again:
            raise RuntimeError(
                f"Interchange: {path} must run once in the block, got a second run: one block a "
                "forward, and no modules that share their weights across layers"
            )
        if not again:
            fired.append(True)
        state = _sites.first_tensor("Interchange", path, output)
        return _sites.with_first(output, swap(state))

    return forward


def _of(argument: str, value: Any, path: str) -> Any:
    """What is meant for a site: out of a mapping, or the same for all."""
    if not isinstance(value, Mapping):
        return value
    if path not in value:
        names = ", ".join(map(str, value)) or "nothing"
        raise ValueError(f"Interchange: {argument} must have the site {path}, got {names}")
    return value[path]


def _module(model: nn.Module, path: str) -> list[nn.Module]:
    return _sites.walk("Interchange", "sites", model, path)


def _check_checkpoints(path: str, above: Sequence[nn.Module]) -> None:
    """Refuses a site that a checkpoint would compute again without the swap."""
    for module in above:
        if "_checkpoint_wrapped_module" in module._modules or _sites.checkpointed(module):
            raise ValueError(
                "Interchange: sites must not lie inside an activation checkpoint, which would run "
                f"again without the swap, got {path} inside of a checkpointed "
                f"{type(module).__name__}"
            )
