"""Losses for many processes: vocabularies in shards, sharded heads, counts of whole steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.api import _sites
from kdkernels.api._averaged import is_sharded, unwrapped
from kdkernels.api._spec import integer
from kdkernels.api.vocab_parallel import vocab_parallel_kd_loss, vocab_parallel_linear_kd_loss

__all__ = [
    "Head",
    "gathered",
    "global_valid_count",
    "through_head",
    "vocab_parallel_kd_loss",
    "vocab_parallel_linear_kd_loss",
]


class Head(NamedTuple):
    """A linear map from hidden states to logits, whole on this process."""

    weight: Tensor  # [vocab, width]
    bias: Tensor | None  # [vocab]


def gathered(head: nn.Module) -> Head:
    r"""Weight and bias of a head that ``fully_shard`` has divided, whole and differentiable.

    For the losses that read a head, :func:`~kdkernels.linear_kd_loss` and
    :func:`~kdkernels.linear_topk_kd_loss`, in data-parallel training: each process has rows of its
    own and needs the whole head for them. One ``all_gather`` a call; the gradient is averaged over
    the processes and comes back as shards (one ``reduce_scatter``), as ``fully_shard`` does it for
    the parameters that its modules use themselves.

    Call it in each step, after the forward pass: of a head in the group of the root, which keeps
    its parameters whole until the backward pass, it returns these, and FSDP reduces their gradient.

    Args:
        head: a module with ``weight`` (and ``bias``), e.g. ``model.lm_head``, tied or not; sharded
            or not; frozen or not.

    Returns:
        :class:`Head`: weight ``[vocab, width]`` and bias ``[vocab]`` or ``None``.

    Raises:
        TypeError: a module without a weight.
        NotImplementedError: parameters of DeepSpeed ZeRO-3, or of FullyShardedDataParallel: use
            their own means of gathering.

    Note:
        Dtypes are those of the parameters: under ``MixedPrecisionPolicy`` a head that FSDP has not
        gathered itself is gathered in its own dtype. :func:`through_head` follows the policy, and
        ``set_requires_gradient_sync(False)``. Not yet run on a GPU.

    Example:
        >>> import kdkernels, torch
        >>> model = torch.nn.Linear(8, 20)  # stands for model.lm_head
        >>> weight, bias = kdkernels.parallel.gathered(model)
        >>> loss = kdkernels.linear_kd_loss(
        ...     torch.randn(4, 8), weight, None, None, torch.arange(4), student_bias=bias
        ... )
        >>> loss.backward()
    """
    module = unwrapped(head)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"gathered: head must be a module with a weight, got {type(head).__name__}")
    if weight.dim() != 2 or hasattr(weight, "ds_id"):
        raise NotImplementedError(
            "gathered: head must be sharded by fully_shard (FSDP2) or not at all, got a weight of "
            f"shape {list(weight.shape)} of another library"
        )
    return Head(_whole(weight), None if bias is None else _whole(bias))


def _whole(x: Tensor) -> Tensor:
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Partial

    processes = x.device_mesh.size()  # type: ignore[attr-defined]
    # Each process has the gradient of its own rows. Gloo cannot average, so it sums what is divided
    # before.
    placements = [Partial()] * x.device_mesh.ndim  # type: ignore[attr-defined]
    whole: Tensor = x.full_tensor(grad_placements=placements)  # type: ignore[attr-defined]
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / processes)
    return whole


def through_head(head: nn.Module, loss: Callable[..., Any], *inputs: Any) -> Any:
    r"""``loss(*inputs, weight, bias)`` inside of the head's own forward pass.

    So a head on which ``fully_shard`` was called is gathered and freed by FSDP's own hooks, with
    its prefetching, mixed precision and ``set_requires_gradient_sync``, and its gradient is reduced
    by them. Any other head does as well, gathered as by :func:`gathered`.

    Args:
        head: as of :func:`gathered`.
        loss: called with the inputs, the weight and the bias.
        *inputs: what the loss takes before them; those that need a gradient first of all the hidden
            states. FSDP may cast them.

    Returns:
        What ``loss`` returns.

    Example:
        >>> import functools, kdkernels, torch
        >>> head, hidden = torch.nn.Linear(8, 20, bias=False), torch.randn(4, 8)
        >>> def loss(hidden, weight, bias):
        ...     return kdkernels.linear_kd_loss(hidden, weight, None, None, torch.arange(4))
        >>> kdkernels.parallel.through_head(head, loss, hidden).backward()
    """
    module = unwrapped(head)
    if "forward" in vars(module):
        raise ValueError(
            "through_head: head must have the forward of its class, got one that was replaced"
        )
    with _sites.replaced(
        "through_head", module, lambda _: lambda *xs: loss(*xs, *gathered(module))
    ):
        return head(*inputs)


def global_valid_count(
    labels: Tensor | Sequence[Tensor] | None = None,
    *,
    mask: Tensor | Sequence[Tensor] | None = None,
    shift: int = 0,
    ignore_index: int = -100,
    units: int = 1,
    averaged: bool = False,
    group: Any = None,
) -> Tensor:
    r"""How many rows count in all micro-batches of a step, on all processes together.

    The ``num_items_in_batch`` of every loss: with it a step over many micro-batches and processes
    is the step over one batch, however unevenly their rows count. Means of means are not.

    Args:
        labels: ``[...]`` integers, or a list with those of each micro-batch that is accumulated.
        mask: ``[...]`` bool or 0/1, or a list likewise; rows that are 0 do not count. Alone, for
            losses of hidden states and relations, or with labels.
        shift: 1 where the loss has ``shift=1``: the first position is nobody's target.
        ignore_index: label of rows that do not count.
        units: rows of the loss for each that is counted: the heads of
            :func:`~kdkernels.relation_match_loss` and :func:`~kdkernels.attention_match_loss`.
        averaged: divide by the number of processes: for gradients that DistributedDataParallel or
            ``fully_shard`` average over them. ``False``: for gradients that are summed, or a
            framework that multiplies the loss by the number of processes itself, as the Trainer of
            transformers does.
        group: the processes that have different rows; ``None``: all, and one where
            ``torch.distributed`` is not initialised. With tensor parallelism give the data-parallel
            group: processes with the same rows count them once.

    Returns:
        ``[]`` on the device of the labels, int64, or float32 where ``averaged``. It is not read by
        the host: one ``all_reduce`` of one number.

    Raises:
        ValueError: neither labels nor mask; lists or shapes that do not fit.

    Example:
        >>> import kdkernels, torch
        >>> batches = [torch.tensor([[1, 2, -100]]), torch.tensor([[4, -100, -100]])]
        >>> count = kdkernels.global_valid_count(batches)
        >>> count
        tensor(3)
        >>> for labels in batches:
        ...     logits = torch.randn(1, 3, 9, requires_grad=True)
        ...     loss = kdkernels.kd_loss(logits, None, labels, num_items_in_batch=count)
        ...     loss.backward()
    """
    name = "global_valid_count"
    if labels is None and mask is None:
        raise ValueError(f"{name}: labels or mask must be given, got None")
    if type(shift) is not int or shift not in (0, 1):
        raise ValueError(f"{name}: shift must be 0 or 1, got {shift!r}")
    integer(name, "units", units, 1)
    of_labels, of_mask = _listed(labels), _listed(mask)
    if labels is not None and mask is not None and len(of_labels) != len(of_mask):
        raise ValueError(
            f"{name}: mask must have a tensor for each of the {len(of_labels)} of labels, got "
            f"{len(of_mask)}"
        )
    counts = []
    for i in range(max(len(of_labels), len(of_mask))):
        valid = of_labels[i] != ignore_index if labels is not None else of_mask[i] != 0
        if labels is not None and mask is not None:
            if of_mask[i].shape != valid.shape:
                raise ValueError(
                    f"{name}: mask must have the shape of labels {list(valid.shape)}, got "
                    f"{list(of_mask[i].shape)}"
                )
            valid = valid & (of_mask[i] != 0)
        counts.append(valid[..., shift:].sum())
    if not counts:
        raise ValueError(f"{name}: labels or mask must hold a micro-batch, got none")
    count = torch.stack(counts).sum() * units
    processes = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size(group)
        if processes > 1:
            torch.distributed.all_reduce(count, group=group)
    return count.float() / processes if averaged else count


def _listed(x: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    if x is None:
        return []
    return [x] if isinstance(x, Tensor) else list(x)
