"""Losses on labels alone, for ``Trainer(compute_loss_func=...)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from kdkernels.api._spec import choice
from kdkernels.api.functional import (
    confidence_penalty_loss,
    label_smoothing_loss,
    tfkd_reg_loss,
)

__all__ = ["label_loss_func"]

NAME = "label_loss_func"
KINDS: dict[str, Callable[..., Tensor]] = {
    "label_smoothing": label_smoothing_loss,
    "tfkd_reg": tfkd_reg_loss,
    "confidence_penalty": confidence_penalty_loss,
}


def label_loss_func(kind: str, *, shift: int | None = None, **options: Any) -> Callable[..., Any]:
    """A regularised loss of labels for a Trainer as it is: ``Trainer(compute_loss_func=...)``.

    Gradient accumulation and several processes are counted right: the loss is the sum over rows
    divided by the ``num_items_in_batch`` that the Trainer gives.

    Args:
        kind: ``label_smoothing`` (:func:`kdkernels.label_smoothing_loss`), ``tfkd_reg``
            (:func:`kdkernels.tfkd_reg_loss`) or ``confidence_penalty``
            (:func:`kdkernels.confidence_penalty_loss`).
        shift: 1 for causal language models, whose labels are aligned with the input tokens; 0 for
            labels that are aligned with the logits (tagging, masked language models). It must be
            said for logits of tokens: the function sees neither model nor inputs.
        **options: keywords of the loss, such as ``label_smoothing`` or ``alpha``.

    Returns:
        ``(outputs, labels, num_items_in_batch=None) -> loss``.

    Raises:
        ValueError: another kind; logits of tokens without ``shift``.

    Example:
        >>> import torch, transformers
        >>> from kdkernels.api.hf import label_loss_func
        >>> loss = label_loss_func("tfkd_reg", alpha=0.1, temperature=20.0)
        >>> loss({"logits": torch.zeros(4, 3)}, torch.arange(4) % 3).shape
        torch.Size([])
    """
    choice(NAME, "kind", kind, tuple(KINDS))
    if shift not in (None, 0, 1):
        raise ValueError(f"{NAME}: shift must be 0, 1 or None, got {shift!r}")
    # A function of this module, not of this call: it can be pickled.
    return partial(_loss, kind, shift, options)


def _loss(
    kind: str,
    shift: int | None,
    options: dict[str, Any],
    outputs: Any,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if labels is None:
        raise ValueError(f"{NAME}: labels must be given for a loss on labels, got None")
    if logits is None:
        raise ValueError(f"{NAME}: outputs must hold logits, got None (a fused forward pass)")
    if shift is None and logits.dim() > 2:
        raise ValueError(
            f"{NAME}: shift must be given for logits of tokens: 1 for a causal language model, 0 "
            f"for labels aligned with the logits, got None and logits {list(logits.shape)}"
        )
    count = {"num_items_in_batch": num_items_in_batch, "shift": shift or 0}
    return KINDS[kind](logits, labels, **count, **options)
