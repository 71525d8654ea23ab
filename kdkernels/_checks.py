"""Argument checks that have more than one caller. Error form: ``<op>: <argument> must <contract>,
got <fact>``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._op import transforms_active

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def float_matrix(op: str, name: str, x: Tensor, columns: str = "classes") -> None:
    """``x`` is a 2-D floating tensor."""
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"{op}: {name} must be [rows, {columns}], got shape {list(x.shape)}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor, got {x.layout}")
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


def row_inputs(
    op: str,
    student: Tensor,
    labels: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the losses take beside the models' tensors: checked, and as every kernel reads it."""
    rows, device = student.shape[0], student.device
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    if labels is not None:
        row_vector(op, "labels", labels, rows, (torch.int64,))
        same_device(op, "labels", labels, device)
        labels = labels.contiguous()
    if row_weights is not None:
        row_vector(op, "row_weights", row_weights, rows, FLOAT_DTYPES)
        same_device(op, "row_weights", row_weights, device)
        no_grad(op, "row_weights", row_weights)
        row_weights = row_weights.to(wide).contiguous()
    if denominator is not None:
        same_device(op, "denominator", denominator, device)
        denominator = denominator.to(wide)
    return labels, row_weights, denominator


def head(op: str, model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The linear map from hidden states to logits; ``model`` begins its names (``student_``)."""
    float_matrix(op, f"{model}weight", weight)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{op}: {model}weight must be [vocab, {hidden.shape[1]}] for hidden states "
            f"{list(hidden.shape)}, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: {model}bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    for name, x in ((f"{model}weight", weight), (f"{model}bias", bias)):
        if x is None:
            continue
        same_device(op, name, x, hidden.device)
        if x.dtype != hidden.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of the hidden states "
                f"{_dtype(hidden)}, got {_dtype(x)}"
            )


def labels_in_range(op: str, labels: Tensor, columns: int, spec: Any) -> None:
    """Raises for an out-of-range label where looking costs no synchronisation."""
    if not spec.needs_labels or labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if transforms_active():
        return
    classes = spec.classes if spec.classes >= 0 else columns
    wrong = (labels != spec.ignore_index) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        row = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            f"{op}: labels must be in [0, {classes}) or ignore_index {spec.ignore_index}, "
            f"got {int(labels[row])} in row {row}"
        )


def as_contract(op: str, error: RuntimeError) -> Exception:
    """A native check's error as ``ValueError``, without the place in the C++ source."""
    message = str(error)
    start = message.find(f"{op}: ")
    if start < 0 or " must " not in message:
        return error
    return ValueError(message[start:].splitlines()[0].rstrip("'\""))


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
