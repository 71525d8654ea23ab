"""The contract of ``gate_scores``: primitive, fake, backend support, checks.

There is no gradient: scores are read, not trained. Layers above (``kdkernels.api``) bring leading
dimensions, and what is an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels import _backend, _checks, _native, _triton
from kdkernels._op import Primitive, transforms_active
from kdkernels.ops.gate_scores.reference import gate_scores_reference

OP = "gate_scores"
MOST_GRADS = 2  # of one pass


def _fake(activation: Tensor, grads: list[Tensor], mask: Any, width: int, examples: int) -> Tensor:
    size = (len(grads), activation.shape[1] // width)
    return activation.new_empty(size, dtype=_score_dtype(activation))


gate_scores_forward = Primitive(
    OP,
    "(Tensor activation, Tensor[] grads, Tensor? mask, SymInt width, SymInt examples) -> Tensor",
    fake=_fake,
)


def gate_scores(
    activation: Tensor,
    grads: Sequence[Tensor],
    mask: Tensor | None,
    width: int,
    examples: int,
    *,
    accumulate_into: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """What gates of groups of columns, all equal to 1, have for gradients: their absolute values.

    ``scores[i][g] = sum over examples | sum over rows and columns of g activation * grads[i] |``

    Args:
        activation: ``[rows, groups * width]`` float32, bfloat16, float16 or (reference, CPU)
            float64; any row stride, unit column stride (another layout is copied).
        grads: one or two gradients at the activation, of its shape and dtype.
        mask: ``[rows]`` bool; a row that is false is never read and adds nothing. ``None``: every
            row counts.
        width: columns of a group: 1 for neurons, their size for heads.
        examples: the rows are this many examples of equal length, one behind the other; 1: the
            absolute value is that of the sum over all rows.
        accumulate_into: a tensor a gradient, ``[groups]``, to which the scores are added.
        backend: ``native``, ``triton``, ``reference``, or ``None`` to choose.

    Returns:
        One ``[groups]`` a gradient: float64 for float64, else float32; ``accumulate_into`` where it
        is given.

    Numerics: float32 inside (float64 for float64), rows summed up in parts that depend on the shape
    alone: the same bits every time.
    """
    _check(activation, grads, mask, width, examples)
    if accumulate_into is not None:
        _check_scores(accumulate_into, activation, len(grads), width)
    name = _backend.choose(OP, activation.device.type, backend, unsupported, activation)
    if name == "reference":
        found = gate_scores_reference(activation, grads, mask, width, examples)
    else:
        mask = None if mask is None else mask.contiguous()
        rows = [_rows_of(x) for x in (activation, *grads)]
        try:
            found = gate_scores_forward(name, rows[0], rows[1:], mask, width, examples)
        except RuntimeError as error:
            raise _checks.as_contract(OP, error) from None
    if accumulate_into is None:
        return list(found.unbind(0))
    return [scores.add_(more) for scores, more in zip(accumulate_into, found, strict=True)]


def unsupported(
    backend: str, activation: Tensor, grad: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can.

    ``device`` asks about another device type than that of the tensors.
    """
    if backend == "reference":
        return None
    device = device or activation.device.type
    if transforms_active():
        return "torch.func and forward-mode differentiation need the reference"
    if activation.dtype == torch.float64 and (backend, device) != ("native", "cpu"):
        return "the GPU kernels take float32, bfloat16 and float16, not float64"
    if backend == "native":
        return _native.reason(device)
    return _triton.reason(device) if backend == "triton" else None


def _score_dtype(activation: Tensor) -> torch.dtype:
    return torch.float64 if activation.dtype == torch.float64 else torch.float32


def _rows_of(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


# ---- checks --------------------------------------------------------------------------------------


def _check(
    activation: Tensor, grads: Sequence[Tensor], mask: Tensor | None, width: int, examples: int
) -> None:
    _checks.float_matrix(OP, "activation", activation, columns="groups * width")
    _checks.no_grad(OP, "activation", activation)
    rows, columns = activation.shape
    if not 1 <= len(grads) <= MOST_GRADS:
        raise ValueError(f"{OP}: grads must be one or two tensors, got {len(grads)}")
    for i, grad in enumerate(grads):
        name = f"grads[{i}]"
        if grad.shape != activation.shape:
            raise ValueError(
                f"{OP}: {name} must have the shape of activation {list(activation.shape)}, got "
                f"{list(grad.shape)}"
            )
        if grad.dtype != activation.dtype:
            raise TypeError(
                f"{OP}: {name} must have the dtype of activation {activation.dtype}, got "
                f"{grad.dtype}"
            )
        _checks.float_matrix(OP, name, grad, columns="groups * width")
        _checks.same_device(OP, name, grad, activation.device)
        _checks.no_grad(OP, name, grad)
    if width < 1 or columns % width != 0:
        raise ValueError(f"{OP}: width must divide the {columns} columns, got {width}")
    if examples < 1 or rows % examples != 0:
        raise ValueError(f"{OP}: examples must divide the {rows} rows, got {examples}")
    if mask is not None:
        _checks.row_vector(OP, "mask", mask, rows, (torch.bool,))
        _checks.same_device(OP, "mask", mask, activation.device)


def _check_scores(scores: Sequence[Tensor], activation: Tensor, count: int, width: int) -> None:
    if len(scores) != count:
        raise ValueError(
            f"{OP}: accumulate_into must have a tensor for each of the {count} gradients, got "
            f"{len(scores)}"
        )
    for x in scores:
        _checks.row_vector(
            OP,
            "accumulate_into",
            x,
            activation.shape[1] // width,
            (_score_dtype(activation),),
        )
        _checks.same_device(OP, "accumulate_into", x, activation.device)
        _checks.no_grad(OP, "accumulate_into", x)
