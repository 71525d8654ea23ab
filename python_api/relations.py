"""Matching relations between tokens: MiniLM's self-relations, and attention maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels.api._rows import check_weights, denominator_of
from kdkernels.api._spec import choice, number
from kdkernels.ops import hidden_match as match_op
from kdkernels.ops import kd_loss as kd_op
from kdkernels.ops import relation_match as op
from kdkernels.ops.relation_match import Kind

__all__ = ["attention_match_loss", "relation_match_loss"]

KINDS = {"mse": Kind.MSE, "kl": Kind.KL}
REDUCTIONS = ("mean", "batchmean", "sum", "none")
_IGNORED = -100

Model = Tensor | tuple[Tensor, Tensor]


def relation_match_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    num_relation_heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""KL of the self-relations of a layer's queries, keys or values (MiniLM, MiniLMv2).

    Both tensors are split into ``R = num_relation_heads`` heads of width ``d = width / R``. For
    each example, head and token ``i`` that counts, over the tokens ``j`` that count::

        relation[i] = softmax_j( <A[i], A[j]> / sqrt(d) )
        row = KL( relation_teacher[i] || relation_student[i] )

    MiniLMv2's loss is the sum of three such calls, for queries, keys and values; MiniLM's value
    relation is one with as many heads as the model has.

    Args:
        student: ``[batch, seq, width]``, float32, bfloat16, float16 or float64; any strides. Gets
            the gradient, as a query and as a key.
        teacher: ``[batch, seq, width]``, any of these dtypes; its width may differ. Must not
            require grad.
        num_relation_heads: ``R``, which must divide both widths.
        mask: ``[batch, seq]`` bool or 0/1, e.g. the attention mask; tokens that are 0 count
            neither as queries nor as keys, and may hold NaN.
        causal: a token's relation has the tokens up to itself only.
        row_weights: ``[batch]`` or ``[batch, seq]`` factors of the rows' losses. They do not change
            the denominator, and a weight changes the gradient of its example only.
        reduction: ``mean`` (by the number of rows that count: heads times tokens), ``batchmean``
            (by the batch size), ``sum``, or ``none`` (one value a row, 0 where left out).
        num_items_in_batch: divides the sum instead.
        backend: ``native``, ``triton`` or ``reference``; ``None`` chooses.

    Returns:
        The loss, ``[]`` (``[batch, R, seq]`` with ``reduction="none"``); float64 for a float64
        student, else float32.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument.
        TypeError: dtypes that do not fit.
        NotImplementedError: the named backend cannot run this call.

    Note:
        ``[batch, R, seq, seq]`` is never stored: relations exist for a few heads and rows at a time
        (2 MB a thread on a CPU, 256 MB on a GPU), and loss and gradient are one pass.
        The gradient is computed in the forward pass and kept (one tensor like ``student``); with
        ``reduction="none"``, in the backward pass. Arithmetic is float32. On the CPU padding costs
        nothing. Without a token that counts the loss and the gradient are 0.

    References:
        Wang et al., MiniLM, arXiv 2002.10957; Wang et al., MiniLMv2, arXiv 2012.15828.

    Example:
        >>> import kdkernels, torch
        >>> student = torch.randn(2, 6, 16, requires_grad=True)
        >>> teacher, mask = torch.randn(2, 6, 24), torch.ones(2, 6)
        >>> loss = kdkernels.relation_match_loss(student, teacher, num_relation_heads=4, mask=mask)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([2, 6, 16])
    """
    name = "relation_match_loss"
    heads = num_relation_heads
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(
            f"{name}: num_relation_heads must be an integer of at least 1, got {heads!r}"
        )
    widths = []
    for which, x in (("student", student), ("teacher", teacher)):
        _check_tensor(name, which, x, student, ("batch", "seq", "width"))
        if x.shape[2] == 0 or x.shape[2] % heads:
            raise ValueError(
                f"{name}: {which} must have a width that num_relation_heads={heads} divides, got "
                f"{x.shape[2]}"
            )
        widths.append(x.shape[2] // heads)
    _check_teacher(name, student, teacher, (0, 1))
    call = _call(
        name, student, student.shape[:2], mask, row_weights, reduction, num_items_in_batch, backend
    )
    scales = widths[0] ** -0.5, widths[1] ** -0.5
    pairs = (_split(student, heads), None), (_split(teacher, heads), None)
    return call.relation(*pairs, op.Spec(int(Kind.KL), *scales, bool(causal), call.mean), None)


def attention_match_loss(
    student: Model,
    teacher: Model,
    *,
    kind: str = "mse",
    mask: Tensor | None = None,
    causal: bool = False,
    head_map: Sequence[int] | None = None,
    student_heads: int | None = None,
    teacher_heads: int | None = None,
    scale: float | tuple[float, float] | None = None,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Distance of two attention maps, from queries and keys or from the maps themselves.

    For each example, head ``h`` and query ``i`` that counts, over the keys ``j`` that count, with
    ``s_j = scale <q[i], k[j]>`` of head ``h`` of the student, ``t_j`` of head ``head_map[h]`` of
    the teacher and ``n`` keys::

        mse:  row = sum_j (s_j - t_j)^2 / n                (TinyBERT, on scores)
        kl:   row = KL( softmax(t) || softmax(s) )         (MiniLM)

    Maps are compared as they are: ``mse`` elementwise, be they scores or probabilities; for ``kl``
    they are probabilities.

    Args:
        student: ``(q, k)``, both ``[batch, heads, seq, head_width]``, or both ``[batch, seq,
            heads * head_width]`` with ``student_heads``; float32, bfloat16, float16 or float64, any
            strides; both get gradients. Keys may have fewer heads, a divisor of the queries'
            (grouped-query attention; of flat keys their width tells). Rotary embeddings and the
            like must already be applied. Or a map ``[batch, heads, seq, seq]``, queries before
            keys. Gets the gradient.
        teacher: the same form; heads, widths and dtype may differ. Must not require grad.
        kind: ``mse`` or ``kl``.
        mask: ``[batch, seq]`` bool or 0/1; tokens that are 0 count neither as queries nor as keys,
            and may hold NaN.
        causal: a query sees the keys up to its own place only.
        head_map: the teacher's head for each head of the student, as integers; ``None``: the same
            head, of as many.
        student_heads: number of heads of flat queries.
        teacher_heads: number of heads of flat queries.
        scale: factor of the products, or a ``(student, teacher)`` pair; ``None``:
            ``1 / sqrt(head_width)`` of each. Not for maps.
        row_weights: ``[batch]`` or ``[batch, seq]`` factors of the rows' losses. They do not change
            the denominator, and a weight changes the gradient of its example only.
        reduction: ``mean`` (by the number of rows that count: heads times tokens), ``batchmean``
            (by the batch size), ``sum``, or ``none`` (one value a row, 0 where left out). Without a
            mask, ``mse`` with ``mean`` is ``torch.nn.functional.mse_loss`` of the maps.
        num_items_in_batch: divides the sum instead.
        backend: ``native``, ``triton`` or ``reference``; ``None`` chooses.

    Returns:
        The loss, ``[]`` (``[batch, heads, seq]`` with ``reduction="none"``); float64 for a float64
        student, else float32.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument.
        TypeError: dtypes that do not fit.
        NotImplementedError: the named backend cannot run this call.

    Note:
        From queries and keys ``[batch, heads, seq, seq]`` is never stored (so the models may use
        fused attention): scores exist for a few heads and rows at a time (2 MB a thread on a CPU,
        256 MB on a GPU), and loss and gradients are one pass; the gradients are kept from the
        forward pass (tensors like ``q`` and ``k``), with ``reduction="none"`` they are computed in
        the backward pass. Arithmetic is float32. Maps cost a gradient like the student's; ``mse``
        with ``mask`` or ``causal`` a copy of each map in addition, ``kl`` their logarithms.

        Of a map with ``kl`` each row is divided by its sum over the keys that count, and the
        gradient is that of this quotient: after a softmax the same as that of ``p_t log(p_t /
        p_s)``, from which it differs by a constant in each row. Where a probability of both is 0 it
        adds nothing; where only the student's is, the loss is infinite.

    References:
        Jiao et al., TinyBERT, arXiv 1909.10351; Wang et al., MiniLM, arXiv 2002.10957.

    Example:
        >>> import kdkernels, torch
        >>> q, k = (torch.randn(2, 6, 12 * 4, requires_grad=True) for _ in range(2))
        >>> teacher = torch.randn(2, 16, 6, 8), torch.randn(2, 4, 6, 8)  # grouped keys
        >>> loss = kdkernels.attention_match_loss(
        ...     (q, k), teacher, student_heads=12, head_map=range(12)
        ... )
        >>> loss.backward()
        >>> k.grad.shape
        torch.Size([2, 6, 48])
    """
    name = "attention_match_loss"
    choice(name, "kind", kind, tuple(KINDS))
    maps = isinstance(student, Tensor)
    if maps != isinstance(teacher, Tensor):
        raise ValueError(
            f"{name}: teacher must be {'a map' if maps else 'a (q, k) pair'} as student is, got "
            f"{_shown(teacher)}"
        )
    if maps:
        given = {"student_heads": student_heads, "teacher_heads": teacher_heads, "scale": scale}
        for argument, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: {argument} must not be given with maps, got {value!r}")
        return _match_maps(
            name, student, teacher, kind, mask, bool(causal), head_map, row_weights, reduction,
            num_items_in_batch, backend,
        )  # fmt: skip
    first = _first(name, "student", student)
    s = _queries_keys(name, "student", student, student_heads, first)
    t = _queries_keys(name, "teacher", teacher, teacher_heads, first)
    for x in t:
        if x is not None:
            _check_teacher(name, s[0], x, (0, 2))
    places = _check_heads(name, s[0].shape[1], t[0].shape[1], head_map)
    shape = s[0].shape[0], s[0].shape[2]
    call = _call(name, s[0], shape, mask, row_weights, reduction, num_items_in_batch, backend)
    scales = _scales(name, scale, s[0].shape[3], t[0].shape[3])
    return call.relation(s, t, op.Spec(int(KINDS[kind]), *scales, bool(causal), call.mean), places)


# ---- the call ------------------------------------------------------------------------------------


class _Call(NamedTuple):
    mask: Tensor | None  # [batch, seq] bool
    row_weights: Tensor | None  # [batch, seq]
    denominator: Tensor | None
    reduction: str
    backend: str | None

    @property
    def mean(self) -> bool:
        return self.reduction == "mean"

    def relation(
        self, student: op.Pair, teacher: op.Pair, spec: op.Spec, head_map: list[int] | None
    ) -> Tensor:
        """From queries and keys."""
        options: dict[str, Any] = {"head_map": head_map, "backend": self.backend}
        others = self.mask, self.row_weights
        if self.reduction == "none":
            return op.relation_match_rows(student, teacher, *others, spec, **options)
        return op.relation_match(student, teacher, *others, self.denominator, spec, **options)


def _call(
    name: str,
    like: Tensor,
    shape: Sequence[int],
    mask: Tensor | None,
    row_weights: Tensor | None,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    backend: str | None,
) -> _Call:
    """What all forms share, checked; ``shape`` is ``[batch, seq]``."""
    choice(name, "reduction", reduction, REDUCTIONS)
    batch, seq = shape
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (batch, seq):
            raise ValueError(f"{name}: mask must be [{batch}, {seq}], got {_shown(mask)}")
        _checks.same_device(name, "mask", mask, like.device)
        mask = mask if mask.dtype == torch.bool else mask != 0
    if row_weights is not None:
        row_weights = _row_weights(name, row_weights, batch, seq, like, mask)
    denominator = None
    if num_items_in_batch is not None:
        if reduction == "none":
            raise ValueError(
                f"{name}: reduction must not be 'none' with num_items_in_batch, got 'none'"
            )
        denominator = denominator_of(name, like, num_items_in_batch)
    elif reduction == "batchmean":
        denominator = torch.full((), batch, device=like.device, dtype=torch.float32)
    return _Call(mask, row_weights, denominator, reduction, backend)


def _row_weights(
    name: str, weights: Tensor, batch: int, seq: int, like: Tensor, mask: Tensor | None
) -> Tensor:
    if not isinstance(weights, Tensor) or weights.shape not in ((batch,), (batch, seq)):
        raise ValueError(
            f"{name}: row_weights must be [{batch}] or [{batch}, {seq}], got {_shown(weights)}"
        )
    if weights.dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(f"{name}: row_weights must be floating, got {weights.dtype}")
    _checks.same_device(name, "row_weights", weights, like.device)
    _checks.no_grad(name, "row_weights", weights)
    if weights.dim() == 1:
        weights = weights[:, None].expand(batch, seq)
    check_weights(name, weights, mask)
    return weights


def _match_maps(
    name: str,
    student: Any,
    teacher: Any,
    kind: str,
    mask: Tensor | None,
    causal: bool,
    head_map: Sequence[int] | None,
    row_weights: Tensor | None,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    backend: str | None,
) -> Tensor:
    """Of maps ``[batch, heads, seq, seq]``, through the ops on their rows."""
    for which, x in (("student", student), ("teacher", teacher)):
        _check_tensor(name, which, x, student, ("batch", "heads", "seq", "seq"))
        if x.shape[2] != x.shape[3]:
            raise ValueError(
                f"{name}: {which} must be [batch, heads, seq, seq], got shape {list(x.shape)}"
            )
    _check_teacher(name, student, teacher, (0, 2))
    batch, heads, seq, _ = student.shape
    places = _check_heads(name, heads, teacher.shape[1], head_map)
    if places is not None:
        teacher = torch.stack([teacher[:, head] for head in places], 1)
    call = _call(
        name, student, (batch, seq), mask, row_weights, reduction, num_items_in_batch, backend
    )
    if seq == 0:
        return (student.sum(3) if reduction == "none" else student.sum()) * 0.0
    seen = _seen(call.mask, causal, seq, student.device)

    def of_rows(x: Tensor) -> Tensor:  # [batch or 1, seq] -> [rows]
        return x[:, None].expand(batch, heads, seq).reshape(-1)

    valid = None if call.mask is None else of_rows(call.mask)
    weights = None if call.row_weights is None else of_rows(call.row_weights)
    if kind == "kl":
        # softmax(log p) is p, whose zeros are classes without mass.
        s, t = (_log(x, seen).reshape(-1, seq) for x in (student, teacher))
        labels = None if valid is None else torch.where(valid, 0, _IGNORED)
        divergence = kd_op.Divergence.FORWARD_KL.value
        kd_spec = kd_op.Spec(divergence, kd_weight=1.0, ignore_index=_IGNORED, mean=call.mean)
        if reduction == "none":
            rows = kd_op.kd_loss_rows(s, t, labels, weights, kd_spec, backend=backend)
            return rows.view(batch, heads, seq)
        others = labels, weights, call.denominator, kd_spec
        return kd_op.kd_loss(s, t, *others, want_parts=False, backend=backend)[0]
    if seen is not None:
        student, teacher = (x.masked_fill(~seen, 0.0) for x in (student, teacher))
        # The op takes the mean over all of a row.
        share = of_rows(seq / seen[:, 0].sum(2).clamp(min=1))
        weights = share if weights is None else share * weights
    layer = [student.reshape(-1, seq)], [teacher.reshape(-1, seq)]
    spec = match_op.Spec(mean=call.mean)
    if reduction == "none":
        rows = match_op.hidden_match_rows(*layer, valid, weights, [1.0], spec, backend=backend)
        return rows.view(batch, heads, seq)
    return match_op.hidden_match(
        *layer, valid, weights, call.denominator, [1.0], spec, backend=backend
    )[0]


def _seen(mask: Tensor | None, causal: bool, seq: int, device: torch.device) -> Tensor | None:
    """Which keys a query sees, ``[batch or 1, 1, seq, seq]``; ``None``: all."""
    seen = None
    if causal:
        seen = torch.ones((1, 1, seq, seq), dtype=torch.bool, device=device).tril()
    if mask is not None:
        both = mask[:, None, :, None] & mask[:, None, None, :]
        seen = both if seen is None else seen & both
    return seen


def _log(p: Tensor, seen: Tensor | None) -> Tensor:
    """The logarithm of probabilities, -inf without a gradient where there is none."""
    p = p if p.dtype == torch.float64 else p.float()
    none = p == 0
    if seen is not None:
        none = none | ~seen
    return p.masked_fill(none, 1.0).log().masked_fill(none, -torch.inf)


# ---- the tensors of a call -----------------------------------------------------------------------


def _check_tensor(name: str, which: str, x: Any, like: Any, dims: tuple[str, ...]) -> None:
    """A dense floating tensor of so many dimensions, where ``like`` is."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {which} must be a Tensor, got {type(x).__name__}")
    if x.dim() != len(dims):
        raise ValueError(f"{name}: {which} must be [{', '.join(dims)}], got shape {list(x.shape)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: {which} must be a strided tensor, got {x.layout}")
    if x.dtype not in _checks.FLOAT_DTYPES:
        dtype = str(x.dtype).removeprefix("torch.")
        raise TypeError(
            f"{name}: {which} must be float32, bfloat16, float16 or float64, got {dtype}"
        )
    _checks.same_device(name, which, x, like.device)


def _check_teacher(name: str, student: Tensor, teacher: Tensor, dims: tuple[int, int]) -> None:
    """It takes no gradient, and ``dims``, batch and tokens, are the student's."""
    _checks.no_grad(name, "teacher", teacher)
    wanted, found = ([x.shape[d] for d in dims] for x in (student, teacher))
    if wanted != found:
        raise ValueError(
            f"{name}: teacher must have the batch and the tokens of student {wanted}, got {found}"
        )


def _check_heads(
    name: str, heads: int, teacher_heads: int, head_map: Sequence[int] | None
) -> list[int] | None:
    if head_map is None:
        if teacher_heads != heads:
            raise ValueError(
                f"{name}: head_map must be given where student has {heads} heads and teacher "
                f"{teacher_heads}, got None"
            )
        return None
    places = list(head_map)
    fits = len(places) == heads and all(
        isinstance(head, int) and 0 <= head < teacher_heads for head in places
    )
    if not fits:
        raise ValueError(
            f"{name}: head_map must be {heads} integers in [0, {teacher_heads}), got {places}"
        )
    return places


def _first(name: str, which: str, pair: Any) -> Any:
    """The queries of a ``(q, k)`` pair."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"{name}: {which} must be a (q, k) pair or a map, got {_shown(pair)}")
    return pair[0]


def _queries_keys(
    name: str, which: str, pair: Any, heads: int | None, like: Any
) -> tuple[Tensor, Tensor | None]:
    """``[batch, heads, seq, width]`` of both; keys ``None`` where they are the queries."""
    q, flat = _first(name, which, pair), heads is not None
    dims = ("batch", "seq", "heads * width") if flat else ("batch", "heads", "seq", "width")
    for x in pair:
        if not flat and isinstance(x, Tensor) and x.dim() == 3:
            raise ValueError(
                f"{name}: {which}_heads must be given for queries and keys [batch, seq, width], "
                "got None"
            )
        _check_tensor(name, which, x, like, dims)
    k = None if pair[1] is q else pair[1]
    if heads is not None:
        width = _head_width(name, which, q, heads)
        q = _split(q, heads)
        if k is not None and (k.shape[2] == 0 or k.shape[2] % width):
            raise ValueError(
                f"{name}: {which} must have keys of some heads of width {width}, got {k.shape[2]}"
            )
        k = None if k is None else _split(k, k.shape[2] // width)
    if 0 in (q.shape[1], q.shape[3]):
        raise ValueError(f"{name}: {which} must have heads of some width, got {list(q.shape)}")
    if k is None:
        return q, None
    if k.dtype != q.dtype:
        raise TypeError(f"{name}: {which} must have q and k of one dtype, got {q.dtype}, {k.dtype}")
    others = [d for d in (0, 2, 3) if k.shape[d] != q.shape[d]]
    if others or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{name}: {which} must have keys like its queries {list(q.shape)}, whose heads may be "
            f"a multiple of the keys', got {list(k.shape)}"
        )
    return q, k


def _head_width(name: str, which: str, q: Tensor, heads: Any) -> int:
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"{name}: {which}_heads must be an integer of at least 1, got {heads!r}")
    if q.shape[2] == 0 or q.shape[2] % heads:
        raise ValueError(
            f"{name}: {which} must have a width that {which}_heads={heads} divides, got "
            f"{q.shape[2]}"
        )
    return int(q.shape[2] // heads)


def _split(x: Tensor, heads: int) -> Tensor:
    """``[batch, seq, width]`` to ``[batch, heads, seq, width / heads]``, a view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _scales(name: str, scale: Any, student_width: int, teacher_width: int) -> tuple[float, float]:
    if scale is None:
        return student_width**-0.5, teacher_width**-0.5
    pair = scale if isinstance(scale, tuple) else (scale, scale)
    if len(pair) != 2:
        raise ValueError(
            f"{name}: scale must be a number or a (student, teacher) pair, got {scale!r}"
        )
    for one in pair:
        number(name, "scale", one, -math.inf, math.inf)
    return float(pair[0]), float(pair[1])


def _shown(x: object) -> str:
    return f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
