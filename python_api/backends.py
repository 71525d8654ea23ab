"""Asking which backend runs, and why."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from kdkernels import ops
from kdkernels._backend import BACKENDS, choose, use_backend

__all__ = ["available_backends", "explain", "use_backend"]


def available_backends(op: str, device: str = "cpu") -> tuple[str, ...]:
    """The backends that can run an op on a device type, in the order of preference names.

    Args:
        op: name of an op, e.g. ``"kd_loss"``.
        device: device type, ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: unknown op.

    Example:
        >>> import kdkernels
        >>> "reference" in kdkernels.available_backends("kd_loss")
        True
    """
    module = _op(op)
    if device == "cuda" and not torch.cuda.is_available():
        return ()
    probe = torch.empty(0, 1, device="meta")
    return tuple(
        name for name in BACKENDS if module.unsupported(name, probe, device=device) is None
    )


def explain(op: str, *tensors: Tensor) -> str:
    """Says which backend a call on these tensors would use, and why not the others.

    Args:
        op: name of an op, e.g. ``"kd_loss"``.
        *tensors: the tensors of the call, in the op's order (for ``kd_loss``: student, teacher).

    Example:
        >>> import kdkernels, torch
        >>> print(kdkernels.explain("kd_loss", torch.zeros(2, 8)).splitlines()[0].split(":")[0])
        kd_loss on cpu
    """
    module = _op(op)
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(f"explain: tensors must be the tensors of the call, got {tensors!r}")
    device = tensors[0].device.type
    try:
        chosen = choose(op, device, None, module.unsupported, *tensors)
    except NotImplementedError as error:  # inside use_backend
        chosen = str(error)
    lines = [f"{op} on {device}: {chosen}"]
    for name in BACKENDS:
        if name != chosen:
            lines.append(f"  {name}: {module.unsupported(name, *tensors) or 'available'}")
    return "\n".join(lines)


def _op(name: str) -> ModuleType:
    if name not in ops.__all__:
        raise ValueError(f"op must be one of {', '.join(ops.__all__)}, got {name!r}")
    return importlib.import_module(f"kdkernels.ops.{name}")
