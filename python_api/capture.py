"""What submodules of a model produce, recorded while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.api import _sites

__all__ = ["Capture"]

KINDS = ("output", "q", "k", "v")
# Names of the query, key and value projections of an attention module: BERT and RoBERTa; Llama,
# Qwen, Mistral, OPT; DistilBERT.
SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
)
LOOKED_FOR = "query/key/value, q_proj/k_proj/v_proj, q_lin/k_lin/v_lin, c_attn, query_key_value"

Extract = Callable[[Tensor], Tensor]


class Capture(Mapping[str, Any]):
    r"""Records what submodules produce while the model runs inside the ``with`` block.

    The tensors keep their autograd graph, so a loss of them trains what made them. A mapping from
    each path to its tensor, in the order of ``paths``.

    Args:
        model: any module, also wrapped by DistributedDataParallel, FSDP or ``torch.compile``.
        paths: names of submodules as in ``model.named_modules()`` of the model that is not wrapped.
        what: what to record of each:

            - ``output``: what its ``forward`` returns, of a tuple or mapping the first element.
            - ``q``, ``k``, ``v``: the output of the query, key or value projection,
              ``[batch, sequence, width]``, before rotary embedding, normalisation and the split
              into heads. The path names an attention module or a module that holds exactly one,
              such as a layer. Attention may be of any implementation. Known are BERT and RoBERTa
              (``query``), Llama, Qwen and Mistral (``q_proj``; with grouped queries, keys and
              values are narrower), DistilBERT (``q_lin``), GPT-2 (``c_attn``) and GPT-NeoX
              (``query_key_value``).

            A tuple of these records several: the value of a path is then a tuple in that order.

    Raises:
        TypeError: arguments or recorded outputs of a wrong type.
        ValueError: a path that does not exist or is given twice; no attention module, or several.
        RuntimeError: on leaving the block, a path that did not run, or a tensor that was
            overwritten in place; in the block, a path that runs for the second time (two forwards,
            or weights shared between layers), or one inside a reentrant activation checkpoint,
            which has no graph (use ``use_reentrant=False``).

    Note:
        Each entry starts a new record; it is kept until the next one or :meth:`clear`. In the block
        each named module has a ``forward`` of its own, and none after it. What forward hooks of
        the module make of the output is not seen.

        Under ``torch.compile`` the model compiles once more for use in the block and switches
        between the two by itself, with ``fullgraph=True`` as well; overwriting in place is then not
        noticed, and projections inside an activation checkpoint break the graph. Recomputation by
        activation checkpointing is not recorded.

        Under DistributedDataParallel and FSDP the output of the model must take part in the loss as
        well: both prepare the backward pass of the parameters from there.

    Example:
        >>> import kdkernels, torch
        >>> first, second = torch.nn.Linear(8, 6), torch.nn.Linear(6, 2)
        >>> model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
        >>> with kdkernels.Capture(model, ["0", "1"]) as seen:
        ...     logits = model(torch.randn(4, 8))
        >>> {path: list(tensor.shape) for path, tensor in seen.items()}
        {'0': [4, 6], '1': [4, 6]}
        >>> seen["1"].square().mean().backward()
        >>> first.weight.grad.shape
        torch.Size([6, 8])
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], what: str | tuple[str, ...] = "output"
    ) -> None:
        _sites.check_model("Capture", model)
        self._paths = _sites.check_paths("Capture", "paths", paths)
        self._what = what
        self._kinds = _check_what(what)
        keys = [(path, kind) for path in self._paths for kind in self._kinds]
        self._sites = {key: _site(model, *key) for key in keys}
        # Lists of no or one tensor, as torch.compile traces what fills them: a dict's keys would be
        # constants to it, and layers that it compiles one by one would not share their code.
        self._seen: dict[tuple[str, str], list[Tensor]] = {key: [] for key in keys}
        self._versions: dict[tuple[str, str], int] = {}
        self._replaced: ExitStack | None = None

    def __enter__(self) -> Capture:
        if self._replaced is not None:
            raise RuntimeError("Capture: the block must be left before it is entered again")
        self.clear()
        with ExitStack() as stack:  # undone if one of them fails
            for key, (module, extract) in self._sites.items():
                make = partial(_recorded, self._recorder(key, extract))
                stack.enter_context(_sites.replaced("Capture", module, make))
            self._replaced = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        replaced, self._replaced = self._replaced, None
        fault = None if kind is not None else self._fault()
        if kind is not None or fault is not None:
            self.clear()
        if replaced is not None:
            replaced.close()
        if fault is not None:
            raise RuntimeError(f"Capture: {fault}")

    def clear(self) -> None:
        """Lets go of the recorded tensors."""
        for tensors in self._seen.values():
            tensors.clear()
        self._versions.clear()

    def __getitem__(self, path: str) -> Any:
        """The tensor of a path; a tuple of them where ``what`` is one."""
        if path not in self._paths:
            raise KeyError(f"Capture: path must be one of {', '.join(self._paths)}, got {path!r}")
        found = [tensor for kind in self._kinds for tensor in self._seen[path, kind]]
        if len(found) < len(self._kinds):
            raise KeyError(f"Capture: {path} must have run in the block, got nothing from it")
        return found[0] if isinstance(self._what, str) else tuple(found)

    def __iter__(self) -> Iterator[str]:
        return (p for p in self._paths if all(self._seen[p, kind] for kind in self._kinds))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Capture({list(self._paths)}, what={self._what!r})"

    # Two records are equal only if they are one: tensors have no truth value to compare by.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _recorder(self, key: tuple[str, str], extract: Extract) -> Callable[[Any], None]:
        """The function that takes the output of a module; ``torch.compile`` traces it."""
        path, seen, versions = key[0], self._seen[key], self._versions

        def record(output: Any) -> None:
            compiling = torch.compiler.is_compiling()
            if not compiling and torch._C._current_graph_task_id() != -1:
                return  # a backward pass runs: this is the recomputation of a checkpoint
            tensor = _sites.first_tensor("Capture", path, output)
            if seen:
                raise RuntimeError(
                    f"Capture: {path} must run once in the block, got a second run: one block a "
                    "forward, and no modules that share their weights across layers"
                )
            seen.append(extract(tensor))
            if not compiling:
                _check_graph(path, tensor)
                if not tensor.is_inference():  # such have no version
                    versions[key] = seen[0]._version

        return record

    def _fault(self) -> str | None:
        """Why the record must not be used, if so."""
        missing = [path for path in self._paths if path not in self]
        if missing:
            return (
                f"every path must run in the block, got nothing from {', '.join(missing)}: was the "
                "model called, and is it the one given to Capture? A model that is exported, or "
                "compiled by torch.compile without guards, runs past it"
            )
        for key, version in self._versions.items():
            if self._seen[key][0]._version != version:
                return f"{key[0]} must keep its output, got a later operation that overwrote it"
        return None


def _recorded(record: Callable[[Any], None], original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` that also records."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        record(output)
        return output

    return forward


def _check_graph(path: str, tensor: Tensor) -> None:
    """Refuses what a reentrant checkpoint computes, without a graph, in the forward pass."""
    if not tensor.requires_grad and _sites.in_reentrant():
        raise RuntimeError(
            f"Capture: {path} must be outside of reentrant activation checkpoints, got a tensor "
            "without a graph: checkpoint with use_reentrant=False"
        )


def _check_what(what: object) -> tuple[str, ...]:
    kinds = what if isinstance(what, tuple) else (what,)
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
        raise ValueError(
            f"Capture: what must be one of {', '.join(KINDS)} or a tuple of them, got {what!r}"
        )
    return kinds


def _site(model: nn.Module, path: str, kind: str) -> tuple[nn.Module, Extract]:
    """The module to watch for a path, and what to take of its output."""
    module = _sites.submodule("Capture", "paths", model, path)
    if kind == "output":
        return module, _whole
    found = {
        name: site
        for name, child in module.named_modules()
        if (site := _projection(child, KINDS.index(kind) - 1)) is not None
    }
    if len(found) != 1:
        names = ", ".join(name or "itself" for name in found)
        raise ValueError(
            f"Capture: {path} must be or hold one attention module for what={kind!r}, got "
            f"{type(module).__name__} with "
            + (f"{len(found)}: {names}" if found else f"none of {LOOKED_FOR}")
        )
    return next(iter(found.values()))


def _projection(attention: nn.Module, index: int) -> tuple[nn.Module, Extract] | None:
    """The projection to query, key or value of an attention module; None where it is none."""
    children = attention._modules
    for names in SEPARATE:
        if all(children.get(name) is not None for name in names):
            return children[names[index]], _whole  # type: ignore[return-value]
    fused = children.get("c_attn")
    # GPT-2's Conv1D. That of cross-attention makes keys and values only, and GPTBigCode's c_attn,
    # a Linear, has another layout.
    if fused is not None and getattr(fused, "nf", None) == 3 * getattr(fused, "nx", 0):
        return fused, lambda output: output.chunk(3, dim=-1)[index]
    fused = children.get("query_key_value")
    head_size = getattr(attention, "head_size", None)
    # GPT-NeoX: query, key and value of one head, then those of the next. Others that name it so
    # (Falcon, ChatGLM) lay it out in other ways and call the width of a head otherwise.
    if isinstance(fused, nn.Linear) and head_size and fused.out_features == 3 * fused.in_features:
        per_head = (-1, 3, head_size)
        return fused, lambda output: output.unflatten(-1, per_head).select(-2, index).flatten(-2)
    return None


def _whole(output: Tensor) -> Tensor:
    return output
