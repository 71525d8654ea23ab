"""A step of Meta-KD with all its terms: BERT-base teaches four layers of width 312 (TinyBERT's).

Against the same losses in eager PyTorch, which has both models return their attention maps and
hidden states and makes a term of each example from them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels
from kdkernels.bench.cases import Inputs, Run, Setting
from kdkernels.bench.steps.diito_step import NO_DROPOUT, SIZES, SMALL, adopt, draw_texts

# batch x tokens.
SHAPES = {"cpu": [(16, 128)], "cuda": [(32, 128)]}
LAYERS = {"teacher": 12, "student": 4}
STUDENT = {"hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 1200}
SMALL_STUDENT = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
CLASSES, DOMAINS = 2, 4
SPECIAL = (1, 2)  # ids of tokens that are no content
TEMPERATURE, GAMMA = 2.0, 0.5
DATA = 5  # inputs that are no parameters
ATTENTION = {"ours": "sdpa", "eager": "kd_scores"}


class Models(NamedTuple):
    """Teacher and student, and the loss with what is trained beside the student."""

    teacher: Any
    student: Any
    meta_kd: Any

    def trained(self) -> list[nn.Parameter]:
        """The first inputs of a run."""
        return [*self.student.parameters(), *self.meta_kd.parameters()]


class MetaKdStepCase:
    """See :mod:`kdkernels.bench.steps`. A shape is ``(batch, tokens)``; bfloat16 is autocast."""

    op = "relation_match"
    checked_rows = 2
    quick_shape = (2, 24)  # of models of a toy's size
    divergences = ("paper",)
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
        """What is trained; ids, mask, labels, domains and prototype scores."""
        batch, seq = shape
        small = seq < 128
        generator = torch.Generator().manual_seed(0)
        ids, mask, _ = draw_texts((SMALL if small else SIZES)["vocab_size"], batch, seq, generator)
        data = (
            ids,
            mask,
            torch.randint(CLASSES, (batch,), generator=generator),
            torch.randint(DOMAINS, (batch,), generator=generator),
            torch.rand(batch, generator=generator),
        )
        parameters = (
            p.detach().clone().to(setting.device).requires_grad_()
            for p in self._made(small).trained()
        )
        return (*parameters, *(x.to(setting.device) for x in data))

    def ours(self, setting: Setting, backend: str) -> Run:
        """``kdkernels.MetaKD``; ``reference`` is eager PyTorch."""
        if backend == "reference":
            return self._run(setting, "eager", _eager)
        return self._run(setting, "ours", partial(_ours, backend))

    def rival(self, setting: Setting, name: str) -> Run | str:
        """Eager PyTorch."""
        return self._run(setting, "eager", _eager)

    def traffic(self, mode: str) -> int:
        """No bound by memory: the time is that of the layers' products."""
        return 0

    def _made(self, small: bool) -> Models:
        """Both models and the loss, drawn once."""
        if small not in self._models:
            from transformers import BertConfig, BertForSequenceClassification

            torch.manual_seed(0)
            sizes = SMALL if small else SIZES
            of_student = {**sizes, **(SMALL_STUDENT if small else STUDENT)}
            made = {}
            for who, own in (("teacher", sizes), ("student", of_student)):
                options: dict[str, Any] = {**own, **NO_DROPOUT, "num_labels": CLASSES}
                config = BertConfig(num_hidden_layers=LAYERS[who], **options)
                made[who] = BertForSequenceClassification(config)
            student = made["student"]
            teacher = kdkernels.MetaTeacher(made["teacher"].eval(), DOMAINS, special_ids=SPECIAL)
            meta_kd = kdkernels.MetaKD(
                student, teacher, stages=1, gamma2=GAMMA, temperature=TEMPERATURE
            )
            self._models[small] = Models(teacher, student, meta_kd)
        return self._models[small]

    def _run(self, setting: Setting, who: str, step: Callable[..., Tensor]) -> Run:
        def run(*inputs: Tensor) -> Tensor:
            first, data = inputs[:-DATA], inputs[-DATA:]
            models = self._made(first[0].shape[1] != STUDENT["hidden_size"])
            own = len(list(models.student.parameters()))
            adopt(models.student, first[:own])
            adopt(models.meta_kd, first[own:])
            models.teacher.to(first[0])
            _register()
            # float64 inputs are the oracle.
            bf16 = setting.dtype == torch.bfloat16 and first[0].dtype == torch.float32
            # On a CPU fused attention's backward pass in bfloat16 is slower than plain products,
            # and its gradients err by more than eager PyTorch's may.
            plain = bf16 and setting.device == "cpu" and who == "ours"
            for model in (models.student, models.teacher.model):
                model.set_attn_implementation("eager" if plain else ATTENTION[who])
            with torch.autocast(setting.device, dtype=torch.bfloat16, enabled=bf16):
                return step(models, *data)

        return run


def _ours(
    backend: str,
    models: Models,
    ids: Tensor,
    mask: Tensor,
    labels: Tensor,
    domains: Tensor,
    scores: Tensor,
) -> Tensor:
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with kdkernels.use_backend(backend):
        loss: Tensor = models.meta_kd(batch, domains, scores)
        return loss


def _eager(
    models: Models, ids: Tensor, mask: Tensor, labels: Tensor, domains: Tensor, scores: Tensor
) -> Tensor:
    teacher, student, meta_kd = models
    batch = {"input_ids": ids, "attention_mask": mask}
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        taught = teacher.model(**batch, **options)
    learnt = student(**batch, **options)
    right = taught.logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    weights = (1 + scores) / (((1 - right) ** 2).exp() + 1)
    project, step = meta_kd.projections[0], LAYERS["teacher"] // LAYERS["student"]
    count = mask.sum(1)
    terms = []
    for layer, states in enumerate(learnt.hidden_states):
        error = (project(states) - taught.hidden_states[step * layer]) ** 2
        terms.append((error.mean(-1) * mask).sum(1) / count)
    pairs = mask[:, None, :, None] * mask[:, None, None, :]
    for layer, maps in enumerate(learnt.attentions):
        error = (maps - taught.attentions[step * (layer + 1) - 1]) ** 2
        terms.append((error * pairs).sum((1, 2, 3)) / (error.shape[1] * count**2))
    log_p, log_q = (F.log_softmax(x.logits / TEMPERATURE, -1) for x in (taught, learnt))
    terms.append(TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1))
    content = mask * ~torch.isin(ids, ids.new_tensor(SPECIAL))

    def known(states: Tensor, knowledge: Any) -> Tensor:
        mean = (states * content[..., None]).sum(1) / content.sum(1, keepdim=True)
        table = knowledge.embedding(domains)
        return torch.tanh(knowledge.linear(table + mean))

    with torch.no_grad():
        target = known(taught.hidden_states[-1], teacher.knowledge)
    own = meta_kd.transfer(known(learnt.hidden_states[-1], meta_kd.knowledge))
    terms.append(GAMMA * ((own - target) ** 2).mean(-1))
    return (weights * torch.stack([x.to(weights.dtype) for x in terms]).sum(0)).mean()


def _scored(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The library's eager attention; it returns scores as TinyBERT's code does, not weights."""
    scores = query @ key.transpose(2, 3) * scaling
    masked = scores if attention_mask is None else scores + attention_mask
    context = masked.softmax(-1).to(value.dtype) @ value
    return context.transpose(1, 2).contiguous(), scores


@cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(ATTENTION["eager"], _scored)
    AttentionMaskInterface.register(ATTENTION["eager"], eager_mask)


CASE = MetaKdStepCase()
