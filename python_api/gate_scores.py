"""How much a loss depends on each neuron or head: the gradients of gates that are never built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels.api._spec import choice
from kdkernels.ops import gate_scores as op

__all__ = ["gate_scores"]

PER = ("batch", "example")

Pair = tuple[Tensor, Tensor]


def gate_scores(
    activation: Tensor,
    grads: Tensor | Sequence[Tensor],
    *,
    width: int = 1,
    per: str = "batch",
    mask: Tensor | None = None,
    accumulate_into: Tensor | Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Any:  # a Tensor, or a pair for a pair: a union would burden every typed caller
    r"""Absolute gradients of gates on neurons or heads, from what an ordinary backward pass has.

    A gate of 1 multiplied to the columns of group ``g`` (a neuron; the context of a head) has, for
    a loss whose gradient at the activation is ``grad``, over the rows (tokens) ``r``, the gradient
    ``dot_g = sum_r sum_{c in g} activation[r, c] grad[r, c]``, and::

        batch:    score_g = | dot_g |
        example:  score_g = sum over examples | dot_g over the rows of the example |

    No gate has to be in the model, no mask is multiplied, and no product is stored.

    Args:
        activation: ``[..., groups * width]``, float32, bfloat16, float16 or float64: the output of
            the activation function of a feed-forward layer, or the heads' context before the output
            projection.
        grads: the gradient of a loss at that tensor, its shape and dtype; or a pair of two losses'
            gradients, for which the activation is read once.
        width: columns of a group: 1 for neurons, the size of a head for heads.
        per: ``batch``: the absolute value of the whole call's sum, as StarK's released code has it;
            it depends on how examples are put together. ``example``: that of each index of the
            first dimension; divided by their number it is the mean absolute gradient. With a loss
            that is a mean over the batch, gradients are so much smaller: multiply them back.
        mask: ``[...]`` bool or 0/1, e.g. the attention mask; rows that are 0 are left out. They are
            never read, so they may hold NaN.
        accumulate_into: ``[groups]`` (a pair for a pair) of the scores' dtype, to which they are
            added, batch after batch.
        backend: ``native``, ``triton`` or ``reference``; ``None`` chooses.

    Returns:
        ``[groups]``, float64 for float64, else float32; a pair for a pair. With ``accumulate_into``
        that tensor, or these.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument. Also
            for tensors that require grad outside of ``torch.no_grad()``: scores have no gradient.
        TypeError: dtypes that do not fit.
        NotImplementedError: the named backend cannot run this call.

    Note:
        Each tensor is read once, sums are float32 (float64 for float64) in parts that depend on the
        shape alone: the same bits every time. Memory: the scores, and sums of parts of the rows
        (about 1 % of the input; on a GPU at least one row of float32 sums an example).

    References:
        Yang et al., Sparse Teachers Can Be Dense with Knowledge, arXiv 2210.03923; Michel et al.,
        Are Sixteen Heads Really Better than One?, arXiv 1905.10650.

    Example:
        >>> import kdkernels, torch
        >>> hidden = torch.randn(2, 5, 12, requires_grad=True)
        >>> loss = hidden.square().sum()
        >>> (grad,) = torch.autograd.grad(loss, hidden)
        >>> with torch.no_grad():
        ...     neurons = kdkernels.gate_scores(hidden, grad)
        ...     heads = kdkernels.gate_scores(hidden, grad, width=4, per="example")
        >>> neurons.shape, heads.shape
        (torch.Size([12]), torch.Size([3]))
        >>> bool(torch.isclose(heads.sum(), 2 * loss))
        True
    """
    name = "gate_scores"
    choice(name, "per", per, PER)
    one = isinstance(grads, Tensor)
    tensors = _listed(name, "grads", grads)
    into = None
    if accumulate_into is not None:
        into = _listed(name, "accumulate_into", accumulate_into)
        if isinstance(accumulate_into, Tensor) != one or len(into) != len(tensors):
            raise ValueError(
                f"{name}: accumulate_into must be one tensor for one gradient and a pair for a "
                f"pair, got {_shown(accumulate_into)}"
            )
    if not isinstance(activation, Tensor):
        raise TypeError(f"{name}: activation must be a Tensor, got {type(activation).__name__}")
    if activation.dim() == 0:
        raise ValueError(f"{name}: activation must be [..., groups * width], got shape []")
    for grad in tensors:
        if grad.shape != activation.shape:
            raise ValueError(
                f"{name}: grads must have the shape of activation {list(activation.shape)}, got "
                f"{list(grad.shape)}"
            )
    if not isinstance(width, int) or isinstance(width, bool):
        raise TypeError(f"{name}: width must be an int, got {type(width).__name__}")
    leading = activation.shape[:-1]
    examples = leading[0] if per == "example" and math.prod(leading) > 0 else 1
    scores = op.gate_scores(
        _rows(activation),
        [_rows(grad) for grad in tensors],
        _fold_mask(name, mask, activation),
        width,
        examples,
        accumulate_into=into,
        backend=backend,
    )
    return scores[0] if one else tuple(scores)


def _listed(name: str, argument: str, given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    found = [given] if isinstance(given, Tensor) else list(given)
    for x in found:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: {argument} must be tensors, got {type(x).__name__}")
    if not isinstance(given, Tensor) and len(found) != 2:
        raise ValueError(f"{name}: {argument} must be a tensor or a pair, got {len(found)} tensors")
    return found


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _fold_mask(name: str, mask: Tensor | None, activation: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != activation.shape[:-1]:
        raise ValueError(
            f"{name}: mask must have the leading shape of activation "
            f"{list(activation.shape[:-1])}, got {list(mask.shape)}"
        )
    _checks.same_device(name, "mask", mask, activation.device)
    return (mask if mask.dtype == torch.bool else mask != 0).reshape(-1)


def _shown(given: Tensor | Sequence[Tensor]) -> str:
    return "a tensor" if isinstance(given, Tensor) else f"{len(given)} tensors"
