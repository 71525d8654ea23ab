"""Which positions of a source go where in a base: drawn on the CPU, before a batch is copied."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.api._spec import integer, number
from kdkernels.api.intervention import Positions, Spans

__all__ = ["masked_positions", "sample_positions", "sample_spans"]


def sample_spans(
    base_lengths: Tensor,
    source_lengths: Tensor,
    *,
    share: float = 0.3,
    max_length: int | None = None,
    source_row: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Spans:
    r"""Draws a span of consecutive positions in each row of a base and of its source.

    Row ``b`` exchanges ``c = int(share * min(base_lengths[b], source_lengths[row]))`` positions,
    from independent starts, each uniform over those where the span fits.

    Args:
        base_lengths: ``[batch]`` integers on the CPU, tokens of each row without padding.
        source_lengths: ``[rows]``, those of the source.
        share: of the shorter row, in [0, 1].
        max_length: no span is longer.
        source_row: ``[batch]``, the source's row for each row of the base; ``None``: the same.
        generator: source of the draws; ``None``: torch's own.

    Returns:
        :class:`kdkernels.Spans` on the CPU; their ``to(device)`` copies them.

    Raises:
        ValueError: lengths that do not fit or are not on the CPU.

    References:
        Wu et al., Causal Distillation for Language Models, arXiv 2112.02505.

    Example:
        >>> import kdkernels, torch
        >>> lengths = torch.tensor([10, 20])
        >>> spans = kdkernels.sample_spans(lengths, lengths, source_row=torch.tensor([1, 0]))
        >>> spans.length.tolist()
        [3, 3]
    """
    base, source, count = _counts(
        "sample_spans", base_lengths, source_lengths, share, max_length, source_row
    )

    def start(lengths: Tensor) -> Tensor:
        room = (lengths - count + 1).double()
        drawn = torch.rand(len(lengths), dtype=torch.float64, generator=generator)
        return (drawn * room).long()

    return Spans(start(base), start(source), count, source_row)


def sample_positions(
    base_lengths: Tensor,
    source_lengths: Tensor,
    *,
    share: float = 0.3,
    max_length: int | None = None,
    source_row: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Positions:
    r"""Draws single positions in each row of a base and of its source, without replacement.

    As many as :func:`sample_spans`; in ascending order the k-th of the source goes to the k-th of
    the base. Padding is never drawn.

    Args:
        base_lengths: as in :func:`sample_spans`, like the others.
        source_lengths: ``[rows]``.
        share: of the shorter row.
        max_length: no row exchanges more.
        source_row: ``[batch]``.
        generator: source of the draws.

    Returns:
        :class:`kdkernels.Positions` on the CPU.

    Raises:
        ValueError: as :func:`sample_spans`.

    References:
        Wu et al., Causal Distillation for Language Models, arXiv 2112.02505.

    Example:
        >>> import kdkernels, torch
        >>> positions = kdkernels.sample_positions(torch.tensor([10]), torch.tensor([7]))
        >>> positions.base_index.shape, bool((positions.source_index[:, 1] < 7).all())
        (torch.Size([2, 2]), True)
    """
    base, source, count = _counts(
        "sample_positions", base_lengths, source_lengths, share, max_length, source_row
    )
    row = torch.arange(len(count)) if source_row is None else source_row

    def drawn(lengths: Tensor, rows: Tensor) -> Tensor:
        width = int(lengths.max()) if len(lengths) else 0
        place = torch.arange(width)
        order = torch.rand(len(lengths), width, dtype=torch.float64, generator=generator)
        order[place >= lengths[:, None]] = 2.0  # padding comes last
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen.scatter_(1, order.argsort(1), place < count[:, None])
        found = chosen.nonzero()
        return torch.stack([rows[found[:, 0]], found[:, 1]], 1)

    return Positions(drawn(base, torch.arange(len(count))), drawn(source, row))


def masked_positions(
    masked: Tensor, source_lengths: Tensor, *, source_row: Tensor | None = None
) -> Positions:
    r"""The positions that are marked in the base, each exchanged with the same one of the source.

    Args:
        masked: ``[batch, seq]`` bool on the CPU, e.g. what a masked language model is to predict.
        source_lengths: ``[rows]``; positions behind a source's end are left out.
        source_row: ``[batch]``, as in :func:`sample_spans`.

    Returns:
        :class:`kdkernels.Positions` on the CPU.

    Raises:
        ValueError: tensors that do not fit or are not on the CPU.

    References:
        Wu et al., Causal Distillation for Language Models, arXiv 2112.02505.

    Example:
        >>> import kdkernels, torch
        >>> masked = torch.tensor([[False, True, False, True]])
        >>> kdkernels.masked_positions(masked, torch.tensor([3])).base_index.tolist()
        [[0, 1]]
    """
    name = "masked_positions"
    if masked.dim() != 2 or masked.dtype != torch.bool:
        raise ValueError(
            f"{name}: masked must be bool [batch, seq], got {masked.dtype} {list(masked.shape)}"
        )
    _, source, _ = _counts(
        name, torch.full((len(masked),), masked.shape[1]), source_lengths, 1.0, None, source_row
    )
    _check_cpu(name, "masked", masked)
    row = torch.arange(len(masked)) if source_row is None else source_row
    found = (masked & (torch.arange(masked.shape[1]) < source[:, None])).nonzero()
    return Positions(found, torch.stack([row[found[:, 0]], found[:, 1]], 1))


def _counts(
    name: str,
    base: Tensor,
    source: Tensor,
    share: float,
    max_length: int | None,
    source_row: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of the base and of its sources, row by row, and how many positions they exchange."""
    number(name, "share", share, 0.0, 1.0)
    if max_length is not None:
        integer(name, "max_length", max_length, 0)
    for argument, x in (("base_lengths", base), ("source_lengths", source)):
        if x.dim() != 1 or x.is_floating_point() or (x.numel() and int(x.min()) < 1):
            raise ValueError(
                f"{name}: {argument} must be integers of at least 1 in one dimension, got "
                f"{x.dtype} {list(x.shape)}"
            )
        _check_cpu(name, argument, x)
    if source_row is not None:
        _check_cpu(name, "source_row", source_row)
        source = source[source_row]
    if source.shape != base.shape:
        raise ValueError(
            f"{name}: source_lengths must have a row for each of the base's {len(base)}, got "
            f"{list(source.shape)}"
        )
    count = (share * torch.minimum(base, source).double()).long()
    return base, source, count if max_length is None else count.clamp(max=max_length)


def _check_cpu(name: str, argument: str, x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"{name}: {argument} must be on the CPU, before the copy, got {x.device}")
