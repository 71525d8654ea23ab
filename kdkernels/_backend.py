"""Which backend runs: the names, the automatic choice, and the explanation of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

BACKENDS = ("native", "triton", "reference")

# What the automatic choice tries, in this order. CPU: Triton would run interpreted, so it is
# never chosen there. CUDA: the native kernels read each logit once; see CONTRIBUTING for the
# state of their measurement.
PREFERENCE = {"cuda": ("native", "triton", "reference"), "cpu": ("native", "reference")}

_extra: tuple[str, ...] = ()  # backends that tests register, e.g. the host emulation of CUDA
_forced: str | None = None

# Says why a backend (first argument) cannot run a call on these tensors; None when it can.
Unsupported = Callable[..., str | None]


def check_name(caller: str, backend: str) -> None:
    """Raises ``ValueError`` unless ``backend`` is a known name."""
    if backend not in BACKENDS and backend not in _extra:
        known = ", ".join(BACKENDS + _extra)
        raise ValueError(f"{caller}: backend must be one of {known}, got {backend!r}")


def register_backend(name: str) -> None:
    """Admits one more backend name (explicit use only, never chosen automatically)."""
    global _extra
    if name not in _extra:
        _extra = (*_extra, name)


def choose(
    op: str, device: str, requested: str | None, unsupported: Unsupported, *tensors: Tensor | None
) -> str:
    """The backend of a call.

    Args:
        op: name of the op, for messages.
        device: device type of the tensors.
        requested: what the caller asked for; ``None`` for the automatic choice.
        unsupported: says why a backend cannot run this call, or ``None`` when it can.
        *tensors: what ``unsupported`` looks at.

    Raises:
        ValueError: unknown name.
        NotImplementedError: the requested backend cannot run the call. A request never falls back.
    """
    name = _forced if requested is None else requested
    if name is None:
        for name in PREFERENCE.get(device, ("reference",)):
            if unsupported(name, *tensors, device=device) is None:
                return name
        reasons = "; ".join(
            f"{name}: {unsupported(name, *tensors, device=device)}" for name in BACKENDS
        )
        raise NotImplementedError(f"{op}: no backend runs this call: {reasons}")
    check_name(op, name)
    reason = unsupported(name, *tensors, device=device)
    if reason is not None:
        raise NotImplementedError(f"{op}: backend {name!r} cannot run this call: {reason}")
    return name


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Makes every op of the process use one backend inside the ``with`` block.

    Like an explicit ``backend=`` argument it never falls back: a call that the backend cannot run
    raises with the reason. The setting is process-wide, not per thread.

    Example:
        >>> import kdkernels, torch
        >>> with kdkernels.use_backend("reference"):
        ...     loss = kdkernels.kd_loss(torch.zeros(2, 5), None, torch.tensor([0, 3]))
        >>> round(loss.item(), 4)
        1.6094
    """
    global _forced
    check_name("use_backend", backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before
