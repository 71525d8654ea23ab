"""Scores of a batch for sparse teachers: BERT-base, and a student of four of its layers.

Against the scheme of the released code in eager PyTorch: gates multiplied into the model, whose
weights require gradients as well, and a backward pass for either loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels
from kdkernels.bench.cases import Inputs, Run, Setting
from kdkernels.bench.steps.diito_step import NO_DROPOUT, SIZES, SMALL, adopt, draw_texts

# batch x tokens.
SHAPES = {"cpu": [(8, 128)], "cuda": [(32, 128)]}
LAYERS = {"teacher": 12, "student": 4}
# With two classes one pass back gives both gradients.
CLASSES = {"three_classes": 3, "two_classes": 2}
TEMPERATURE = 2.0


class StarkScorePassCase:
    """See :mod:`kdkernels.bench.steps`. A shape is ``(batch, tokens)``; bfloat16 is autocast.

    Scores have no gradient: what is measured is called ``forward`` and has backward passes in it.
    """

    op = "gate_scores"
    checked_rows = 2
    quick_shape = (2, 24)  # of models of a toy's size
    divergences = tuple(CLASSES)
    default_divergences = divergences
    modes = ("forward",)
    rivals = ("eager",)
    unchecked: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._models: dict[tuple[bool, str], tuple[Any, Any]] = {}

    def shapes(self, device: str) -> list[tuple[int, int]]:
        """Default shapes."""
        return SHAPES[device]

    def inputs(self, setting: Setting, shape: tuple[int, int]) -> Inputs:
        """The teacher's parameters; ids, mask and labels."""
        batch, seq = shape
        small = seq < 128
        generator = torch.Generator().manual_seed(0)
        vocab = (SMALL if small else SIZES)["vocab_size"]
        ids, mask, _ = draw_texts(vocab, batch, seq, generator)
        data = (
            ids,
            mask,
            torch.randint(CLASSES[setting.divergence], (batch,), generator=generator),
        )
        teacher, _ = self._made(small, setting.divergence)
        parameters = (p.detach().clone().to(setting.device) for p in teacher.parameters())
        return (*parameters, *(x.to(setting.device) for x in data))

    def ours(self, setting: Setting, backend: str) -> Run:
        """``SparseTeacher.score``; ``reference`` is the eager scheme."""
        if backend == "reference":
            return self._run(setting, _released)
        return self._run(setting, partial(_ours, backend))

    def rival(self, setting: Setting, name: str) -> Run | str:
        """The released scheme."""
        return self._run(setting, _released)

    def traffic(self, mode: str) -> int:
        """No bound by memory: the time is that of the layers' products."""
        return 0

    def _made(self, small: bool, classes: str) -> tuple[Any, Any]:
        """Both models, drawn once."""
        if (small, classes) not in self._models:
            from transformers import BertConfig, BertForSequenceClassification

            torch.manual_seed(0)
            options: dict[str, Any] = {**(SMALL if small else SIZES), **NO_DROPOUT}
            options["num_labels"] = CLASSES[classes]
            teacher, student = (
                BertForSequenceClassification(BertConfig(num_hidden_layers=n, **options)).eval()
                for n in LAYERS.values()
            )
            self._models[small, classes] = teacher, student
        return self._models[small, classes]

    def _run(self, setting: Setting, scores: Callable[..., list[Tensor]]) -> Run:
        def run(*inputs: Tensor) -> Tensor:
            first, data = inputs[:-3], inputs[-3:]
            small = first[0].shape[1] != SIZES["hidden_size"]
            teacher, student = self._made(small, setting.divergence)
            adopt(teacher, tuple(nn.Parameter(x) for x in first))
            student.to(first[0])
            # float64 inputs are the oracle.
            bf16 = setting.dtype == torch.bfloat16 and first[0].dtype == torch.float32
            with torch.autocast(setting.device, dtype=torch.bfloat16, enabled=bf16):
                found = scores(teacher, student, *data)
            return torch.cat(found).to(first[0])

        return run


def _ours(
    backend: str, teacher: Any, student: Any, ids: Tensor, mask: Tensor, labels: Tensor
) -> list[Tensor]:
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with kdkernels.use_backend(backend):
        scores = kdkernels.SparseTeacher.score(
            teacher, [batch], student=student, temperature=TEMPERATURE
        )
    terms = (scores.expressiveness, scores.friendliness or {})
    return [x for units in terms for kind in ("heads", "neurons") for x in units[kind]]


@torch.enable_grad()
def _released(
    teacher: Any, student: Any, ids: Tensor, mask: Tensor, labels: Tensor
) -> list[Tensor]:
    config, layers = teacher.config, teacher.bert.encoder.layer
    sizes = (config.num_attention_heads, config.intermediate_size)
    gates = [ids.new_ones(n, dtype=next(teacher.parameters()).dtype) for n in sizes for _ in layers]
    leaves = [gate.requires_grad_() for gate in gates]
    with _multiplied(layers, leaves[: len(layers)], leaves[len(layers) :]):
        logits = teacher(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        taught = student(input_ids=ids, attention_mask=mask).logits
    t = TEMPERATURE
    soft = -((logits / t).softmax(-1) * (taught / t).log_softmax(-1)).sum(-1).mean()
    kd = 0.5 * (t * t * soft + F.cross_entropy(taught, labels))
    found = []
    for loss in (F.cross_entropy(logits, labels), kd):
        loss.backward(retain_graph=loss is not kd)
        for leaf in leaves:
            assert leaf.grad is not None
            found.append(leaf.grad.abs())
            leaf.grad = None
    teacher.zero_grad()
    return found


@contextmanager
def _multiplied(layers: Any, heads: list[Tensor], neurons: list[Tensor]) -> Iterator[None]:
    def multiply(gate: Tensor, module: nn.Module, args: Any) -> Any:
        x = args[0]
        return ((x.unflatten(-1, (len(gate), -1)) * gate[:, None]).flatten(-2),)

    handles = []
    for layer, head, neuron in zip(layers, heads, neurons, strict=True):
        for site, gate in ((layer.attention.output.dense, head), (layer.output.dense, neuron)):
            handles.append(site.register_forward_pre_hook(partial(multiply, gate)))
    yield
    for handle in handles:
        handle.remove()


CASE = StarkScorePassCase()
