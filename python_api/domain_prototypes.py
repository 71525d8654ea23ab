"""Means of hidden states over the positions that count, added up domain by domain."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.ops import domain_prototypes as op

__all__ = ["domain_prototypes"]


def domain_prototypes(
    hidden: Tensor,
    groups: Tensor,
    n_groups: int,
    *,
    mask: Tensor | None = None,
    accumulate_into: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Masked means of hidden states, and their sums and numbers in each group, in one read.

    With ``m`` the mask, ``g_i`` the group of example ``i``::

        means_i = sum_s m[i, s] hidden[i, s] / sum_s m[i, s]
        sums_g  = sum over i with g_i = g of means_i        counts_g = how many these are

    so that ``sums / counts[:, None].clamp(min=1)`` are the groups' prototypes: of a domain, or of a
    domain and a class (``domain * classes + label``), over one batch or, by ``accumulate_into``,
    over a data set.

    Args:
        hidden: ``[batch, seq, hidden]``, float32, bfloat16, float16 or float64, any strides.
        groups: ``[batch]`` int64 in ``[0, n_groups)``; a negative number: in no group (the mean is
            still returned). A number from ``n_groups`` on raises on the CPU; on a GPU, where
            looking would wait for the device, it is in no group.
        n_groups: number of groups, at least 1.
        mask: ``[batch, seq]`` bool or 0/1: the positions that count; leave padding, ``[CLS]`` and
            ``[SEP]`` out here. Others are never read, so they may hold inf or NaN. ``None``: all.
        accumulate_into: ``(sums, counts)`` of an earlier call, or zeros of the shapes and dtypes
            below, to which this batch's are added in place.
        backend: ``native``, ``triton`` or ``reference``; ``None`` chooses.

    Returns:
        ``(means, sums, counts)``: ``[batch, hidden]`` and ``[n_groups, hidden]``, float64 for
        float64, else float32, and ``[n_groups]`` int64. With ``accumulate_into`` its two tensors.
        An example of which no position counts has the mean 0 and is not counted in its group.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument. Also
            for hidden states that require grad outside of ``torch.no_grad()``: there is no
            gradient.
        TypeError: dtypes that do not fit.
        NotImplementedError: the named backend cannot run this call.

    Note:
        Hidden states are read once; sums are float32 (float64 for float64) in an order that the
        shape alone decides, without atomics: the same bits every time. Memory: the results, and
        float32 sums of parts of 32 positions and more on a GPU, of 128 on a CPU.

    References:
        Pan et al., Meta-KD: A Meta Knowledge Distillation Framework for Language Model Compression
        across Domains, arXiv 2012.01266.

    Example:
        >>> import kdkernels, torch
        >>> hidden = torch.randn(4, 6, 8)
        >>> mask = torch.arange(6) < torch.tensor([[6], [2], [3], [0]])
        >>> means, sums, counts = kdkernels.domain_prototypes(
        ...     hidden, torch.tensor([0, 1, 0, 1]), 2, mask=mask
        ... )
        >>> counts.tolist()  # of the last example nothing counts
        [2, 1]
        >>> bool(torch.allclose(sums[0], means[0] + means[2]))
        True
        >>> bool(torch.allclose(means[1], hidden[1, :2].mean(0), atol=1e-6))
        True
    """
    name = "domain_prototypes"
    for argument, x in (("hidden", hidden), ("groups", groups), ("mask", mask)):
        if not isinstance(x, Tensor) and not (argument == "mask" and x is None):
            raise TypeError(f"{name}: {argument} must be a Tensor, got {type(x).__name__}")
    if not isinstance(n_groups, int) or isinstance(n_groups, bool):
        raise TypeError(f"{name}: n_groups must be an int, got {type(n_groups).__name__}")
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    return op.domain_prototypes(
        hidden, groups, mask, n_groups, accumulate_into=accumulate_into, backend=backend
    )
