"""Interchange interventions: spans, positions or subspaces of a source run in a base run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels.api._spec import choice
from kdkernels.ops import interchange as op
from kdkernels.ops.interchange import Mode

__all__ = ["interchange", "interchange_at", "interchange_subspace"]

MODES = {"swap": Mode.SWAP, "add": Mode.ADD, "subtract": Mode.SUBTRACT}
INDEX_DTYPES = (torch.int64, torch.int32)


def interchange(
    base: Tensor,
    source: Tensor,
    *,
    base_start: Tensor,
    source_start: Tensor,
    length: Tensor,
    source_row: Tensor | None = None,
    dims: slice | tuple[int, int] | None = None,
    mode: str = "swap",
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""The base's hidden states with a span of the source's in each row, in one pass.

    For row ``b``, ``k`` in ``[0, length[b])`` and the columns ``dims``::

        swap:      out[b, base_start[b] + k] = source[row, source_start[b] + k]
        add:       out[b, base_start[b] + k] = base[...] + source[...]
        subtract:  out[b, base_start[b] + k] = base[...] - source[...]

    and everything else is the base; ``row = source_row[b]``, or ``b``.

    Args:
        base: ``[batch, seq, hidden]``, float32, bfloat16, float16 or float64. Gets a gradient.
        source: ``[rows, source_seq, hidden]``, the dtype of the base. Gets a gradient: detach it
            for a source that is only read. Rows may be read by several spans, or by none.
        base_start: ``[batch]`` int64 or int32, where the span begins in the base. This and the next
            three stay on the device: nothing is synchronised.
        source_start: ``[batch]``, where it begins in the source.
        length: ``[batch]``; 0 leaves the row as it is.
        source_row: ``[batch]``, the row of the source; ``None``: that of the base.
        dims: columns, ``slice`` or ``(start, stop)``, e.g. those of some heads; ``None``: all.
        mode: ``swap``, ``add`` or ``subtract``.
        inplace: write into ``base`` and return it: only spans are touched. Not for a leaf that
            requires grad. Backward raises autograd's error where whoever made the base has kept it
            (relu and tanh do; linear layers and layer norm do not); the default never does.
        backend: ``native``, ``triton`` or ``reference``; ``None`` chooses.

    Returns:
        ``[batch, seq, hidden]``, the dtype of the base.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument. A
            span out of range is named with its row on the CPU. On a device looking would
            synchronise (and a compiled graph does not look): what of a span is out of range there,
            in the base or in the source, leaves the base alone.
        TypeError: dtypes that do not fit.
        NotImplementedError: the named backend cannot run this call.

    Note:
        ``swap`` moves values unchanged; sums are formed in float32 and rounded once. Backward is
        one pass a gradient: for the base the upstream gradient with zeros where it was overwritten;
        for the source the upstream gradient of every position that read it, summed in float32 in
        the order of the rows, so that the bits are the same every time, and zeros elsewhere.
        Memory: the result; nothing is kept for the backward pass but the index.

    References:
        Geiger et al., Inducing Causal Structure for Interpretable Neural Networks, arXiv
        2112.00826; Wu et al., Causal Distillation for Language Models, arXiv 2112.02505.

    Example:
        >>> import kdkernels, torch
        >>> base, source = torch.zeros(2, 4, 3), torch.ones(2, 5, 3)
        >>> start, length = torch.tensor([0, 2]), torch.tensor([1, 2])
        >>> out = kdkernels.interchange(
        ...     base, source, base_start=start, source_start=start + 1, length=length
        ... )
        >>> out[..., 0].tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """
    name = "interchange"
    index = _spans(name, base, source, base_start, source_start, length, source_row)
    return op.interchange(
        base,
        source,
        index,
        _mode(name, mode),
        *_columns(name, base, dims),
        inplace=inplace,
        backend=backend,
    )


def interchange_at(
    base: Tensor,
    source: Tensor,
    base_index: Tensor,
    source_index: Tensor,
    *,
    dims: slice | tuple[int, int] | None = None,
    mode: str = "swap",
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""As :func:`interchange`, by a list of positions instead of spans.

    ``out[base_index[i]] = source[source_index[i]]`` for every pair ``i`` (with ``add`` and
    ``subtract`` base plus or minus that). One flat list, because rows of a batch may have different
    numbers of positions.

    Args:
        base: ``[batch, seq, hidden]``. Gets a gradient.
        source: ``[rows, source_seq, hidden]``. Gets a gradient.
        base_index: ``[n, 2]`` int64 or int32, (row, position). A pair whose row is negative is
            unused: lists of different lengths fill up with them to one shape. Of pairs with the
            same base position the last counts.
        source_index: ``[n, 2]``, (row, position).
        dims: as in :func:`interchange`.
        mode: as in :func:`interchange`.
        inplace: as in :func:`interchange`.
        backend: as in :func:`interchange`.

    Returns:
        ``[batch, seq, hidden]``, the dtype of the base.

    Raises:
        ValueError: as :func:`interchange`.
        TypeError: as :func:`interchange`.
        NotImplementedError: as :func:`interchange`.

    Note:
        The list becomes a map of the base's positions first, and that is sorted for the gradient of
        the source: some launches more than spans take.

    Example:
        >>> import kdkernels, torch
        >>> base, source = torch.zeros(2, 4, 3), torch.ones(2, 5, 3)
        >>> pairs = torch.tensor([[0, 3], [1, 0], [1, 2]])
        >>> kdkernels.interchange_at(base, source, pairs, pairs)[..., 0].tolist()
        [[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]
    """
    name = "interchange_at"
    _check_states(name, base, source)
    indexes = []
    for what, x in (("base_index", base_index), ("source_index", source_index)):
        if x.dim() != 2 or x.shape[1] != 2 or x.shape[0] != base_index.shape[0]:
            raise ValueError(
                f"{name}: {what} must be [n, 2] with one n for both, got shape {list(x.shape)}"
            )
        _check_integers(name, what, x, base.device)
        indexes.append(x.to(torch.int64))
    unused = indexes[0][:, 0] < 0
    op.check_pairs(name, "base_index", indexes[0], base.shape, unused)
    op.check_pairs(name, "source_index", indexes[1], source.shape, unused)
    return op.interchange(
        base,
        source,
        [op.map_of_pairs(indexes[0], indexes[1], base.shape, source.shape)],
        _mode(name, mode),
        *_columns(name, base, dims),
        inplace=inplace,
        backend=backend,
    )


def interchange_subspace(
    base: Tensor,
    source: Tensor,
    basis: Tensor,
    *,
    base_start: Tensor,
    source_start: Tensor,
    length: Tensor,
    source_row: Tensor | None = None,
    max_length: int | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Swaps a subspace of the hidden states: ``base + (source - base) R R^T`` on the spans.

    What the base has in the span of the columns of ``R`` is replaced by what the source has there;
    what is orthogonal to them stays (distributed alignment search). Two thin products over the
    positions of the spans, where rotating both runs and back takes three of ``hidden x hidden``.

    Args:
        base: ``[batch, seq, hidden]``. Gets a gradient.
        source: ``[rows, source_seq, hidden]``. Gets a gradient.
        basis: ``[hidden, k]`` float32 (float64 for float64 states), orthonormal columns, which is
            the caller's care (``torch.nn.utils.parametrizations.orthogonal``). Gets a gradient.
        base_start: as in :func:`interchange`.
        source_start: as in :func:`interchange`.
        length: as in :func:`interchange`.
        source_row: as in :func:`interchange`.
        max_length: no span is longer: positions for which products are computed. ``None``: read
            from ``length`` on the CPU; on a device, where that would synchronise, the shorter of
            the sequences. What of a span is behind it is left alone on a device.
        inplace: as in :func:`interchange`.
        backend: as in :func:`interchange`, of the kernels that move positions.

    Returns:
        ``[batch, seq, hidden]``, the dtype of the base.

    Raises:
        ValueError: as :func:`interchange`.
        TypeError: as :func:`interchange`.
        NotImplementedError: as :func:`interchange`.

    Note:
        Differences and products are float32 (also under autocast) and rounded once, to the dtype of
        the base. Memory: two float32 copies of the spans' positions above the result.

    References:
        Geiger et al., Finding Alignments Between Interpretable Causal Variables and Distributed
        Neural Representations, arXiv 2303.02536.

    Example:
        >>> import kdkernels, torch
        >>> base, source, zero = torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.tensor([0])
        >>> spans = {"base_start": zero, "source_start": zero, "length": zero + 1}
        >>> first_axis = torch.tensor([[1.0], [0.0]])
        >>> kdkernels.interchange_subspace(base, source, first_axis, **spans).tolist()
        [[[1.0, 0.0], [0.0, 0.0]]]
    """
    name = "interchange_subspace"
    index = _spans(name, base, source, base_start, source_start, length, source_row)
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    if basis.dim() != 2 or basis.shape[0] != base.shape[2]:
        raise ValueError(
            f"{name}: basis must be [{base.shape[2]}, k], got shape {list(basis.shape)}"
        )
    if basis.dtype != wide:
        raise TypeError(f"{name}: basis must be {wide}, got {basis.dtype}")
    _checks.same_device(name, "basis", basis, base.device)
    length = index[2]
    width = _longest(name, base, source, length, max_length)
    if width == 0 or base.shape[0] == 0:
        return base if inplace else base.clone()
    if max_length is not None:
        length = length.clamp(max=width)
    start = torch.zeros_like(length)

    def span(x: Tensor, begin: Tensor, rows: list[Tensor]) -> Tensor:
        """The positions of a span, zeros behind it: by the kernels, for their backward's sake."""
        nothing = x.new_zeros(base.shape[2]).expand(base.shape[0], width, -1)
        taken = op.interchange(nothing, x, [start, begin, length, *rows], backend=backend)
        return taken.to(wide)

    old = span(base, index[0], [])
    new = span(source, index[1], index[3:])
    with torch.autocast(base.device.type, enabled=False):
        value = old + ((new - old) @ basis) @ basis.T
    index = [index[0], start, length]
    return op.interchange(base, value.to(base.dtype), index, inplace=inplace, backend=backend)


def _spans(
    name: str,
    base: Tensor,
    source: Tensor,
    base_start: Tensor,
    source_start: Tensor,
    length: Tensor,
    source_row: Tensor | None,
) -> list[Tensor]:
    """The index of the kernels: checked."""
    _check_states(name, base, source)
    given: dict[str, Any] = {
        "base_start": base_start,
        "source_start": source_start,
        "length": length,
    }
    if source_row is not None:
        given["source_row"] = source_row
    for what, x in given.items():
        if not isinstance(x, Tensor) or x.dim() != 1 or x.shape[0] != base.shape[0]:
            fact = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: {what} must be a tensor [{base.shape[0]}], got {fact}")
        _check_integers(name, what, x, base.device)
    index = [x.to(torch.int64).contiguous() for x in given.values()]
    op.check_spans(name, index, base.shape, source.shape)
    return index


def _check_states(name: str, base: Tensor, source: Tensor) -> None:
    for what, x in (("base", base), ("source", source)):
        if x.dim() != 3:
            raise ValueError(
                f"{name}: {what} must be [rows, positions, hidden], got shape {list(x.shape)}"
            )


def _check_integers(name: str, what: str, x: Tensor, device: torch.device) -> None:
    if x.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: {what} must be int64 or int32, got {x.dtype}")
    _checks.same_device(name, what, x, device)


def _mode(name: str, mode: str) -> Mode:
    choice(name, "mode", mode, tuple(MODES))
    return MODES[mode]


def _columns(name: str, base: Tensor, dims: slice | tuple[int, int] | None) -> tuple[int, int]:
    hidden = base.shape[2]
    if dims is None:
        return 0, hidden
    if isinstance(dims, slice):
        begin, end, step = dims.indices(hidden)
        if step != 1:
            raise ValueError(f"{name}: dims must be a slice of step 1, got step {step}")
        return begin, max(begin, end)
    begin, end = dims
    if not 0 <= begin <= end <= hidden:
        raise ValueError(f"{name}: dims must be in [0, {hidden}], got ({begin}, {end})")
    return begin, end


def _longest(
    name: str, base: Tensor, source: Tensor, length: Tensor, max_length: int | None
) -> int:
    """Positions for which a subspace is computed."""
    most = min(base.shape[1], source.shape[1])
    if max_length is not None and max_length < 0:
        raise ValueError(f"{name}: max_length must be 0 or more, got {max_length}")
    if length.device.type == "cpu" and not torch.compiler.is_compiling() and length.numel():
        longest = int(length.max())
        if max_length is not None and longest > max_length:
            row = int(length.argmax())
            raise ValueError(
                f"{name}: length must be at most max_length {max_length}, got {longest} in row "
                f"{row}"
            )
        return longest
    return most if max_length is None else min(most, max_length)
