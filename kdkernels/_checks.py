"""Argument checks that have more than one caller. Error form: ``<op>: <argument> must <contract>,
got <fact>``.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def float_matrix(op: str, name: str, x: Tensor) -> None:
    """``x`` is a 2-D floating tensor."""
    if x.dim() != 2:
        raise ValueError(f"{op}: {name} must be [rows, classes], got shape {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {_dtype(x)}"
        )


def same_device(op: str, name: str, x: Tensor, device: torch.device) -> None:
    """``x`` is on ``device``."""
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")


def no_grad(op: str, name: str, x: Tensor) -> None:
    """``x`` takes no gradient: the op has none for it and must not drop it in silence."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} must not require grad (it gets none; detach it, or compute it under "
            "torch.no_grad()), got requires_grad=True"
        )


def row_vector(op: str, name: str, x: Tensor, rows: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """``x`` has one value a row."""
    if x.dim() != 1 or x.shape[0] != rows:
        raise ValueError(f"{op}: {name} must be [{rows}], got shape {list(x.shape)}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {wanted}, got {_dtype(x)}")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
