"""Matching hidden states: one layer, or a whole map of layers in one launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels import _checks
from kdkernels.api._rows import check_weights, denominator_of
from kdkernels.api._spec import choice, number
from kdkernels.ops import hidden_match as op
from kdkernels.ops import linear_hidden_match as linear_op
from kdkernels.ops.hidden_match import Kind, Spec

__all__ = ["MatchParts", "hidden_match_loss", "hidden_match_many"]

KINDS = {
    "mse": Kind.MSE,
    "smooth_l1": Kind.SMOOTH_L1,
    "cosine": Kind.COSINE,
    "pkd": Kind.PKD,
}
REDUCTIONS = ("mean", "batchmean", "sum", "none")

Pair = tuple[Tensor, Tensor]
Projection = Callable[[Tensor], Tensor]


class MatchParts(NamedTuple):
    """A loss and the layers that it is the weighted sum of; only ``loss`` carries a gradient.

    Nothing was synchronised to make them: log them when you sync anyway.
    """

    loss: Tensor  # []
    layers: Tensor  # [layers], reduced like the loss, without the layers' weights
    n_valid: Tensor  # [], rows that count


def hidden_match_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "mse",
    mask: Tensor | None = None,
    row_weights: Tensor | None = None,
    projection: Projection | None = None,
    beta: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    return_parts: bool = False,
    backend: str | None = None,
) -> Any:  # a Tensor, or MatchParts with return_parts: a union would burden every typed caller
    r"""Distance of the student's hidden states to the teacher's, in one pass with its gradient.

    Per row (token) of width ``d`` that counts, with ``s`` the student's (projected) and ``t`` the
    teacher's state::

        mse:        sum (s - t)^2 / d                          (PyTorch's, TinyBERT's)
        smooth_l1:  sum h(s - t) / d,  h(x) = x^2 / (2 beta) below beta, else |x| - beta / 2
        cosine:     1 - cos(s, t)                              (DistilBERT)
        pkd:        sum (s / |s| - t / |t|)^2 / d              (patient knowledge distillation)

    Args:
        student: ``[..., width]``, float32, bfloat16, float16 or float64. Gets the gradient.
        teacher: ``[..., width]`` (with ``projection``: the width that it maps to), any of these
            dtypes; must not require grad.
        kind: ``mse``, ``smooth_l1``, ``cosine`` or ``pkd``.
        mask: ``[...]`` bool or 0/1, e.g. the attention mask; rows that are 0 are left out. They are
            never read, so they may hold NaN.
        row_weights: factors of the rows' losses, ``[...]`` or its first dimensions (``[batch]``:
            one weight an example, which changes that example's gradient only). They do not change
            the denominator.
        projection: maps the student's width to the teacher's. An ``nn.Linear`` is fused: its output
            exists for a chunk of rows at a time, and its weight and bias get their gradients.
            Anything else is called.
        beta: of ``smooth_l1``, 0 or more.
        reduction: ``mean`` (per row that counts), ``batchmean`` (by the first size of the states),
            ``sum``, or ``none`` (one value a row, 0 where left out).
        num_items_in_batch: divides the sum instead (gradient accumulation, several processes: see
            :func:`~kdkernels.global_valid_count`).
        return_parts: return :class:`MatchParts` instead of the loss.
        backend: ``native``, ``triton`` or ``reference``; ``None`` chooses.

    Returns:
        The loss, ``[]`` (``[...]`` with ``reduction="none"``); float64 for float64 states, else
        float32. Or :class:`MatchParts`.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument.
        TypeError: dtypes that do not fit.
        NotImplementedError: the named backend cannot run this call.

    Note:
        Arithmetic is float32. A row whose student's or teacher's state is all zeros has no
        direction: ``cosine`` and ``pkd`` are 0 there, and so is the gradient. Without a row that
        counts the loss and the gradient are 0. The gradient is computed in the forward pass and
        kept (one tensor like the states); with ``reduction="none"``, and for float16, in the
        backward pass.

    References:
        Jiao et al., TinyBERT, arXiv 1909.10351; Sanh et al., DistilBERT, arXiv 1910.01108; Sun et
        al., Patient Knowledge Distillation for BERT Model Compression, arXiv 1908.09355.

    Example:
        >>> import kdkernels, torch
        >>> student = torch.randn(2, 5, 8, requires_grad=True)
        >>> teacher, mask = torch.randn(2, 5, 8), torch.ones(2, 5)
        >>> loss = kdkernels.hidden_match_loss(student, teacher, kind="cosine", mask=mask)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([2, 5, 8])
    """
    return _match(
        "hidden_match_loss",
        [(student, teacher)],
        kind=kind,
        mask=mask,
        row_weights=row_weights,
        weights=None,
        projections=[projection],
        beta=beta,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        return_parts=return_parts,
        backend=backend,
    )


def hidden_match_many(
    pairs: Sequence[Pair],
    *,
    kind: str = "mse",
    mask: Tensor | None = None,
    row_weights: Tensor | None = None,
    weights: Sequence[float] | None = None,
    projections: Sequence[Projection | None] | None = None,
    beta: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    return_parts: bool = False,
    backend: str | None = None,
) -> Any:  # as hidden_match_loss
    r"""The weighted sum of :func:`hidden_match_loss` over pairs of layers, in one launch.

    ``loss = sum_l weights[l] * hidden_match_loss(student_l, teacher_l)``: a row's distance, then
    the mean over the rows that count, then the weighted sum over the layers.

    Args:
        pairs: ``(student, teacher)`` states of each pair of layers, e.g. from :class:`LayerMap`.
            Leading dimensions are the same in all pairs, widths may differ; the students have one
            dtype, the teachers have one.
        kind: as in :func:`hidden_match_loss`, for all pairs.
        mask: as in :func:`hidden_match_loss`, for all pairs.
        row_weights: as in :func:`hidden_match_loss`, for all pairs.
        weights: a number a pair; ``None``: 1 for each, so the loss is a sum, not a mean.
        projections: an entry a pair, ``None`` where the widths agree, e.g. :class:`Projections`.
            Pairs with a projection run one by one (their GEMMs take the time), the others together.
        beta: as in :func:`hidden_match_loss`.
        reduction: as in :func:`hidden_match_loss`; ``none`` gives the weighted sum of each row.
        num_items_in_batch: as in :func:`hidden_match_loss`.
        return_parts: return :class:`MatchParts`, with the loss of each pair.
        backend: as in :func:`hidden_match_loss`.

    Returns:
        As :func:`hidden_match_loss`.

    Raises:
        ValueError: no pairs, or as :func:`hidden_match_loss`.
        TypeError: as :func:`hidden_match_loss`.
        NotImplementedError: as :func:`hidden_match_loss`.

    Example:
        >>> import kdkernels, torch
        >>> student = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(3)]
        >>> teacher = [torch.randn(2, 5, 8) for _ in range(7)]
        >>> pairs = [(student[i], teacher[3 * i]) for i in range(3)]
        >>> kdkernels.hidden_match_many(pairs, return_parts=True).layers.shape
        torch.Size([3])
    """
    return _match(
        "hidden_match_many",
        pairs,
        kind=kind,
        mask=mask,
        row_weights=row_weights,
        weights=weights,
        projections=projections,
        beta=beta,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        return_parts=return_parts,
        backend=backend,
    )


def _match(
    name: str,
    pairs: Sequence[Pair],
    *,
    kind: str,
    mask: Tensor | None,
    row_weights: Tensor | None,
    weights: Sequence[float] | None,
    projections: Sequence[Projection | None] | None,
    beta: float,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    return_parts: bool,
    backend: str | None,
) -> Any:
    choice(name, "kind", kind, tuple(KINDS))
    choice(name, "reduction", reduction, REDUCTIONS)
    number(name, "beta", beta, 0.0, math.inf)
    pairs = _check_pairs(name, pairs)
    first = pairs[0][0]
    weights = _check_weights(name, weights, len(pairs))
    fits = _apply(name, pairs, projections)
    leading = first.shape[:-1]
    mask = _fold_mask(name, mask, first)
    row_weights = _fold_row_weights(name, row_weights, leading, mask)
    spec = Spec(int(KINDS[kind]), float(beta), reduction == "mean")
    per_row = reduction == "none"
    if per_row and (return_parts or num_items_in_batch is not None):
        raise ValueError(
            f"{name}: reduction must not be 'none' with return_parts or num_items_in_batch, got "
            "'none'"
        )
    denominator = None
    if num_items_in_batch is not None:
        denominator = denominator_of(name, first, num_items_in_batch)
    elif reduction == "batchmean":
        size = leading[0] if leading else 1
        denominator = torch.full((), size, device=first.device, dtype=torch.float32)
    call = _Call(mask, row_weights, denominator, spec, backend)
    try:
        if per_row:
            return call.rows(fits, weights).view(leading)
        loss, layers, n_valid = call.reduced(fits, weights)
    except (ValueError, TypeError, NotImplementedError) as error:
        # The ops speak of layers and rows, the caller of this function.
        raise type(error)(_named(str(error), name)) from None
    return MatchParts(loss, layers, n_valid) if return_parts else loss


class _Fit(NamedTuple):
    """A pair as the ops take it: rows, and the linear map between them, if any."""

    student: Tensor  # [rows, width]
    teacher: Tensor
    linear: nn.Linear | None


class _Call(NamedTuple):
    mask: Tensor | None
    row_weights: Tensor | None
    denominator: Tensor | None
    spec: Spec
    backend: str | None

    def reduced(
        self, fits: Sequence[_Fit], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, the loss of each pair, the number of rows."""
        others = (self.mask, self.row_weights, self.denominator)
        plain, linear = _sorted(fits)
        losses: list[Tensor] = []
        layers: dict[int, Tensor] = {}
        n_valid = None
        if plain:
            loss, parts = op.hidden_match(
                [fits[i].student for i in plain],
                [fits[i].teacher for i in plain],
                *others,
                [weights[i] for i in plain],
                self.spec,
                backend=self.backend,
            )
            losses.append(loss)
            layers.update(zip(plain, parts[:-1].unbind(), strict=True))
            n_valid = parts[-1]
        for i in linear:
            student, teacher, fit = fits[i]
            assert fit is not None
            loss, parts = linear_op.linear_hidden_match(
                student, teacher, *others, self.spec, head=(fit.weight, fit.bias),
                backend=self.backend,
            )  # fmt: skip
            losses.append(weights[i] * loss)
            layers[i], n_valid = parts.unbind()
        assert n_valid is not None
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total, torch.stack([layers[i] for i in range(len(fits))]), n_valid

    def rows(self, fits: Sequence[_Fit], weights: Sequence[float]) -> Tensor:
        """One value a row."""
        others = (self.mask, self.row_weights)
        plain, linear = _sorted(fits)
        found = []
        if plain:
            found.append(
                op.hidden_match_rows(
                    [fits[i].student for i in plain],
                    [fits[i].teacher for i in plain],
                    *others,
                    [weights[i] for i in plain],
                    self.spec,
                    backend=self.backend,
                )
            )
        for i in linear:
            student, teacher, fit = fits[i]
            assert fit is not None
            one = linear_op.linear_hidden_match_rows(
                student, teacher, *others, self.spec, head=(fit.weight, fit.bias),
                backend=self.backend,
            )  # fmt: skip
            found.append(weights[i] * one)
        total = found[0]
        for one in found[1:]:
            total = total + one
        return total


def _sorted(fits: Sequence[_Fit]) -> tuple[list[int], list[int]]:
    """The pairs without and with a linear map."""
    plain = [i for i, fit in enumerate(fits) if fit.linear is None]
    return plain, [i for i, fit in enumerate(fits) if fit.linear is not None]


def _named(message: str, name: str) -> str:
    for op_name in ("linear_hidden_match", "hidden_match"):
        message = message.replace(f"{op_name}: ", f"{name}: ")
    return message


# ---- the tensors of a call -----------------------------------------------------------------------


def _check_pairs(name: str, pairs: Sequence[Pair]) -> list[Pair]:
    if isinstance(pairs, Tensor) or not pairs:
        raise ValueError(f"{name}: pairs must be (student, teacher) tensors, got {_shown(pairs)}")
    checked: list[Pair] = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(
                f"{name}: pairs[{i}] must be a (student, teacher) pair, got {_shown(pair)}"
            )
        for which, x in zip(("student", "teacher"), pair, strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: {which} must be a Tensor, got {type(x).__name__}")
        student, teacher = pair
        leading = checked[0][0].shape[:-1] if checked else student.shape[:-1]
        if student.dim() < 1 or student.shape[:-1] != leading:
            raise ValueError(
                f"{name}: student must be {[*leading, 'width']}, got {list(student.shape)}"
            )
        if teacher.shape[:-1] != leading or teacher.dim() < 1:
            raise ValueError(
                f"{name}: teacher must have the leading shape of student {list(leading)}, got "
                f"{list(teacher.shape)}"
            )
        checked.append((student, teacher))
    return checked


def _apply(
    name: str, pairs: Sequence[Pair], projections: Sequence[Projection | None] | None
) -> list[_Fit]:
    """Rows of every pair; what is no ``nn.Linear`` is applied."""
    if projections is None:
        projections = [None] * len(pairs)
    if len(projections) != len(pairs):
        raise ValueError(
            f"{name}: projections must have an entry for each of the {len(pairs)} pairs, got "
            f"{len(projections)}"
        )
    fits = []
    for (student, teacher), projection in zip(pairs, projections, strict=True):
        linear = projection if type(projection) is nn.Linear else None
        if projection is not None and linear is None:
            student = projection(student)
        width = student.shape[-1] if linear is None else linear.out_features
        if linear is not None and linear.in_features != student.shape[-1]:
            raise ValueError(
                f"{name}: projection must take width {student.shape[-1]}, got "
                f"in_features={linear.in_features}"
            )
        if teacher.shape[-1] != width:
            where = "student" if projection is None else "the projected student"
            raise ValueError(
                f"{name}: teacher must have the width of {where} {width}, got {teacher.shape[-1]}"
                + ("; pass a projection to match different widths" if projection is None else "")
            )
        fits.append(_Fit(_rows(student), _rows(teacher), linear))
    return fits


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _check_weights(name: str, weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ValueError(
            f"{name}: weights must have an entry for each of the {count} pairs, got {len(weights)}"
        )
    for weight in weights:
        number(name, "weights", weight, -math.inf, math.inf)
    return [float(weight) for weight in weights]


def _fold_mask(name: str, mask: Tensor | None, student: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: mask must have the leading shape of student {list(student.shape[:-1])}, got "
            f"{list(mask.shape)}"
        )
    _checks.same_device(name, "mask", mask, student.device)
    return (mask if mask.dtype == torch.bool else mask != 0).reshape(-1)


def _fold_row_weights(
    name: str, row_weights: Tensor | None, leading: torch.Size, mask: Tensor | None
) -> Tensor | None:
    """Weights of rows, or of what the first dimensions count, as one vector over all rows."""
    if row_weights is None:
        return None
    size = row_weights.dim()
    if size == 0 or row_weights.shape != leading[:size]:
        raise ValueError(
            f"{name}: row_weights must have the leading shape of student {list(leading)} or its "
            f"first dimensions, got {list(row_weights.shape)}"
        )
    row_weights = row_weights.reshape(*row_weights.shape, *[1] * (len(leading) - size))
    flat = row_weights.expand(leading).reshape(-1)
    check_weights(name, flat, mask)
    return flat


def _shown(x: object) -> str:
    return f"a {type(x).__name__}" if isinstance(x, Tensor) else repr(x)[:60]
