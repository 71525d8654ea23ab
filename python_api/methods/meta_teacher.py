"""The meta-teacher of Meta-KD: one classifier of all domains, and what it knows of each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.api import _sites
from kdkernels.api._files import write_file
from kdkernels.api._spec import choice, integer, number
from kdkernels.api.functional import kd_loss
from kdkernels.api.methods import meta_states as states
from kdkernels.api.methods.meta_states import FAITHFUL_TO, Batch, Watched

__all__ = ["MetaTeacher", "MetaTeacherParts"]

NAME = "MetaTeacher"
HEAD = "domain_head.safetensors"


class MetaTeacherParts(NamedTuple):
    """The loss of :class:`MetaTeacher` and its terms; all but ``loss`` are detached."""

    loss: Tensor
    ce: Tensor
    corruption: Tensor  # without gamma1


class DomainKnowledge(nn.Module):
    r"""What a model knows of a domain: ``tanh(W (E[domain] + content) + b)``.

    Args:
        domains: ``K``, rows of the table ``E``.
        width: of the model's hidden states, and of what comes out.

    Note:
        A domain of -1 is one that ``E`` has no row for: the mean of the rows takes its place.
    """

    def __init__(self, domains: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(domains, width)
        self.linear = nn.Linear(width, width)
        # As BERT's; the rows must not outweigh the content that they are added to.
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, content: Tensor, domains: Tensor, squash: bool = True) -> Tensor:
        """Args: ``[batch, width]``, ``[batch]`` integers, whether the tanh is applied."""
        table = self.embedding.weight
        table = torch.cat([table, table.mean(0, keepdim=True)])
        with torch.autocast(content.device.type, enabled=False):
            known: Tensor = self.linear(table[domains] + content.to(table.dtype))
        return known.tanh() if squash else known


class MetaTeacher(nn.Module):
    r"""A classifier that is trained on all domains at once, to teach the students of each.

    With ``t`` how typical an example is (:func:`kdkernels.prototype_scores`), ``content`` the
    mean of its last hidden states and ``known = tanh(W (E[domain] + content) + b)``, the loss of
    a batch is::

        mean_i t_i (CE(logits_i, label_i) + gamma1 CE(W_o known_i + b_o, domain_p(i)))

    with one random permutation ``p`` of the batch's domains. A corrupted domain cannot be told
    from the content, so the content is led to say nothing of it: there is no reversed gradient.
    ``known`` is what students learn beside (:class:`kdkernels.MetaKD`).

    Args:
        model: a sequence classifier of transformers on an encoder; its head is used as it is.
        domains: ``K``, at least 2.
        special_ids: ids of tokens that are no content, e.g. of CLS and SEP; ``None``: batches have
            a ``special_tokens_mask``, as tokenizers return it.
        gamma1: weight of the corruption.
        dropout: of ``known`` before the domain classifier.
        faithful_to: ``paper``: content is the mean over tokens that are neither padding nor
            special. ``code``: over positions 1 to the last, padding and SEP too, as released; and
            the corruption counts in batches of one domain.
        seed: of the new weights and of the permutations.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: values out of their ranges; a model whose layers are not found; batches that
            do not fit.

    Note:
        In a batch of one domain no permutation changes anything, and the term would teach the
        domain instead of hiding it: it is left out of such a batch, with one warning where
        ``domains`` is on the CPU (elsewhere a look at it would synchronise). Shuffle the loader
        over the domains.

        The released code has a ReLU between the pooler and the classifier; here the head is the
        model's own. ``state_dict`` holds the draws' state too.

    References:
        Pan et al., Meta-KD: A Meta Knowledge Distillation Framework for Language Model Compression
        across Domains, ACL 2021, arXiv 2012.01266.

    Example:
        >>> import kdkernels, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=32)
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes))
        >>> teacher = kdkernels.MetaTeacher(model, domains=3, special_ids=(1, 2))
        >>> batch = {
        ...     "input_ids": torch.randint(3, 50, (4, 9)),
        ...     "attention_mask": torch.ones(4, 9, dtype=torch.int64),
        ...     "labels": torch.tensor([0, 1, 1, 0]),
        ... }
        >>> loss = teacher(batch, domains=torch.tensor([0, 1, 2, 1]), scores=torch.rand(4))
        >>> loss.backward()  # an optimizer takes teacher.parameters()
    """

    def __init__(
        self,
        model: nn.Module,
        domains: int,
        *,
        special_ids: Sequence[int] | None = None,
        gamma1: float = 0.5,
        dropout: float = 0.1,
        faithful_to: str = "paper",
        seed: int = 0,
    ) -> None:
        super().__init__()
        _sites.check_model(NAME, model)
        integer(NAME, "domains", domains, 2)
        number(NAME, "gamma1", gamma1, 0.0, math.inf)
        number(NAME, "dropout", dropout, 0.0, 1.0)
        choice(NAME, "faithful_to", faithful_to, FAITHFUL_TO)
        self.domains, self.gamma1, self.faithful_to = domains, gamma1, faithful_to
        self.model = model
        self.special_ids = _checked_ids(special_ids)
        width = states.width_of(NAME, "model", model)
        with states.drawn_from(seed):
            self.knowledge = DomainKnowledge(domains, width)
            self.corruption = nn.Linear(width, domains)
        self.dropout = nn.Dropout(dropout)
        like = next(model.parameters())
        for part in (self.knowledge, self.corruption):
            part.to(like.device, like.dtype)
        self._watched = Watched(NAME, "model", model, last=True)
        self._generator = torch.Generator().manual_seed(seed)
        self._warned = False

    def forward(
        self,
        batch: Batch,
        domains: Tensor,
        scores: Tensor | None = None,
        *,
        return_parts: bool = False,
    ) -> Any:  # a Tensor, or MetaTeacherParts
        """The loss of a batch.

        Args:
            batch: what the model takes (``input_ids``, ``attention_mask``, ...) and ``labels``,
                ``[batch]``; perhaps ``special_tokens_mask``, ``[batch, seq]``.
            domains: ``[batch]`` integers below ``K``, best on the CPU.
            scores: ``[batch]``, ``t``; ``None``: 1 for each.
            return_parts: return :class:`MetaTeacherParts`.
        """
        inputs, labels = states.split(NAME, batch)
        if labels is None:
            raise ValueError(f"{NAME}: batch must have labels, got {', '.join(batch)}")
        domains = states.checked_domains(NAME, domains, len(labels), self.domains, lowest=0)
        scores = states.checked_scores(NAME, scores, labels)
        corrupted = self._corrupted(domains).to(labels.device)
        found = self._watched(inputs)
        assert found.last is not None
        # 0 in a batch of one domain; not looked at on the host.
        mixed = (domains != domains[0]).any() if self.faithful_to == "paper" else torch.tensor(True)
        domains = domains.to(labels.device)
        content = states.masked_mean(found.last, self.content_mask(batch))
        known = self.dropout(self.knowledge(content, domains))
        with torch.autocast(content.device.type, enabled=False):
            guessed = self.corruption(known)
        weighting: dict[str, Any] = {"row_weights": scores, "reduction": "batchmean"}
        ce = kd_loss(states.wide(found.logits), None, labels, **weighting)
        corruption = kd_loss(guessed, None, corrupted, **weighting)
        corruption = corruption * mixed.to(corruption.device)
        loss = ce + self.gamma1 * corruption
        if not return_parts:
            return loss
        return MetaTeacherParts(loss, ce.detach(), corruption.detach())

    def content_mask(self, batch: Batch) -> Tensor:
        """``[batch, seq]`` bool: the tokens that the content of a text is the mean of."""
        return states.content_mask(NAME, batch, self.special_ids, self.faithful_to)

    def get_extra_state(self) -> Tensor:
        """What the draws of a resumed training go on from."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the state of the draws."""
        self._generator.set_state(state.cpu())

    def save_head(self, folder: Path | str) -> None:
        """Writes all but the model, which ``model.save_pretrained`` writes, into a folder."""
        from safetensors.torch import save_file

        state = {k: v.contiguous() for k, v in self.state_dict().items() if k[:6] != "model."}
        write_file(Path(folder) / HEAD, lambda path: save_file(state, path))

    def load_head(self, folder: Path | str) -> None:
        """Takes over what :meth:`save_head` wrote.

        Raises:
            ValueError: there is none, or one of other sizes: a teacher whose head is not the
                trained one teaches noise.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(Path(folder) / HEAD)
            own = {f"model.{key}": value for key, value in self.model.state_dict().items()}
            self.load_state_dict({**own, **state})
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{NAME}: folder must hold a {HEAD} of {self.domains} domains, got {folder}: "
                f"{error}"
            ) from error

    def _corrupted(self, domains: Tensor) -> Tensor:
        """The batch's domains in a random order."""
        order = torch.randperm(len(domains), generator=self._generator)
        alone = domains.device.type == "cpu" and bool((domains == domains[0]).all())
        if alone and len(domains) > 1 and not self._warned:
            self._warned = True
            ignored = "is left out" if self.faithful_to == "paper" else "teaches the domain"
            warnings.warn(
                f"{NAME}: domains must be several in a batch, got one, where the corruption "
                f"{ignored}; shuffle the examples of all domains (said once)",
                stacklevel=4,
            )
        return domains[order.to(domains.device)]


def _checked_ids(ids: Sequence[int] | None) -> tuple[int, ...] | None:
    if ids is None:
        return None
    for each in ids:
        integer(NAME, "special_ids", each, 0)
    return tuple(ids)
