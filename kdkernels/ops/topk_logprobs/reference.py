"""The definition of ``topk_logprobs`` in PyTorch: what every kernel is judged against."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.ops.topk_logprobs.spec import Spec


def topk_logprobs_reference(
    x: Tensor,  # [rows, columns >= spec.classes]
    k: int,
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(ids [rows, k], logprobs [rows, k], tail [rows])``; see ``op.py``."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = x[:, : spec.classes_of(x.shape[1])].detach()
    # By the logits as they are stored, which no rounding has made equal.
    order = logits.sort(dim=1, descending=True, stable=True).indices
    z = _scaled(logits.to(dtype), spec)
    log_p = (z / spec.temperature).log_softmax(1).gather(1, order)
    # A class without a chance is none: what is left of a row of fewer than k is padding. Where all
    # are dead, log_softmax is NaN.
    dead = (logits == -torch.inf).gather(1, order)
    log_p = log_p.masked_fill(dead, -torch.inf)
    ids = order.masked_fill(dead, -1)
    return ids[:, :k].contiguous(), log_p[:, :k].contiguous(), log_p[:, k:].exp().sum(1)


def linear_topk_logprobs_reference(
    hidden: Tensor,  # [rows, width]
    weight: Tensor,  # [columns, width]
    bias: Tensor | None,  # [columns]
    k: int,
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the logits in full."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return topk_logprobs_reference(logits, k, spec)


def _scaled(x: Tensor, spec: Spec) -> Tensor:
    z = x * spec.scale if spec.scale != 1.0 else x
    if spec.softcap != 0.0:
        masked = z == -torch.inf  # stays masked: the cap is for logits, not for masks
        z = (spec.softcap * torch.tanh(z / spec.softcap)).masked_fill(masked, -torch.inf)
    return z
