"""The heads and feed-forward neurons of a model's layers: found, counted, and cut out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.api import _sites

__all__ = ["KINDS", "Layer", "Layout", "Skipped", "SkippedAttention", "layers_of", "watched"]

KINDS = ("heads", "neurons")
# Attributes of attention modules that are proportional to the number of heads.
COUNTS = (
    *("num_attention_heads", "num_heads", "n_heads", "num_key_value_heads"),
    *("all_head_size", "split_size"),
)


@dataclass(frozen=True)
class Layout:
    """Where a family of models has what is cut; paths begin at a layer.

    Attributes:
        attention: The module that splits into heads.
        projections: Its projections to queries, keys and values; one that is fused of the three.
        output: The projection of the heads' context, whose input the gate of a head is on.
        feed_forward: The module that is left out with the last neuron.
        inner: The projections to the neurons; two where the activation is gated.
        outer: The projection of the neurons, whose input their gates are on.
    """

    attention: str
    projections: tuple[str, ...]
    output: str
    feed_forward: str
    inner: tuple[str, ...]
    outer: str

    @property
    def linear(self) -> tuple[str, ...]:
        """All projections."""
        return (*self.projections, self.output, *self.inner, self.outer)


LAYOUTS = {
    "BERT, RoBERTa": Layout(
        "attention.self",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        "intermediate",
        ("intermediate.dense",),
        "output.dense",
    ),
    "DistilBERT": Layout(
        "attention",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out_lin",
        "ffn",
        ("ffn.lin1",),
        "ffn.lin2",
    ),
    "GPT-2": Layout("attn", ("attn.c_attn",), "attn.c_proj", "mlp", ("mlp.c_fc",), "mlp.c_proj"),
    "Llama": Layout(
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        "mlp",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
    ),
}


class Skipped(nn.Module):
    """In the place of a sublayer without units: it adds nothing, so only the residual is left."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A zero of no dimensions, which the residual connection broadcasts."""
        return hidden_states.new_zeros(())


class SkippedAttention(nn.Module):
    """In the place of an attention module without heads."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """A zero of no dimensions, and no attention weights."""
        cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        if cache is not None:
            # A cache is asked for its length by its first layer, which may be this one.
            batch, seq = hidden_states.shape[:2]
            column = hidden_states.new_zeros(batch, 1, seq, 1)
            cache.update(column, column, self.layer_idx)
        return hidden_states.new_zeros(()), None


class Layer:
    """A layer whose heads and neurons can be cut; the full modules are kept to be put back.

    Where queries share keys and values in groups, a unit of ``heads`` is a group: its query heads
    with their one head of keys and values. What a unit reads and writes lies side by side.

    Attributes:
        module: The layer.
        layout: Where it has what.
        units: Heads and neurons of the full layer.
        kept: Heads and neurons that it has now.
        head_width: Columns of a head's context; of the whole group where queries are grouped.
    """

    def __init__(self, name: str, path: str, index: int, module: nn.Module) -> None:
        self.module, self._index = module, index
        self.layout = layout = _layout(name, path, module)
        attention: Any = module.get_submodule(layout.attention)
        self._check_projections(name, path)
        size = getattr(attention, "attention_head_size", getattr(attention, "head_dim", None))
        if not isinstance(size, int):
            raise ValueError(
                f"{name}: {path}.{layout.attention} must have attention_head_size or head_dim, "
                f"got neither in a {type(attention).__name__}"
            )
        self._check_others(name, path, attention, size)
        self.head_width = size * getattr(attention, "num_key_value_groups", 1)
        self.units = (
            _inputs(module.get_submodule(layout.output)) // self.head_width,
            _inputs(module.get_submodule(layout.outer)),
        )
        self.kept = self.units
        paths = dict.fromkeys((layout.attention, layout.feed_forward, *layout.linear))
        self._full: dict[str, nn.Module] | None = {p: module.get_submodule(p) for p in paths}
        self._counts = {key: vars(attention)[key] for key in COUNTS if key in vars(attention)}

    def narrow(self, heads: Tensor | None = None, neurons: Tensor | None = None) -> None:
        """Keeps these units of the full layer, in this order; None keeps all as they are."""
        self.restore()
        if heads is not None:
            self._narrow_heads(heads)
        if neurons is not None:
            self._narrow_neurons(neurons)

    def restore(self) -> None:
        """Puts the full modules back."""
        if self._full is None:
            raise RuntimeError("a layer that has let go of its full modules cannot change")
        for path, full in self._full.items():  # parents come before what is in them
            self._put(path, full)
        vars(self._full[self.layout.attention]).update(self._counts)
        self.kept = self.units

    def forget(self) -> None:
        """Lets go of what has been cut away."""
        self._full = None

    def site(self, kind: str) -> nn.Module | None:
        """The projection whose input the gates are on; None where no unit is left."""
        which = KINDS.index(kind)
        path = (self.layout.output, self.layout.outer)[which]
        return self.module.get_submodule(path) if self.kept[which] else None

    def width(self, kind: str) -> int:
        """Columns of a unit at the site."""
        return self.head_width if kind == "heads" else 1

    def _narrow_heads(self, heads: Tensor) -> None:
        layout, total = self.layout, self.units[0]
        self.kept = (len(heads), self.kept[1])
        if not len(heads):
            self._put(layout.attention, SkippedAttention(self._index))
            if not layout.output.startswith(f"{layout.attention}."):
                self._put(layout.output, nn.Identity())
            return
        fused = len(layout.projections) == 1
        for path in layout.projections:
            full = self.module.get_submodule(path)
            self._put(path, _cut(full, _columns(heads, total, _outputs(full), 3 if fused else 1)))
        full = self.module.get_submodule(layout.output)
        self._put(layout.output, _cut(full, None, _columns(heads, total, _inputs(full))))
        attention = self.module.get_submodule(layout.attention)
        for key, value in self._counts.items():
            setattr(attention, key, value * len(heads) // total)

    def _narrow_neurons(self, neurons: Tensor) -> None:
        layout = self.layout
        self.kept = (self.kept[0], len(neurons))
        if not len(neurons):
            self._put(layout.feed_forward, Skipped())
            if not layout.outer.startswith(f"{layout.feed_forward}."):
                self._put(layout.outer, nn.Identity())
            return
        for path in layout.inner:
            self._put(path, _cut(self.module.get_submodule(path), neurons))
        self._put(layout.outer, _cut(self.module.get_submodule(layout.outer), None, neurons))

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        setattr(self.module.get_submodule(parent), child, module)

    def _check_projections(self, name: str, path: str) -> None:
        for each in self.layout.linear:
            found = self.module.get_submodule(each)
            if type(found) is not nn.Linear and type(found).__name__ != "Conv1D":
                raise ValueError(
                    f"{name}: {path}.{each} must be a plain nn.Linear or Conv1D, got a "
                    f"{type(found).__name__}; merge adapters and do not quantise before"
                )

    def _check_others(self, name: str, path: str, attention: nn.Module, head_size: int) -> None:
        """Norms of one head are shared by all; what has an entry a head would have to be cut."""
        known = {id(p) for each in self.layout.linear for p in self._parameters(each)}
        for key, parameter in attention.named_parameters():
            if id(parameter) not in known and parameter.numel() != head_size:
                raise ValueError(
                    f"{name}: {path}.{self.layout.attention} must have no parameters but those of "
                    f"its projections and norms of one head, got {key}"
                )

    def _parameters(self, path: str) -> Iterator[nn.Parameter]:
        return self.module.get_submodule(path).parameters()


def layers_of(name: str, model: nn.Module) -> list[Layer]:
    """The layers of a model of transformers.

    Raises:
        ValueError: it has no one list of layers, or layers of an unknown layout.
    """
    inner = _sites.unwrapped(model)
    paths = _sites.layers_of(name, "model", inner)
    return [Layer(name, path, index, inner.get_submodule(path)) for index, path in enumerate(paths)]


@contextmanager
def watched(layers: list[Layer], see: Callable[[int, str, Tensor], Tensor]) -> Iterator[None]:
    """In the block a function gets each gated activation, ``[batch, tokens, width]``.

    Args:
        layers: Of the model that runs.
        see: Given the index of the layer, the kind of its units and the activation, it returns
            what takes the activation's place.
    """

    def hook(index: int, kind: str) -> Callable[..., Any]:
        return lambda module, args: (see(index, kind, args[0]), *args[1:])

    handles = []
    try:
        for index, layer in enumerate(layers):
            for kind in KINDS:
                if (site := layer.site(kind)) is not None:
                    handles.append(site.register_forward_pre_hook(hook(index, kind)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layout(name: str, path: str, layer: nn.Module) -> Layout:
    modules = dict(layer.named_modules())
    for layout in LAYOUTS.values():
        if all(each in modules for each in layout.linear):
            return layout
    raise ValueError(
        f"{name}: model must have layers as those of {', '.join(LAYOUTS)}, got {path} with "
        f"{', '.join(each for each, _ in layer.named_children())} in a {type(layer).__name__}"
    )


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _outputs(module: Any) -> int:
    """Of a Linear or Conv1D, whose weight is ``[inputs, outputs]``."""
    return int(module.weight.shape[0 if _is_linear(module) else 1])


def _inputs(module: Any) -> int:
    return int(module.weight.shape[1 if _is_linear(module) else 0])


def _columns(units: Tensor, total: int, size: int, parts: int = 1) -> Tensor:
    """Indices of the columns of units, in each of the equal parts."""
    return torch.arange(size).view(parts, total, -1)[:, units.cpu()].flatten()


def _cut(module: Any, outputs: Tensor | None, inputs: Tensor | None = None) -> nn.Module:
    """A contiguous copy of a projection with some outputs and inputs, in the order given."""
    linear = _is_linear(module)
    weight, bias = module.weight.detach(), module.bias
    for index, of_outputs in ((outputs, True), (inputs, False)):
        if index is not None:
            weight = weight.index_select(0 if of_outputs == linear else 1, index.to(weight.device))
    sizes = weight.shape if linear else weight.shape[::-1]
    with torch.device("meta"):  # no weights are drawn that would be thrown away
        fresh = (
            nn.Linear(sizes[1], sizes[0], bias is not None) if linear else type(module)(*sizes[:2])
        )
    fresh.weight = nn.Parameter(weight, module.weight.requires_grad)
    if bias is not None:
        cut = bias.detach() if outputs is None else bias.detach()[outputs.to(bias.device)]
        fresh.bias = nn.Parameter(cut.clone(), bias.requires_grad)
    fresh.train(module.training)
    return fresh
