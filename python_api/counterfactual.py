"""Base, source and counterfactual run of a model, each layer computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kdkernels.api import _sites
from kdkernels.api._spec import choice
from kdkernels.api.intervention import Interchange, Where

__all__ = ["Counterfactual"]

NAME = "Counterfactual"
TAKEN = ("output", "input")
FROM = ("source", "base")


class Counterfactual:
    r"""The three runs of an interchange intervention, without computing a layer twice.

    With a site at layer ``l`` of ``L``: the base run computes ``L`` layers; the source run stops
    behind the site, ``l + 1`` layers; the counterfactual run starts at the site from the base run's
    states, ``L - l - 1`` layers. 12 + 7 + 5 instead of 36 for ``l = 6`` of 12.

    Args:
        model: as for :class:`kdkernels.Interchange`.
        sites: a name, or names, of layers, or of modules inside of layers; several layers are
            swapped in one run. All of them in one list of layers (``torch.nn.ModuleList``).
        source_at: where the source run's states are taken: the ``output`` of each site, or its
            ``input``: what the released code of causal distillation does, whose layer ``l`` of the
            source is therefore the output of layer ``l - 1``.
        dims: as for :class:`kdkernels.Interchange`.
        basis: as for :class:`kdkernels.Interchange`.
        mode: as for :class:`kdkernels.Interchange`.
        reuse: ``False`` computes all layers in all three runs.
        backend: as for :class:`kdkernels.Interchange`.

    Raises:
        TypeError: as :class:`kdkernels.Interchange`.
        ValueError: as :class:`kdkernels.Interchange`; with ``reuse``, sites outside of a list of
            layers or in different ones.
        RuntimeError: runs in a wrong order; a site that did not run; a layer that runs twice; with
            ``reuse``, layers that do not run in the order of their list; a later operation that
            overwrites in place what the runs need.

    Note:
        In evaluation mode, and wherever nothing is random, the result is the same to the bit as
        with ``reuse=False``, and so are the gradients but for the order of their sums. With dropout
        the counterfactual run has the base run's masks in the layers that they share, and masks of
        its own behind: each run by itself is distributed as before, the two are no longer
        independent.

        A layer that is not computed returns what it returned in the base run, so hidden states in
        the output are those of the counterfactual run. The source run calls the model without its
        wrappers, and under ``torch.compile`` without compiled code; FSDP's is run to the end. No
        run should fill a key-value cache (``use_cache=False``). Overwriting in place is not noticed
        under ``torch.compile`` and ``torch.inference_mode``.

    References:
        Wu et al., Causal Distillation for Language Models, arXiv 2112.02505.

    Example:
        >>> import kdkernels, torch
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x):
        ...         for layer in self.layers:
        ...             x = layer(x).tanh()
        ...         return x
        >>> model, zero = Net(), torch.zeros(2, dtype=torch.int64)
        >>> runs = kdkernels.Counterfactual(model, "layers.1")
        >>> out = runs.base(torch.randn(2, 5, 4))
        >>> runs.source(torch.randn(2, 5, 4))
        >>> swapped = runs.counterfactual(kdkernels.Spans(zero, zero + 2, zero + 3))
        >>> torch.equal(swapped[:, 3:], out[:, 3:]), torch.equal(swapped[:, :3], out[:, :3])
        (True, False)
    """

    def __init__(
        self,
        model: nn.Module,
        sites: str | Sequence[str],
        *,
        source_at: str = "output",
        dims: Any = None,
        basis: Any = None,
        mode: str = "swap",
        reuse: bool = True,
        backend: str | None = None,
    ) -> None:
        _sites.check_model(NAME, model)
        named = [sites] if isinstance(sites, str) else sites
        choice(NAME, "source_at", source_at, TAKEN)
        self._model, self._at, self._reuse = model, source_at, reuse
        self._swap = {"dims": dims, "basis": basis, "mode": mode, "backend": backend}
        self._sites = [_find(model, p) for p in _sites.check_paths(NAME, "sites", named)]
        if reuse:
            _check_stack(self._sites)
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        # Lists of no or one output, as torch.compile traces what fills them.
        self._outputs: list[list[Any]] = []
        self._taken: dict[str, dict[str, list[Tensor]]] = {
            run: {site.path: [] for site in self._sites} for run in FROM
        }
        self._versions: dict[str, list[tuple[Tensor, int]]] = {r: [] for r in ("layers", *FROM)}

    def base(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on the base, keeps what the other runs need; returns its output."""
        self.clear()
        with ExitStack() as stack:
            if self._reuse:
                self._keep_layers(stack)
            self._watch(stack, "base")
            output = self._model(*args, **kwargs)
        self._inputs = args, kwargs
        return output

    def source(self, *args: Any, **kwargs: Any) -> None:
        """Runs the model on the source, up to the last site; ask it for no hidden states."""
        self._forget("source")
        inner = _sites.unwrapped(self._model)
        stop = self._reuse and not _sharded(self._model)
        with ExitStack() as stack:
            if not stop:
                self._watch(stack, "source")
                self._model(*args, **kwargs)
                return
            last = max(site.index for site in self._sites)
            layer = self._sites[0].layers[last]
            # The input of a whole layer is known before it runs, anything else behind it.
            early = self._at == "input" and all(s.whole for s in self._sites if s.index == last)
            if early:
                stack.enter_context(_sites.replaced(NAME, layer, partial(_stopping, early)))
            self._watch(stack, "source")
            if not early:
                stack.enter_context(_sites.replaced(NAME, layer, partial(_stopping, early)))
            # Modules compiled in place as well: no exception leaves compiled code.
            with suppress(_Stop), torch.compiler.set_stance("force_eager"):
                inner(*args, **kwargs)

    def counterfactual(self, where: Where, *, source: str = "source") -> Any:
        """Runs the model on the base with the source's states in it; returns its output.

        Args:
            where: :class:`kdkernels.Spans` or :class:`kdkernels.Positions`.
            source: which run the states are of: ``source``, or ``base`` itself, whose rows are then
                read by other rows (``source_row``): a batch that is its own source costs no run.
        """
        choice(NAME, "source", source, FROM)
        if self._inputs is None:
            raise RuntimeError(f"{NAME}: base must run before counterfactual, got no run")
        paths, states = [site.path for site in self._sites], self._states(source)
        args, kwargs = self._inputs
        with ExitStack() as stack:
            if self._reuse:
                # A layer that is computed again has kept its output as well.
                for module, seen in zip(self._skipped(), self._outputs, strict=False):
                    stack.enter_context(_sites.replaced(NAME, module, partial(_skipping, seen)))
            stack.enter_context(Interchange(self._model, paths, states, where, **self._swap))
            return self._model(*args, **kwargs)

    def clear(self) -> None:
        """Lets go of what was kept of earlier runs."""
        self._inputs, self._outputs = None, []
        self._versions["layers"].clear()
        for run in FROM:
            self._forget(run)

    def _forget(self, run: str) -> None:
        self._versions[run].clear()
        for seen in self._taken[run].values():
            seen.clear()

    def _skipped(self) -> list[nn.Module]:
        """The layers that the counterfactual run does not compute."""
        first = min(site.index for site in self._sites)
        # A site inside of a layer: that one is computed again, from its input.
        whole = all(site.whole for site in self._sites if site.index == first)
        return list(self._sites[0].layers)[: first + 1 if whole else first]

    def _keep_layers(self, stack: ExitStack) -> None:
        """Keeps what the layers up to the first site return."""
        first = min(site.index for site in self._sites)
        previous: list[Any] | None = None
        for module in list(self._sites[0].layers)[: first + 1]:
            seen: list[Any] = []
            make = partial(_keeping, seen, previous, self._versions["layers"])
            stack.enter_context(_sites.replaced(NAME, module, make))
            self._outputs.append(seen)
            previous = seen

    def _watch(self, stack: ExitStack, run: str) -> None:
        """Takes the states of all sites."""
        for site in self._sites:
            seen = self._taken[run][site.path]
            make = partial(_taking, site.path, self._at, seen, self._versions[run])
            stack.enter_context(_sites.replaced(NAME, site.module, make))

    def _states(self, run: str) -> dict[str, Tensor]:
        silent = [path for path, seen in self._taken[run].items() if not seen]
        if silent:
            hint = "source must run before counterfactual" if run == "source" else "every site runs"
            raise RuntimeError(f"{NAME}: {hint}, got nothing from {', '.join(silent)}")
        for tensor, version in (*self._versions["layers"], *self._versions[run]):
            if tensor._version != version:
                raise RuntimeError(
                    f"{NAME}: layers and sites must keep their output, got a later operation that "
                    "overwrote it"
                )
        return {path: seen[0] for path, seen in self._taken[run].items()}


@dataclass(frozen=True)
class _Site:
    """A site in its list of layers.

    Attributes:
        layers: The outermost list on the way to it; empty if there is none.
        index: Its layer's place in the list.
        whole: Whether it is the layer itself.
    """

    path: str
    module: nn.Module
    layers: nn.ModuleList
    index: int
    whole: bool


class _Stop(Exception):
    """Ends the source run behind its last site."""


def _sharded(model: nn.Module) -> bool:
    """Whether FSDP gathers its parameters, which a run that stops would leave gathered."""
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return not kinds.isdisjoint(("FSDPModule", "FullyShardedDataParallel"))


def _find(model: nn.Module, path: str) -> _Site:
    passed = _sites.walk(NAME, "sites", model, path)
    for place, module in enumerate(passed[:-1]):
        if isinstance(module, nn.ModuleList):
            layer = passed[place + 1]
            index = next(i for i, other in enumerate(module) if other is layer)
            return _Site(path, passed[-1], module, index, layer is passed[-1])
    return _Site(path, passed[-1], nn.ModuleList(), 0, True)


def _check_stack(sites: Sequence[_Site]) -> None:
    """Raises unless one list of layers holds all sites."""
    for site in sites:
        if site.layers is not sites[0].layers or not site.layers:
            fact = "outside of one" if not site.layers else f"in another one than {sites[0].path}"
            raise ValueError(
                f"{NAME}: sites must lie in one list of layers with reuse=True, got {site.path} "
                f"{fact}"
            )


def _keeping(
    seen: list[Any],
    previous: list[Any] | None,
    versions: list[tuple[Tensor, int]],
    original: Callable[..., Any],
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if previous is not None and not previous:
            raise RuntimeError(
                f"{NAME}: layers must run in the order of their list with reuse=True, got one "
                "before, or without, the one in front of it"
            )
        _keep(seen, versions, "a layer", output)
        return output

    return forward


def _keep(seen: list[Any], versions: list[tuple[Tensor, int]], path: str, value: Any) -> None:
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._current_graph_task_id() != -1:
        return  # an activation checkpoint computes again, in the backward pass
    if seen:
        raise RuntimeError(
            f"{NAME}: every layer must run once in a run, got {path} twice: no modules that share "
            "their weights across layers"
        )
    seen.append(value)
    if not compiling:
        for x in tree_leaves(value):
            if isinstance(x, Tensor) and not x.is_inference():  # such have no version
                versions.append((x, x._version))


def _skipping(seen: list[Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return seen[0]

    return forward


def _taking(
    path: str,
    at: str,
    seen: list[Tensor],
    versions: list[tuple[Tensor, int]],
    original: Callable[..., Any],
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if at == "input":
            _keep(seen, versions, path, _sites.first_tensor(NAME, path, args or kwargs))
        output = original(*args, **kwargs)
        if at == "output":
            _keep(seen, versions, path, _sites.first_tensor(NAME, path, output))
        return output

    return forward


def _stopping(early: bool, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not early:
            original(*args, **kwargs)
        raise _Stop

    return forward
