"""One primitive = one operator name; its backends are overloads of that name.

A primitive is declared once, here in Python (schema and fake), so that it exists without any
compiled library. C++ attaches kernels to the plain overload, ``kdkernels::name`` (CPU and CUDA by
dispatch key); Triton launchers attach to ``kdkernels::name.triton``. A profile or a compiled graph
thus names the kernel that ran.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

NAMESPACE = "kdkernels"
# Bound once: looking a name up through three modules takes longer than the call.
is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_library = torch.library.Library(NAMESPACE, "DEF")


class Primitive:
    """A fixed-arity kernel boundary that several backends implement.

    Args:
        name: operator name; the operator is ``kdkernels::name``.
        schema: arguments and returns, e.g. ``"(Tensor x, float a) -> Tensor"``.
        fake: shape function; mirrors what every backend allocates. ``None`` for an operator that
            only writes its arguments.
        compiled: whether a compiled library attaches the native kernels; otherwise
            :meth:`launcher` does.
    """

    def __init__(
        self, name: str, schema: str, *, fake: Callable[..., Any] | None, compiled: bool = True
    ) -> None:
        self.name = name
        self.compiled = compiled
        self._schema = schema
        self._fake = fake if fake is not None else _returns_nothing
        self._calls: dict[str, Callable[..., Any]] = {}
        self._overloads: dict[str, Any] = {}
        if compiled:
            self.define("native")

    def define(self, backend: str) -> None:
        """Declares the overload of a backend whose kernels a compiled library attaches."""
        qualified = self._qualified(backend)
        overload = qualified.removeprefix(self.name)
        _library.define(f"{qualified}{self._schema}")
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", self._fake, lib=_library)
        packet = getattr(torch.ops.kdkernels, self.name)
        self._overloads[backend] = getattr(packet, overload[1:] or "default")
        # What the overload itself calls; its Python layer costs 0.2 us.
        self._calls[backend] = self._overloads[backend]._op

    def launcher(self, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Attaches a Python launcher; eager calls reach it without passing the dispatcher."""

        def attach(function: Callable[..., Any]) -> Callable[..., Any]:
            self.define(backend)
            _library.impl(self._qualified(backend), function, "CompositeExplicitAutograd")
            self._calls[backend] = function
            return function

        return attach

    def _qualified(self, backend: str) -> str:
        return self.name if backend == "native" else f"{self.name}.{backend}"

    def overload(self, backend: str) -> Any:
        """The ``OpOverload`` of a backend, for ``opcheck`` and graph inspection."""
        return self._overloads[backend]

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that have an overload."""
        return tuple(self._overloads)

    def __call__(self, backend: str, *args: Any) -> Any:
        if is_compiling():
            return self._overloads[backend](*args)
        return self._calls[backend](*args)


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its Python layer, which serves ``torch.func`` and costs 1.2 us.

    For ops that refuse ``torch.func`` transforms (see :func:`transforms_active`).
    """
    direct = torch._C._FunctionBase.__dict__["apply"].__get__(None, function)

    def apply(*args: Any) -> Any:
        if is_compiling():
            return function.apply(*args)
        return direct(*args)

    return apply


def transforms_active() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation looks at the call.

    Operators without rules for them would drop their tangents in silence.
    """
    if is_compiling():
        return False
    return _functorch_active() or forward_ad._current_level >= 0


def refuse_create_graph(op: str) -> None:
    """Raises in a backward pass that is itself recorded, where a gradient would be a constant.

    ``torch.autograd.function.once_differentiable`` only raises where the *upstream* gradient
    requires grad, which that of a plain loss does not: a gradient penalty would be dropped.
    """
    if torch.is_grad_enabled() and not is_compiling():
        raise RuntimeError(
            f"{op}: backend must be 'reference' for create_graph=True, got a compiled backend"
        )


def _returns_nothing(*args: Any) -> None:
    return None
