"""A step of causal distillation of a masked language model: BERT-base to six layers of it.

Against the scheme of the released code in eager PyTorch: three whole passes of either model, losses
on what ``masked_select`` copies of full logits, states of the source from the input of a layer. Its
swaps are one indexing a layer here, where the release makes one for each head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels
from kdkernels.bench.cases import Inputs, Run, Setting

# batch x tokens.
SHAPES = {"cpu": [(8, 128)], "cuda": [(32, 128)]}
LAYERS = {"teacher": 12, "student": 6}
# The size of BERT-base.
SIZES = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
SMALL = {
    "vocab_size": 211,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MASKED = 0.15
SHARE = 0.3
# DIITO's own: cross-entropy, masked language model, cosine, counterfactual cross-entropy.
WEIGHT = 0.25


@dataclass(frozen=True)
class Models:
    """Both models; the student's parameters are the first inputs of a run."""

    teacher: Any
    student: Any

    @property
    def head(self) -> int:
        """How many inputs are parameters."""
        return len(list(self.student.parameters()))


def draw_texts(vocab: int, batch: int, seq: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Ids of texts, their mask and their lengths, which are more than half of ``seq``."""
    lengths = torch.randint(seq // 2, (batch,), generator=generator) + seq // 2 + 1
    mask = (torch.arange(seq) < lengths[:, None]).long()
    return torch.randint(vocab, (batch, seq), generator=generator), mask, lengths


class DiitoStepCase:
    """See :mod:`kdkernels.bench.steps`. A shape is ``(batch, tokens)``; bfloat16 is autocast."""

    op = "interchange"
    checked_rows = 2
    quick_shape = (2, 24)  # of models of a toy's size
    divergences = ("consecutive",)
    default_divergences = divergences
    modes = ("full",)
    rivals = ("eager",)
    unchecked: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._models: dict[bool, Models] = {}

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """The student's parameters, ids, mask and labels of the base, ids of the source, spans."""
        batch, seq = shape
        sizes = SMALL if seq < 128 else SIZES
        generator = torch.Generator().manual_seed(0)
        vocab = sizes["vocab_size"]
        ids, mask, lengths = draw_texts(vocab, batch, seq, generator)
        source, source_mask, source_lengths = draw_texts(vocab, batch, seq, generator)
        chosen = (torch.rand(batch, seq, generator=generator) < MASKED) & mask.bool()
        chosen[:, 0] = True
        labels = torch.where(chosen, ids, -100)
        spans = kdkernels.sample_spans(lengths, source_lengths, share=SHARE, generator=generator)
        index = torch.stack(spans[:3])
        data = (ids, mask, labels, source, source_mask, index)
        models = self._made(sizes)
        # The softmax does not see the bias of keys: its gradient is rounding and nothing else.
        parameters = (
            p.detach().clone().to(setting.device).requires_grad_(not name.endswith("key.bias"))
            for name, p in models.student.named_parameters()
        )
        return (
            *parameters,
            *(x.to(setting.device) for x in data),
        )

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.DIITO``; ``reference`` is the eager scheme."""
        if backend == "reference":
            return self._run(setting, _released)
        return self._run(setting, partial(_ours, backend))

    def rival(self, setting: Setting, name: str) -> Run | str:
        """The released scheme."""
        return self._run(setting, _released)

    def traffic(self, mode: str) -> int:
        """No bound by memory: the time is that of the layers' products."""
        return 0

    def _made(self, sizes: dict[str, int]) -> Models:
        """Both models, drawn once."""
        key = sizes is SMALL
        if key not in self._models:
            from transformers import BertConfig, BertForMaskedLM

            torch.manual_seed(0)
            options: dict[str, Any] = {**sizes, **NO_DROPOUT}
            made = {
                who: BertForMaskedLM(BertConfig(num_hidden_layers=depth, **options))
                for who, depth in LAYERS.items()
            }
            self._models[key] = Models(made["teacher"].eval(), made["student"])
        return self._models[key]

    def _run(self, setting: Setting, step: Callable[..., Tensor]) -> Run:
        def run(*inputs: Tensor) -> Tensor:
            wide = inputs[0].shape[1] == SIZES["hidden_size"]
            models = self._made(SIZES if wide else SMALL)
            first, data = inputs[: models.head], inputs[models.head :]
            adopt(models.student, first)
            models.teacher.to(first[0])
            # float64 inputs are the oracle.
            bf16 = setting.dtype == torch.bfloat16 and first[0].dtype == torch.float32
            with torch.autocast(setting.device, dtype=torch.bfloat16, enabled=bf16):
                return step(models, *data)

        return run


def adopt(model: nn.Module, tensors: Inputs) -> None:
    """Makes tensors the parameters of a model, shared ones as well."""
    by_old = dict(zip(model.parameters(), tensors, strict=True))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = by_old[parameter]  # type: ignore[assignment]


def _ours(
    backend: str,
    models: Models,
    ids: Tensor,
    mask: Tensor,
    labels: Tensor,
    source: Tensor,
    source_mask: Tensor,
    index: Tensor,
) -> Tensor:
    with kdkernels.use_backend(backend):
        diito = kdkernels.DIITO(models.student, models.teacher, index_mode="release")
        base = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        other = {"input_ids": source, "attention_mask": source_mask}
        loss: Tensor = diito(base, other, where=kdkernels.Spans(*index.unbind()))
        return loss


def _released(
    models: Models,
    ids: Tensor,
    mask: Tensor,
    labels: Tensor,
    source: Tensor,
    source_mask: Tensor,
    index: Tensor,
) -> Tensor:
    start, source_start, length = (x[:, None] for x in index.unbind())
    place = torch.arange(ids.shape[1], device=ids.device)
    to = (place >= start) & (place < start + length)
    of = (place >= source_start) & (place < source_start + length)

    def runs(model: Any) -> tuple[Any, Any]:
        layers = model.bert.encoder.layer
        site = layers[len(layers) // 2]
        base = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        taken: list[Tensor] = []
        hook = site.register_forward_hook(lambda module, args, output: taken.append(args[0]))
        model(input_ids=source, attention_mask=source_mask)
        hook.remove()

        def swap(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[to] = taken[0][of]
            return changed

        hook = site.register_forward_hook(swap)
        counterfactual = model(input_ids=ids, attention_mask=mask)
        hook.remove()
        return base, counterfactual

    with torch.no_grad():
        taught, taught_after = runs(models.teacher)
    learnt, learnt_after = runs(models.student)
    vocab = learnt.logits.shape[-1]
    cross_entropy = F.cross_entropy(learnt.logits.view(-1, vocab), labels.view(-1))
    terms = [
        _divergence(learnt.logits, taught.logits, mask),
        cross_entropy,
        _cosine(learnt.hidden_states[-1], taught.hidden_states[-1], mask),
        _divergence(learnt_after.logits, taught_after.logits, mask),
    ]
    return WEIGHT * torch.stack([term.to(terms[0].dtype) for term in terms]).sum()


def _divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    chosen = mask.bool()[:, :, None].expand_as(student)
    vocab = student.shape[-1]
    s = torch.masked_select(student, chosen).view(-1, vocab)
    t = torch.masked_select(teacher, chosen).view(-1, vocab)
    pointwise = F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean")
    return pointwise * 4


def _cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    chosen = mask.bool()[:, :, None].expand_as(student)
    width = student.shape[-1]
    s = torch.masked_select(student, chosen).view(-1, width)
    t = torch.masked_select(teacher, chosen).view(-1, width)
    return F.cosine_embedding_loss(s, t, s.new_ones(len(s)))


CASE = DiitoStepCase()
