"""The losses as modules: the options at construction, the tensors in the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from kdkernels.api import functional


class _Loss(nn.Module):
    """Keeps the options of a functional loss; options given in the call come on top."""

    _function: Callable[..., Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = inspect.signature(type(self)._function).parameters
        for name in options:
            if name not in known or known[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                wanted = ", ".join(n for n, p in known.items() if p.kind is p.KEYWORD_ONLY)
                raise TypeError(f"{type(self).__name__}: {name} must be one of {wanted}")
        self.options = options

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _call(self, *tensors: Any, **overrides: Any) -> Any:
        return type(self)._function(*tensors, **{**self.options, **overrides})


class KDLoss(_Loss):
    """:func:`kdkernels.kd_loss` as a module; takes its keywords at construction or in the call.

    Example:
        >>> import kdkernels, torch
        >>> loss_fn = kdkernels.KDLoss(temperature=2.0, alpha=0.7)
        >>> loss_fn(torch.randn(4, 9), torch.randn(4, 9), torch.arange(4)).shape
        torch.Size([])
    """

    _function = staticmethod(functional.kd_loss)

    def forward(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor | None = None, **kw: Any
    ) -> Any:
        """Student and teacher logits ``[..., vocab]``, labels ``[...]``."""
        return self._call(student, teacher, labels, **kw)


class LinearKDLoss(_Loss):
    """:func:`kdkernels.linear_kd_loss` as a module.

    Example:
        >>> import kdkernels, torch
        >>> loss_fn = kdkernels.LinearKDLoss(temperature=2.0, chunk_rows=2)
        >>> student, teacher = torch.randn(4, 8), torch.randn(4, 16)
        >>> loss_fn(student, torch.randn(9, 8), teacher, torch.randn(9, 16)).shape
        torch.Size([])
    """

    _function = staticmethod(functional.linear_kd_loss)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        labels: Tensor | None = None,
        **kw: Any,
    ) -> Any:
        """Hidden states ``[..., width]``, heads ``[vocab, width]``, labels ``[...]``."""
        return self._call(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **kw
        )


class TopKKDLoss(_Loss):
    """:func:`kdkernels.topk_kd_loss` as a module.

    Example:
        >>> import kdkernels, torch
        >>> loss_fn = kdkernels.TopKKDLoss(tail="uniform")
        >>> top = torch.randn(4, 9).log_softmax(-1).topk(3)
        >>> loss_fn(torch.randn(4, 9), top.indices, top.values, torch.arange(4)).shape
        torch.Size([])
    """

    _function = staticmethod(functional.topk_kd_loss)

    def forward(
        self,
        student: Tensor,
        topk_ids: Tensor,
        topk_logprobs: Tensor,
        labels: Tensor | None = None,
        **kw: Any,
    ) -> Any:
        """Student logits ``[..., vocab]``, the teacher's list ``[..., k]``, labels ``[...]``."""
        return self._call(student, topk_ids, topk_logprobs, labels, **kw)


class LinearTopKKDLoss(_Loss):
    """:func:`kdkernels.linear_topk_kd_loss` as a module."""

    _function = staticmethod(functional.linear_topk_kd_loss)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        topk_ids: Tensor,
        topk_logprobs: Tensor,
        labels: Tensor | None = None,
        **kw: Any,
    ) -> Any:
        """Hidden states ``[..., width]``, head ``[vocab, width]``, the teacher's list, labels."""
        return self._call(student_hidden, student_weight, topk_ids, topk_logprobs, labels, **kw)


class HiddenMatchLoss(_Loss):
    """:func:`kdkernels.hidden_match_loss` as a module.

    Example:
        >>> import kdkernels, torch
        >>> loss_fn = kdkernels.HiddenMatchLoss(kind="cosine")
        >>> loss_fn(torch.randn(4, 8), torch.randn(4, 8), mask=torch.ones(4)).shape
        torch.Size([])
    """

    _function = staticmethod(functional.hidden_match_loss)

    def forward(self, student: Tensor, teacher: Tensor, **kw: Any) -> Any:
        """Hidden states ``[..., width]``."""
        return self._call(student, teacher, **kw)


class HiddenMatchMany(_Loss):
    """:func:`kdkernels.hidden_match_many` as a module."""

    _function = staticmethod(functional.hidden_match_many)

    def forward(self, pairs: Sequence[tuple[Tensor, Tensor]], **kw: Any) -> Any:
        """Pairs of hidden states ``[..., width]``."""
        return self._call(pairs, **kw)


class RelationMatchLoss(_Loss):
    """:func:`kdkernels.relation_match_loss` as a module.

    Example:
        >>> import kdkernels, torch
        >>> loss_fn = kdkernels.RelationMatchLoss(num_relation_heads=4)
        >>> loss_fn(torch.randn(2, 5, 16), torch.randn(2, 5, 24)).shape
        torch.Size([])
    """

    _function = staticmethod(functional.relation_match_loss)

    def forward(self, student: Tensor, teacher: Tensor, **kw: Any) -> Tensor:
        """Queries, keys, values or hidden states of both models, ``[batch, seq, width]``."""
        return self._call(student, teacher, **kw)


class AttentionMatchLoss(_Loss):
    """:func:`kdkernels.attention_match_loss` as a module.

    Example:
        >>> import kdkernels, torch
        >>> loss_fn = kdkernels.AttentionMatchLoss(kind="kl")
        >>> q, k, teacher_q, teacher_k = torch.randn(4, 2, 3, 5, 8)
        >>> loss_fn((q, k), (teacher_q, teacher_k)).shape
        torch.Size([])
    """

    _function = staticmethod(functional.attention_match_loss)

    def forward(self, student: Any, teacher: Any, **kw: Any) -> Tensor:
        """Of both models a pair of queries and keys, or a map ``[batch, heads, seq, seq]``."""
        return self._call(student, teacher, **kw)


class LabelSmoothingLoss(_Loss):
    """:func:`kdkernels.label_smoothing_loss` as a module."""

    _function = staticmethod(functional.label_smoothing_loss)

    def forward(self, logits: Tensor, labels: Tensor, **kw: Any) -> Tensor:
        """Logits ``[..., vocab]``, labels ``[...]``."""
        return self._call(logits, labels, **kw)


class TfKDRegLoss(_Loss):
    """:func:`kdkernels.tfkd_reg_loss` as a module."""

    _function = staticmethod(functional.tfkd_reg_loss)

    def forward(self, logits: Tensor, labels: Tensor, **kw: Any) -> Tensor:
        """Logits ``[..., vocab]``, labels ``[...]``."""
        return self._call(logits, labels, **kw)


class TfKDSelfLoss(_Loss):
    """:func:`kdkernels.tfkd_self_loss` as a module."""

    _function = staticmethod(functional.tfkd_self_loss)

    def forward(
        self, logits: Tensor, pretrained_logits: Tensor, labels: Tensor, **kw: Any
    ) -> Tensor:
        """Logits of the student and of its trained copy ``[..., vocab]``, labels ``[...]``."""
        return self._call(logits, pretrained_logits, labels, **kw)


class ConfidencePenaltyLoss(_Loss):
    """:func:`kdkernels.confidence_penalty_loss` as a module."""

    _function = staticmethod(functional.confidence_penalty_loss)

    def forward(self, logits: Tensor, labels: Tensor, **kw: Any) -> Tensor:
        """Logits ``[..., vocab]``, labels ``[...]``."""
        return self._call(logits, labels, **kw)
