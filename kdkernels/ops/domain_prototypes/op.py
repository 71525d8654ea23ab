"""The contract of ``domain_prototypes``: primitive, fake, backend support, checks.

There is no gradient: prototypes are read, not trained. The layer above (``kdkernels.api``) takes
masks of other dtypes; what is divided by the counts, and when, is its caller's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import _backend, _checks, _native, _triton
from kdkernels._op import Primitive, is_compiling, transforms_active
from kdkernels.ops.domain_prototypes.reference import domain_prototypes_reference

OP = "domain_prototypes"


def _fake(
    hidden: Tensor, groups: Tensor, mask: Any, n_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, columns = hidden.shape
    wide = _mean_dtype(hidden)
    return (
        hidden.new_empty((batch, columns), dtype=wide),
        hidden.new_empty((n_groups, columns), dtype=wide),
        hidden.new_empty((n_groups,), dtype=torch.int64),
    )


domain_prototypes_forward = Primitive(
    OP,
    "(Tensor hidden, Tensor groups, Tensor? mask, SymInt n_groups) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
)


def domain_prototypes(
    hidden: Tensor,
    groups: Tensor,
    mask: Tensor | None,
    n_groups: int,
    *,
    accumulate_into: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means over the positions that count, and their sums and numbers group by group.

    ``means[i] = sum_s mask[i, s] hidden[i, s] / sum_s mask[i, s]``,
    ``sums[g] = sum of means[i] over groups[i] = g``, ``counts[g]`` the number of these.

    Args:
        hidden: ``[batch, seq, columns]`` float32, bfloat16, float16 or (reference, CPU) float64;
            any strides of examples and positions, unit column stride (another layout is copied).
        groups: ``[batch]`` int64 in ``[0, n_groups)``; a negative number: in no group. A larger one
            raises on the CPU outside of ``torch.compile``, and is in no group elsewhere.
        mask: ``[batch, seq]`` bool; a position that is false is never read. ``None``: all count.
        n_groups: number of groups, at least 1.
        accumulate_into: ``(sums, counts)`` of the results' shapes and dtypes, which are added to.
        backend: ``native``, ``triton``, ``reference``, or ``None`` to choose.

    Returns:
        means ``[batch, columns]``, sums ``[n_groups, columns]``, both float64 for float64, else
        float32, and counts ``[n_groups]`` int64. An example of which no position counts has the
        mean 0 and is in no group's count.

    Numerics: float32 inside (float64 for float64), summed up in an order that depends on the shape
    alone: the same bits every time.
    """
    _check(hidden, groups, mask, n_groups)
    if accumulate_into is not None:
        _check_into(accumulate_into, hidden, n_groups)
    name = _backend.choose(OP, hidden.device.type, backend, unsupported, hidden)
    if name == "reference":
        means, sums, counts = domain_prototypes_reference(hidden, groups, mask, n_groups)
    else:
        hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
        mask = None if mask is None else mask.contiguous()
        try:
            means, sums, counts = domain_prototypes_forward(
                name, hidden, groups.contiguous(), mask, n_groups
            )
        except RuntimeError as error:
            raise _checks.as_contract(OP, error) from None
    if accumulate_into is None:
        return means, sums, counts
    return means, accumulate_into[0].add_(sums), accumulate_into[1].add_(counts)


def unsupported(
    backend: str, hidden: Tensor, mask: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can.

    ``device`` asks about another device type than that of the tensors.
    """
    if backend == "reference":
        return None
    device = device or hidden.device.type
    if transforms_active():
        return "torch.func and forward-mode differentiation need the reference"
    if hidden.dtype == torch.float64 and (backend, device) != ("native", "cpu"):
        return "the GPU kernels take float32, bfloat16 and float16, not float64"
    if backend == "native":
        return _native.reason(device)
    return _triton.reason(device) if backend == "triton" else None


def _mean_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


# ---- checks --------------------------------------------------------------------------------------


def _check(hidden: Tensor, groups: Tensor, mask: Tensor | None, n_groups: int) -> None:
    if hidden.dim() != 3 or hidden.shape[2] < 1:
        raise ValueError(
            f"{OP}: hidden must be [batch, seq, hidden], got shape {list(hidden.shape)}"
        )
    if hidden.layout != torch.strided:
        raise TypeError(f"{OP}: hidden must be a strided tensor, got {hidden.layout}")
    if hidden.dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(
            f"{OP}: hidden must be float32, bfloat16, float16 or float64, got {hidden.dtype}"
        )
    _checks.no_grad(OP, "hidden", hidden)
    if n_groups < 1:
        raise ValueError(f"{OP}: n_groups must be at least 1, got {n_groups}")
    _checks.row_vector(OP, "groups", groups, hidden.shape[0], (torch.int64,))
    _checks.same_device(OP, "groups", groups, hidden.device)
    if mask is not None:
        if mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"{OP}: mask must be {list(hidden.shape[:2])}, got shape {list(mask.shape)}"
            )
        if mask.dtype != torch.bool:
            raise TypeError(f"{OP}: mask must be bool, got {mask.dtype}")
        _checks.same_device(OP, "mask", mask, hidden.device)
    # Where looking costs no synchronisation.
    if groups.device.type == "cpu" and not is_compiling() and not transforms_active():
        largest = int(groups.max()) if groups.shape[0] > 0 else -1
        if largest >= n_groups:
            raise ValueError(
                f"{OP}: groups must be in [0, {n_groups}) or negative, got {largest} in row "
                f"{int(groups.argmax())}"
            )


def _check_into(into: tuple[Tensor, Tensor], hidden: Tensor, n_groups: int) -> None:
    if len(into) != 2:
        raise ValueError(f"{OP}: accumulate_into must be (sums, counts), got {len(into)} tensors")
    size = [n_groups, hidden.shape[2]]
    wanted = ((into[0], size, _mean_dtype(hidden)), (into[1], [n_groups], torch.int64))
    for name, (x, shape, dtype) in zip(("sums", "counts"), wanted, strict=True):
        if list(x.shape) != shape or x.dtype != dtype:
            raise ValueError(
                f"{OP}: accumulate_into {name} must be {shape} of {dtype}, got {list(x.shape)} of "
                f"{x.dtype}"
            )
        _checks.same_device(OP, f"accumulate_into {name}", x, hidden.device)
        _checks.no_grad(OP, f"accumulate_into {name}", x)
