"""How typical of its own domain an example is, and of the others: prototype scores of Meta-KD."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.api import _sites
from kdkernels.api._spec import choice, integer, number
from kdkernels.api.domain_prototypes import domain_prototypes

__all__ = ["instance_scores", "prototype_scores"]

FORMS = ("paper", "code", "pooled")
FAITHFUL_TO = ("paper", "code")
# Keys of a batch that are not the model's.
OWN_KEYS = ("labels", "domains", "special_tokens_mask", "lengths")
# What a config may call the tokens that are no content; the first two begin a text.
SPECIAL = ("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id", "pad_token_id")
BLOCK = 2048  # examples that are read back at a time: 6 MB of width 768


def prototype_scores(
    means: Tensor,
    prototypes: Tensor,
    domains: Tensor,
    labels: Tensor | None = None,
    *,
    form: str = "paper",
    alpha: float = 0.5,
) -> Tensor:
    r"""Scores of examples by the cosines of their embeddings with the domains' prototypes.

    With ``h_i`` the embedding, ``k`` the domain and ``y`` the class of example ``i``, ``K`` domains
    and ``P`` the prototypes, means of embeddings of a domain or of a domain and a class::

        paper:   t_i = alpha cos(P[k, y], h_i) + zeta sum over j != k of cos(P[j, y], h_i),
                 zeta = (1 - alpha) / (K - 1)
        code:    t_i = 1/2 cos(P[k], h_i) + 1/2 cos(mean over j != k of P[j], h_i)
        pooled:  t_i = 1/2 cos(P[k, y], h_i) + 1/2 cos(mean over j != k of P[j, y], h_i)

    ``code`` is what Meta-KD's released code computes, ``pooled`` its sibling's, of the encoder's
    pooled output. All are in [-1, 1].

    Args:
        means: ``[examples, hidden]``, ``h``, e.g. of :func:`kdkernels.domain_prototypes`.
        prototypes: ``[domains, classes, hidden]``, for ``code`` ``[domains, hidden]``:
            ``sums / counts[..., None].clamp(min=1)``. Zeros stand for a group without examples.
        domains: ``[examples]`` integers in ``[0, domains)``.
        labels: ``[examples]`` integers in ``[0, classes)``; ``code`` needs none.
        form: ``paper``, ``code`` or ``pooled``.
        alpha: of ``paper``: the share of the example's own domain, in [0, 1].

    Returns:
        ``[examples]``, float64 for float64, else float32. No gradient.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument.
        TypeError: dtypes that do not fit.

    Note:
        Groups without examples are left out: the others share their weight. Where only one
        prototype is left, above all with one domain, its cosine has the whole weight (the released
        code gives NaN). An embedding of zeros, of a text without content, has the score 0.

    References:
        Pan et al., Meta-KD: A Meta Knowledge Distillation Framework for Language Model Compression
        across Domains, arXiv 2012.01266.

    Example:
        >>> import kdkernels, torch
        >>> prototypes = torch.eye(2)[:, None]  # two domains of one class
        >>> means, domains = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
        >>> kdkernels.prototype_scores(means, prototypes, domains, torch.tensor([0, 0]), alpha=0.75)
        tensor([0.7500, 0.2500])
    """
    name = "prototype_scores"
    choice(name, "form", form, FORMS)
    number(name, "alpha", alpha, 0.0, 1.0)
    _check(name, means, prototypes, domains, labels, form)
    wide = torch.float64 if means.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        table = prototypes.to(wide)
        if form == "code":
            table, labels = table[:, None], torch.zeros_like(domains)
        assert labels is not None
        return _scores(means.to(wide), table, domains.long(), labels.long(), form, float(alpha))


def instance_scores(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    n_domains: int,
    n_classes: int = 1,
    form: str = "paper",
    alpha: float = 0.5,
    special_ids: Sequence[int] | None = None,
    faithful_to: str = "paper",
    directory: Path | str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Prototype scores of a whole data set, in the memory of a batch.

    The encoder runs once over the loader. Each text's embedding is the mean of its last hidden
    states, added to its domain's prototype and put aside in a temporary file; when all prototypes
    are known, the file is read back in blocks for :func:`kdkernels.prototype_scores`.

    Args:
        model: an encoder of transformers, not fine-tuned; of a model with a head the encoder runs.
            In eval mode and without gradients, whatever its mode, which it keeps.
        loader: batches, mappings of ``input_ids`` and whatever else the model takes, ``[batch,
            seq]``; ``domains`` and, unless the form is ``code``, ``labels``, ``[batch]`` integers;
            perhaps ``special_tokens_mask``. They are moved to the model's device.
        n_domains: number of domains, whose numbers are below it.
        n_classes: number of classes, whose labels are below it; ``code`` has none.
        form: see :func:`kdkernels.prototype_scores`. ``pooled`` takes the model's pooled output in
            place of the mean.
        alpha: see there.
        special_ids: ids of tokens that are no content, where batches have no
            ``special_tokens_mask``; ``None``: those that the model's config names (``cls``,
            ``bos``, ``sep``, ``eos``, ``pad``).
        faithful_to: ``paper``: the mean is over content: no padding, no special tokens. ``code``:
            over all positions but the first, padding too, as released: scores then depend on how
            far texts are padded.
        directory: of the temporary file, 4 bytes for each example and hidden unit (307 MB for
            100,000 of width 768); ``None``: the system's.
        backend: of :func:`kdkernels.domain_prototypes`.

    Returns:
        ``[examples]`` float32 on the CPU, in the order of the loader.

    Raises:
        ValueError: batches without what is needed, numbers out of range, no batch, no special ids
            to be found.
        TypeError: a model whose output has no last hidden state (pooled output).

    References:
        Pan et al., Meta-KD: A Meta Knowledge Distillation Framework for Language Model Compression
        across Domains, arXiv 2012.01266.

    Example:
        >>> import kdkernels, torch
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=32)
        >>> model = BertModel(BertConfig(num_hidden_layers=2, **sizes))
        >>> batch = {
        ...     "input_ids": torch.randint(3, 50, (4, 9)),
        ...     "attention_mask": torch.ones(4, 9, dtype=torch.int64),
        ...     "domains": torch.tensor([0, 1, 0, 1]),
        ...     "labels": torch.tensor([0, 1, 1, 0]),
        ... }
        >>> scores = kdkernels.instance_scores(
        ...     model, [batch, batch], n_domains=2, n_classes=2, special_ids=(0, 1, 2)
        ... )
        >>> scores.shape
        torch.Size([8])
    """
    name = "instance_scores"
    choice(name, "form", form, FORMS)
    choice(name, "faithful_to", faithful_to, FAITHFUL_TO)
    number(name, "alpha", alpha, 0.0, 1.0)
    integer(name, "n_domains", n_domains, 1)
    integer(name, "n_classes", n_classes, 1)
    classes = 1 if form == "code" else n_classes
    run = _Pass(model, n_domains, classes, form, faithful_to, special_ids, backend)
    with tempfile.TemporaryFile(dir=directory) as spool:
        with torch.no_grad(), _evaluating(run.encoder):
            for batch in loader:
                means = run.add(batch).float().cpu().contiguous()
                spool.write(means.numpy().data)
        if not run.groups:
            raise ValueError(f"{name}: loader must have at least one batch, got none")
        groups = torch.frombuffer(run.groups, dtype=torch.int32)
        table = run.prototypes()
        width = table.shape[-1]
        spool.seek(0)
        scores = torch.empty(len(groups))
        for begin in range(0, len(groups), BLOCK):
            group = groups[begin : begin + BLOCK].long()
            means = _read(spool, len(group), width)
            scores[begin : begin + BLOCK] = _scores(
                means, table, group // classes, group % classes, form, float(alpha)
            )
    return scores


# ---- the scores ----------------------------------------------------------------------------------


def _scores(
    means: Tensor,  # [examples, hidden]
    table: Tensor,  # [domains, classes, hidden]
    domains: Tensor,
    labels: Tensor,
    form: str,
    alpha: float,
) -> Tensor:
    count = len(table)
    there = (table != 0).any(-1).t()[labels]  # [examples, domains]
    own = F.one_hot(domains, count).bool()
    others = there & ~own
    unit = F.normalize(means, dim=-1)
    cosines = _of_class(unit, table, labels)
    first = cosines.masked_fill(~own, 0.0).sum(1)
    if form == "paper":
        second = cosines.masked_fill(~others, 0.0).sum(1) / others.sum(1).clamp(min=1)
    else:
        # The mean over the others of each domain; what is not there is zeros.
        present = (table != 0).any(-1, keepdim=True).to(table.dtype)
        apart = 1.0 - torch.eye(count, dtype=table.dtype, device=table.device)
        number_of = torch.einsum("jk,kcn->jcn", apart, present).clamp(min=1.0)
        means_of_others = torch.einsum("jk,kch->jch", apart, table) / number_of
        second = _of_class(unit, means_of_others, labels).gather(1, domains[:, None])[:, 0]
        alpha = 0.5
    has_first, has_second = (there & own).any(1), others.any(1)
    share = torch.full_like(first, alpha)
    share = torch.where(has_second, torch.where(has_first, share, 0.0), 1.0)
    return share * first + (1.0 - share) * second


def _of_class(unit: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    """Cosines ``[examples, domains]`` with the vectors of each example's class."""
    domains, classes, width = table.shape
    every = unit @ F.normalize(table, dim=-1).reshape(-1, width).t()
    index = labels[:, None, None].expand(-1, domains, 1)
    return every.view(-1, domains, classes).gather(2, index)[..., 0]


def _check(
    name: str,
    means: Tensor,
    prototypes: Tensor,
    domains: Tensor,
    labels: Tensor | None,
    form: str,
) -> None:
    sizes = "[domains, hidden]" if form == "code" else "[domains, classes, hidden]"
    for key, x, wanted, dims in (
        ("means", means, "[examples, hidden]", 2),
        ("prototypes", prototypes, sizes, sizes.count(",") + 1),
    ):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: {key} must be a floating tensor, got {_shown(x)}")
        if x.dim() != dims or x.shape[-1] != means.shape[-1] or 0 in x.shape[1:]:
            raise ValueError(f"{name}: {key} must be {wanted}, got {_shown(x)}")
    if prototypes.shape[0] == 0:
        raise ValueError(f"{name}: prototypes must be {sizes}, got {_shown(prototypes)}")
    if prototypes.device != means.device:
        raise ValueError(f"{name}: prototypes must be on {means.device}, got {prototypes.device}")
    _numbers(name, "domains", domains, means, prototypes.shape[0])
    if form != "code":
        _numbers(name, "labels", labels, means, prototypes.shape[1])


def _numbers(name: str, key: str, x: Any, means: Tensor, below: int) -> None:
    """``[examples]`` integers in range; they are looked at on any device: scores are made once."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        raise TypeError(f"{name}: {key} must be integers, got {_shown(x)}")
    if x.shape != means.shape[:1]:
        raise ValueError(f"{name}: {key} must be [{len(means)}], got {_shown(x)}")
    if x.device != means.device:
        raise ValueError(f"{name}: {key} must be on {means.device}, got {x.device}")
    if len(x) and not 0 <= int(x.min()) <= int(x.max()) < below:
        raise ValueError(
            f"{name}: {key} must lie in [0, {below}), got {int(x.min())} to {int(x.max())}"
        )


def _shown(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


# ---- a data set ----------------------------------------------------------------------------------


class _Pass:
    """The encoder's run over the batches: embeddings come out, prototypes stay."""

    name = "instance_scores"

    def __init__(
        self,
        model: nn.Module,
        n_domains: int,
        n_classes: int,
        form: str,
        faithful_to: str,
        special_ids: Sequence[int] | None,
        backend: str | None,
    ) -> None:
        _sites.check_model(self.name, model)
        inner = _sites.unwrapped(model)
        base = getattr(inner, "base_model", inner)
        self.encoder: nn.Module = base if isinstance(base, nn.Module) else inner
        self._device = next(self.encoder.parameters()).device
        self._sizes = n_domains, n_classes
        self._form, self._faithful_to, self._backend = form, faithful_to, backend
        self._special_ids = None if special_ids is None else tuple(special_ids)
        self._sums: tuple[Tensor, Tensor] | None = None
        # domain * classes + label of each example. In one buffer: a tensor of each batch would keep
        # the memory in pieces that the next batch's states do not fit into.
        self.groups = array("i")

    def add(self, batch: Mapping[str, Any]) -> Tensor:
        """The embeddings of a batch, ``[batch, hidden]``, which are in the prototypes now."""
        groups = self._groups(batch)
        on_device = {
            k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in batch.items()
        }
        output = self.encoder(**{k: v for k, v in on_device.items() if k not in OWN_KEYS})
        if self._form == "pooled":
            hidden, mask = self._output(output, "pooler_output")[:, None], None
        elif self._faithful_to == "code":
            hidden, mask = self._output(output, "last_hidden_state")[:, 1:], None
        else:
            hidden, mask = self._output(output, "last_hidden_state"), self._content(on_device)
        means, *sums = domain_prototypes(
            hidden,
            groups.to(self._device),
            self._sizes[0] * self._sizes[1],
            mask=mask,
            accumulate_into=self._sums,
            backend=self._backend,
        )
        self._sums = sums[0], sums[1]
        self.groups.frombytes(groups.int().numpy().tobytes())
        return means

    def prototypes(self) -> Tensor:
        """``[domains, classes, hidden]`` float32, on the CPU."""
        assert self._sums is not None
        sums, counts = (x.cpu() for x in self._sums)
        return (sums / counts[:, None].clamp(min=1)).float().unflatten(0, self._sizes)

    def _groups(self, batch: Mapping[str, Any]) -> Tensor:
        keys = (
            ("input_ids", "domains") if self._form == "code" else ("input_ids", "domains", "labels")
        )
        for key in keys:
            if not isinstance(batch.get(key), Tensor):
                raise ValueError(
                    f"{self.name}: batch must have a tensor {key}, got {', '.join(batch) or 'none'}"
                )
        ids = batch["input_ids"].cpu()
        n_domains, n_classes = self._sizes
        domains = batch["domains"].cpu()
        _numbers(self.name, "domains", domains, ids, n_domains)
        if self._form == "code":
            return domains.long()
        labels = batch["labels"].cpu()
        _numbers(self.name, "labels", labels, ids, n_classes)
        return domains.long() * n_classes + labels.long()

    def _output(self, output: Any, key: str) -> Tensor:
        found = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"{self.name}: model must return a {key}, got {type(output).__name__} without"
            )
        return found

    def _content(self, batch: Mapping[str, Any]) -> Tensor:
        """``[batch, seq]`` bool: no padding, no special token."""
        ids: Tensor = batch["input_ids"]
        special = batch.get("special_tokens_mask")
        if special is None:
            if self._special_ids is None:
                self._special_ids = self._from_config()
            special = torch.isin(ids, ids.new_tensor(self._special_ids))
        content = special == 0
        padding = batch.get("attention_mask")
        return content if padding is None else content & (padding != 0)

    def _from_config(self) -> tuple[int, ...]:
        config = getattr(self.encoder, "config", None)
        found = [getattr(config, key, None) for key in SPECIAL]
        if found[0] is None and found[1] is None:
            raise ValueError(
                f"{self.name}: special_ids must be given where batches have no special_tokens_mask "
                "and the model's config names no token that begins a text, got None"
            )
        return tuple(x for x in found if isinstance(x, int))


def _read(spool: BinaryIO, examples: int, width: int) -> Tensor:
    # A tensor of its own, not a mapped file, whose pages would count as the process's memory.
    means = torch.empty(examples, width)
    if spool.readinto(means.numpy().data) != means.nbytes:  # type: ignore[attr-defined]
        raise RuntimeError("instance_scores: temporary file must hold what was written, got less")
    return means


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In the block the model is in eval mode; its modules keep the modes that they have."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
