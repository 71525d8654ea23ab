"""Losses and perplexity of a causal language model, from hidden states or from full logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.api.cache.reader import TeacherCache
from kdkernels.api.distill.lm_data import Block
from kdkernels.api.distill.lm_models import head_of, last_hidden
from kdkernels.api.distill.train import Runtime

EVALUATION_TOKENS = 1024


@dataclass(frozen=True)
class Source:
    """Where the distillation loss has its teacher from; with neither it is cross-entropy alone.

    Attributes:
        teacher: A live model.
        cache: What a teacher said, read from the disk.
    """

    teacher: Any = None
    cache: TeacherCache | None = None


@dataclass(frozen=True)
class LmLoss:
    """The loss of a batch of blocks, whichever way it is computed.

    ``(1 - alpha) * CE + alpha * T^2 * KL(teacher || student)`` per predicted token; the classes
    that a cached teacher does not name are one class together. Without a teacher: CE.

    Attributes:
        source: The teacher.
        route: ``hidden``: from hidden states and heads, without ``[tokens, vocab]`` tensors, in
            float32 on a CPU. ``logits``: from full logits, in the precision of the models.
        temperature: Temperature of the divergence.
        alpha: Weight of the divergence.
        runtime: Device and precision.
    """

    source: Source
    route: str
    temperature: float
    alpha: float
    runtime: Runtime

    def __call__(self, student: Any, blocks: Sequence[Block]) -> Tensor:
        """The mean over the predicted tokens.

        Args:
            student: The model to train.
            blocks: Blocks of one length.
        """
        return self.parts(student, blocks).loss

    def parts(self, student: Any, blocks: Sequence[Block]) -> kdkernels.KDParts:
        """The same, with its parts."""
        tokens = stack(blocks).to(self.runtime.device)
        topk = None if self.source.cache is None else self.source.cache.rows(blocks)
        if topk is not None:
            topk = (topk[0].to(tokens.device), topk[1].to(tokens.device))
        return (self._hidden if self.route == "hidden" else self._logits)(student, tokens, topk)

    @property
    def _weights(self) -> dict[str, Any]:
        """Keywords of the distillation losses."""
        return {
            "temperature": self.temperature,
            "ce_weight": 1.0 - self.alpha,
            "kd_weight": self.alpha,
            "return_parts": True,
        }

    def _hidden(
        self, student: Any, tokens: Tensor, topk: tuple[Tensor, Tensor] | None
    ) -> kdkernels.KDParts:
        head = head_of(student)
        hidden = head_input(student, tokens, self.runtime)
        with head_precision(self.runtime):
            if topk is not None:
                return kdkernels.linear_topk_kd_loss(
                    hidden,
                    head.weight,
                    *topk,
                    tokens,
                    student_bias=head.bias,
                    shift=1,
                    **self._weights,
                )
            if self.source.teacher is None:
                return kdkernels.linear_kd_loss(
                    hidden,
                    head.weight,
                    None,
                    None,
                    tokens,
                    student_bias=head.bias,
                    shift=1,
                    return_parts=True,
                )
            with torch.no_grad():
                known = head_of(self.source.teacher)
                teacher_hidden = head_input(self.source.teacher, tokens, self.runtime)
            return kdkernels.linear_kd_loss(
                hidden,
                head.weight,
                teacher_hidden,
                known.weight.detach(),
                tokens,
                student_bias=head.bias,
                teacher_bias=None if known.bias is None else known.bias.detach(),
                shift=1,
                **self._weights,
            )

    def _logits(
        self, student: Any, tokens: Tensor, topk: tuple[Tensor, Tensor] | None
    ) -> kdkernels.KDParts:
        logits = _full_logits(student, tokens, self.runtime)
        if topk is not None:
            return kdkernels.topk_kd_loss(logits, *topk, tokens, shift=1, **self._weights)
        if self.source.teacher is None:
            return kdkernels.kd_loss(logits, None, tokens, shift=1, return_parts=True)
        with torch.no_grad():
            teacher_logits = _full_logits(self.source.teacher, tokens, self.runtime)
        return kdkernels.kd_loss(logits, teacher_logits, tokens, shift=1, **self._weights)


def stack(blocks: Sequence[Block]) -> Tensor:
    """The tokens of blocks, ``[blocks, tokens]``."""
    return torch.stack([tokens for _, tokens in blocks])


def head_input(model: Any, tokens: Tensor, runtime: Runtime) -> Tensor:
    """Hidden states for the head; on a CPU in float32, see :func:`head_precision`."""
    with runtime.autocast(), runtime.training_attention():
        hidden = last_hidden(model, tokens)
    return hidden.float() if runtime.device.type == "cpu" else hidden


def head_precision(runtime: Runtime) -> AbstractContextManager[Any]:
    """The context of losses from hidden states: autocast on a GPU only.

    On a CPU heads stay in float32: with a frozen head of 49,152 classes the loss ran over 1,461
    tokens a second so, and over 936 with bf16 products, whose sums would still be float32 (one
    trial, 2 cores with AVX-512 bf16).
    """
    return runtime.autocast() if runtime.device.type != "cpu" else nullcontext()


def cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the next token from hidden states."""
    loss: Tensor = kdkernels.linear_kd_loss(
        hidden, weight, None, None, tokens, student_bias=bias, shift=1, reduction=reduction
    )
    return loss


def _full_logits(model: Any, tokens: Tensor, runtime: Runtime) -> Tensor:
    with runtime.autocast(), runtime.training_attention():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


@torch.inference_mode()
def perplexity(
    model: Any,
    blocks: Sequence[Block],
    runtime: Runtime,
    on_batch: Callable[[int], None] = lambda count: None,
) -> float:
    """The perplexity of the tokens of each block but the first, given those before them in it.

    Args:
        model: A transformers causal language model; left in evaluation mode.
        blocks: Blocks of one length.
        runtime: Device and precision.
        on_batch: Called with the number of blocks of each finished batch.
    """
    model.to(runtime.device).eval()
    head, total, predicted = head_of(model), 0.0, 0
    size = max(1, EVALUATION_TOKENS // len(blocks[0][1]))
    for start in range(0, len(blocks), size):
        tokens = stack(blocks[start : start + size]).to(runtime.device)
        hidden = head_input(model, tokens, runtime)
        with head_precision(runtime):
            total += cross_entropy(hidden, head.weight, head.bias, tokens, "sum").item()
        predicted += tokens[:, 1:].numel()
        on_batch(len(tokens))
    return float(torch.tensor(total / predicted, dtype=torch.float64).exp())


def schedule(blocks: Sequence[Block], batch_size: int, epochs: int, seed: int) -> list[list[Block]]:
    """All batches of all epochs; the order depends on the seed alone, not on what is trained."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(epochs):
        order = torch.randperm(len(blocks), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            steps.append([blocks[place] for place in order[start : start + batch_size]])
    return steps
