"""What the meta-teacher's training and a distillation from it share: runs, tokens, domains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.api import _sites
from kdkernels.api.capture import Capture

FAITHFUL_TO = ("paper", "code")
# Keys of a batch that are not the model's.
OWN_KEYS = ("labels", "special_tokens_mask", "lengths")

Batch = Mapping[str, Any]
Domains = Tensor | int


class States(NamedTuple):
    """What one forward pass left."""

    logits: Tensor
    hidden: dict[int, Tensor]  # [batch, seq, width] by layer, 0 the output of the embedding
    attention: dict[int, tuple[Tensor, Tensor]]  # queries and keys by layer, from 1
    last: Tensor | None  # [batch, seq, width]


class Watched:
    """A classifier together with what is looked at in it; attention may be of any kind."""

    def __init__(
        self,
        name: str,
        who: str,
        model: nn.Module,
        hidden: Sequence[int] = (),
        attention: Sequence[int] = (),
        last: bool = False,
    ) -> None:
        self._model = model
        # Several pairs may have a layer in common.
        self._hidden, self._attention = list(dict.fromkeys(hidden)), list(dict.fromkeys(attention))
        inner: Any = _sites.unwrapped(model)
        backbone = next(
            (path for path, m in inner.named_modules() if path and m is inner.base_model), None
        )
        if backbone is None:
            raise ValueError(
                f"{name}: {who} must be a classifier of transformers with a base_model, got "
                f"{type(inner).__name__}"
            )
        layers = _sites.layers_of(name, who, model)
        self._paths = [f"{backbone}.embeddings", *layers]
        self._last = backbone if last else None
        outputs = [self._paths[layer] for layer in self._hidden] + [backbone] * last
        self._outputs = Capture(model, outputs) if outputs else None
        queries = [self._paths[layer] for layer in self._attention]
        self._queries = Capture(model, queries, what=("q", "k")) if queries else None

    def __call__(self, inputs: Batch) -> States:
        """Runs the model."""
        captures = [c for c in (self._outputs, self._queries) if c is not None]
        with ExitStack() as stack:
            for capture in captures:
                stack.enter_context(capture)
            output = self._model(**inputs)
        logits = output["logits"] if isinstance(output, Mapping) else output.logits
        found: Mapping[str, Any] = self._outputs or {}
        asked: Mapping[str, Any] = self._queries or {}
        states = States(
            logits,
            {layer: found[self._paths[layer]] for layer in self._hidden},
            {layer: asked[self._paths[layer]] for layer in self._attention},
            None if self._last is None else found[self._last],
        )
        for capture in captures:
            capture.clear()  # the tensors live as long as their graph, not until the next batch
        return states


def split(name: str, batch: Batch) -> tuple[dict[str, Any], Tensor | None]:
    """What a model takes, and the labels."""
    inputs = {key: value for key, value in batch.items() if key not in OWN_KEYS}
    if "input_ids" not in inputs:
        raise ValueError(f"{name}: batch must have input_ids, got {', '.join(batch) or 'nothing'}")
    return inputs, batch.get("labels")


def padding_mask(batch: Batch) -> Tensor:
    """``[batch, seq]`` bool: the tokens that are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def content_mask(
    name: str, batch: Batch, special_ids: tuple[int, ...] | None, faithful_to: str
) -> Tensor:
    """The tokens that the content of a text is the mean of."""
    ids: Tensor = batch["input_ids"]
    if faithful_to == "code":
        return (torch.arange(ids.shape[1], device=ids.device) > 0).expand(ids.shape)
    special = batch.get("special_tokens_mask")
    if special is None and special_ids is None:
        raise ValueError(
            f"{name}: batch must have special_tokens_mask where special_ids is not given, got "
            f"{', '.join(batch)}"
        )
    if special is None:
        special = torch.isin(ids, torch.tensor(special_ids, device=ids.device, dtype=ids.dtype))
    return padding_mask(batch) & ~special.bool()


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """``[batch, width]``: the mean of the rows that count, 0 where none does."""
    counts = mask.sum(1, keepdim=True).clamp(min=1)
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = wide(hidden)
        # Not a product: what does not count may hold NaN.
        return hidden.masked_fill(~mask[..., None], 0.0).sum(1) / counts


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.itemsize < 4 else x


def checked_domains(name: str, domains: Domains, batch: int, count: int, lowest: int) -> Tensor:
    """``[batch]`` integers in range; on a GPU they are not looked at."""
    if isinstance(domains, int) and not isinstance(domains, bool):
        domains = torch.full((batch,), domains)
    if not isinstance(domains, Tensor) or domains.is_floating_point():
        raise TypeError(f"{name}: domains must be integers, got {_shown(domains)}")
    if domains.shape != (batch,):
        raise ValueError(f"{name}: domains must be [{batch}], got {_shown(domains)}")
    if domains.device.type == "cpu" and batch:
        low, high = int(domains.min()), int(domains.max())
        if low < lowest or high >= count:
            raise ValueError(
                f"{name}: domains must lie in [{lowest}, {count}), got {low} to {high}"
            )
    return domains.long()


def checked_scores(name: str, scores: Tensor | None, like: Tensor) -> Tensor | None:
    """``[batch]`` numbers, on the labels' device; on a GPU they are not looked at."""
    if scores is None:
        return None
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(f"{name}: scores must be floating, got {_shown(scores)}")
    if scores.shape != like.shape:
        raise ValueError(f"{name}: scores must be {list(like.shape)}, got {_shown(scores)}")
    if scores.device.type == "cpu" and not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{name}: scores must be finite, got NaN or inf")
    return scores.detach().to(like.device)


def width_of(name: str, who: str, model: nn.Module) -> int:
    """The width of a model's hidden states."""
    width = getattr(getattr(_sites.unwrapped(model), "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"{name}: {who} must tell config.hidden_size, got {type(model).__name__} without"
        )
    return width


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """New weights come from a seed, the global generator goes on as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def attention_map(queries: Tensor, keys: Tensor, heads: int, mask: Tensor) -> Tensor:
    """Attention ``[batch, heads, seq, seq]``."""
    q, k = (wide(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys))
    with torch.autocast(q.device.type, enabled=False):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1)


def of_one_dtype(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Under autocast an embedding's output may be wider than a layer's."""
    if all(len({pair[i].dtype for pair in pairs}) == 1 for i in range(2)):
        return pairs
    return [(wide(s), wide(t)) for s, t in pairs]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In the block the model is in eval mode; its modules keep the modes that they have."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _shown(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
