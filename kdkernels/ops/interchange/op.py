"""The contract of ``interchange``: primitives, fakes, autograd, backend support, checks.

Spans and lists of positions are two forms of one index, see ``index.py``. Layers above
(``kdkernels.api``) bring the users' arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels import _backend, _checks, _native, _triton
from kdkernels._op import Primitive, direct_apply, refuse_create_graph, transforms_active
from kdkernels.ops.interchange.index import MAP_TENSORS, readers_of_map
from kdkernels.ops.interchange.reference import interchange_reference
from kdkernels.ops.interchange.spec import Mode

OP = "interchange"

# kind: a number of Mode (an operator's argument must not be named mode for functionalization).
_INPUTS = "Tensor source, Tensor[] index, int kind, SymInt begin, SymInt end"


def _fake(base: Tensor, *args: Any) -> Tensor:
    return base.new_empty(base.shape)


def _fake_grad_source(
    grad: Tensor, index: list[Tensor], rows: int, positions: int, *args: Any
) -> Tensor:
    return grad.new_empty((rows, positions, grad.shape[2]))


interchange_forward = Primitive(OP, f"(Tensor base, {_INPUTS}) -> Tensor", fake=_fake)
interchange_ = Primitive(f"{OP}_", f"(Tensor(a!) base, {_INPUTS}) -> ()", fake=None)
# rows, positions: of the source. The gradient with zeros where the base was overwritten.
interchange_grad_base = Primitive(
    f"{OP}_grad_base",
    "(Tensor grad, Tensor[] index, SymInt rows, SymInt positions, SymInt begin, SymInt end) "
    "-> Tensor",
    fake=_fake,
)
# index: spans, or [order, first] of index.py. What went to each position of the source, summed in
# the order of the base.
interchange_grad_source = Primitive(
    f"{OP}_grad_source",
    "(Tensor grad, Tensor[] index, SymInt rows, SymInt positions, bool negative, SymInt begin, "
    "SymInt end) -> Tensor",
    fake=_fake_grad_source,
)


def interchange(
    base: Tensor,
    source: Tensor,
    index: Sequence[Tensor],
    mode: Mode = Mode.SWAP,
    begin: int = 0,
    end: int | None = None,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The base with positions of the source in it.

    ``out[b, p, begin:end] = source[r, q, begin:end]`` where the index sends ``(r, q)`` to
    ``(b, p)``, or base plus or minus that; everything else is the base.

    Args:
        base: ``[batch, seq, hidden]`` float32, bfloat16, float16 or (reference, CPU) float64; any
            strides of rows and positions, unit column stride (another layout is copied).
        source: ``[rows, positions, hidden]``, the dtype of the base.
        index: ``[base_start, source_start, length]`` and perhaps ``source_row``, each ``[batch]``
            int64; or ``[sources]``, ``[batch, seq]`` int64. See ``index.py``.
        mode: what happens there.
        begin: first column that is touched.
        end: the one behind the last; ``None``: all.
        inplace: write into the base and return it.
        backend: ``native``, ``triton``, ``reference``, or ``None`` to choose.

    Returns:
        ``[batch, seq, hidden]``, contiguous unless in place.

    Numerics: values are moved, not computed with, by ``swap``. Sums are formed in float32 (float64)
    and rounded once; so is the gradient of a source position that several base positions read,
    summed in their order: the same bits every time.
    """
    end = base.shape[-1] if end is None else end
    _check(base, source, index, begin, end, inplace)
    name = _backend.choose(OP, base.device.type, backend, unsupported, base, source)
    call = (int(mode), begin, end)
    if name == "reference":
        out = interchange_reference(base, source, index, *call)
        return base.copy_(out) if inplace else out
    if inplace and torch.compiler.is_compiling():
        # A compiled graph writes nothing in place; it drops the copy of what it made itself.
        return base.copy_(interchange(base, source, index, mode, begin, end, backend=name))
    source = _rows_of(source)
    try:
        if torch.is_grad_enabled() and (base.requires_grad or source.requires_grad):
            result: Tensor = _apply(base, source, name, inplace, *call, *index)
            return result
        if not inplace:
            out = interchange_forward(name, _rows_of(base), source, list(index), *call)
            assert isinstance(out, Tensor)
            return out
        interchange_(name, base, source, list(index), *call)
    except RuntimeError as error:
        raise _checks.as_contract(OP, error) from None
    if not base.is_inference():
        torch.autograd.graph.increment_version(base)
    return base


def unsupported(
    backend: str, base: Tensor, source: Tensor | None = None, *, device: str | None = None
) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can.

    ``device`` asks about another device type than that of the tensors.
    """
    if backend == "reference":
        return None
    device = device or base.device.type
    if transforms_active():
        return "torch.func and forward-mode differentiation need the reference"
    if base.dtype == torch.float64 and (backend, device) != ("native", "cpu"):
        return "the GPU kernels take float32, bfloat16 and float16, not float64"
    if backend == "native":
        return _native.reason(device)
    return _triton.reason(device) if backend == "triton" else None


# ---- autograd ------------------------------------------------------------------------------------


class Interchange(torch.autograd.Function):
    """Keeps the index and the sizes, no state: whoever made the base may overwrite it."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        source: Tensor,
        backend: str,
        inplace: bool,
        mode: int,
        begin: int,
        end: int,
        *index: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*index)
        ctx.backend, ctx.call = backend, (mode, begin, end)
        ctx.rows, ctx.positions = source.shape[:2]
        call = (source, list(index), mode, begin, end)
        if not inplace:
            out: Tensor = interchange_forward(backend, _rows_of(base), *call)
            return out
        interchange_(backend, base, *call)
        ctx.mark_dirty(base)
        return base

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph(OP)
        mode, begin, end = ctx.call
        index = list(ctx.saved_tensors)  # once: checkpointing counts
        none = (None,) * (5 + len(index))
        source = (ctx.rows, ctx.positions)
        grad = _rows_of(grad)
        grad_base = grad_source = None
        if ctx.needs_input_grad[0]:
            grad_base = grad
            if mode == Mode.SWAP:
                grad_base = interchange_grad_base(ctx.backend, grad, index, *source, begin, end)
        if ctx.needs_input_grad[1]:
            if len(index) == MAP_TENSORS:
                index = readers_of_map(index[0], *source)
            grad_source = interchange_grad_source(
                ctx.backend, grad, index, *source, mode == Mode.SUBTRACT, begin, end
            )
        return grad_base, grad_source, *none


_apply = direct_apply(Interchange)


def _rows_of(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


# ---- checks --------------------------------------------------------------------------------------


def _check(
    base: Tensor, source: Tensor, index: Sequence[Tensor], begin: int, end: int, inplace: bool
) -> None:
    for name, x in (("base", base), ("source", source)):
        if x.dim() != 3:
            raise ValueError(
                f"{OP}: {name} must be [rows, positions, hidden], got shape {list(x.shape)}"
            )
        if x.layout != torch.strided:
            raise TypeError(f"{OP}: {name} must be a strided tensor, got {x.layout}")
    if base.dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(
            f"{OP}: base must be float32, bfloat16, float16 or float64, got {base.dtype}"
        )
    _checks.same_device(OP, "source", source, base.device)
    if source.dtype != base.dtype:
        raise TypeError(
            f"{OP}: source must have the dtype of the base {base.dtype}, got {source.dtype}"
        )
    if source.shape[2] != base.shape[2]:
        raise ValueError(
            f"{OP}: source must have the {base.shape[2]} columns of the base, got {source.shape[2]}"
        )
    if not 0 <= begin <= end <= base.shape[2]:
        raise ValueError(f"{OP}: dims must be in [0, {base.shape[2]}], got ({begin}, {end})")
    shape = base.shape[:2] if len(index) == MAP_TENSORS else base.shape[:1]
    for i, x in enumerate(index):
        if x.shape != shape or x.dtype != torch.int64 or x.device != base.device:
            raise ValueError(
                f"{OP}: index[{i}] must be {list(shape)} int64 on {base.device}, got "
                f"{list(x.shape)} {x.dtype} on {x.device}"
            )
    if inplace:
        _check_inplace(base, source)


def _check_inplace(base: Tensor, source: Tensor) -> None:
    if base.requires_grad and base.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            f"{OP}: base must not be a leaf that requires grad with inplace=True, got one"
        )
    if torch.compiler.is_compiling():
        return
    if base.shape[2] > 1 and base.stride(2) != 1:
        raise ValueError(
            f"{OP}: base must have unit column stride with inplace=True, got {base.stride(2)}"
        )
    if any(size > 1 and step == 0 for size, step in zip(base.shape, base.stride(), strict=True)):
        raise ValueError(
            f"{OP}: base must not repeat its memory with inplace=True, got strides {base.stride()}"
        )
    (first, behind), (source_first, source_behind) = _extent(base), _extent(source)
    if first < source_behind and source_first < behind:
        raise ValueError(
            f"{OP}: source must not share the memory of the base with inplace=True, got a view of "
            "it (positions would be read after they were written)"
        )


def _extent(x: Tensor) -> tuple[int, int]:
    """Where the memory of a tensor begins and ends."""
    steps = zip(x.shape, x.stride(), strict=True)
    last = sum((size - 1) * step for size, step in steps) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
