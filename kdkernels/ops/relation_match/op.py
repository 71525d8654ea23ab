"""The contract of ``relation_match``: the library's GEMMs and the rows of ``kd_loss`` and
``hidden_match``.

Queries and keys are ``[batch, heads, seq, width]``, any strides. Layers above (``kdkernels.api``)
split heads, and bring reductions by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels import _backend, _checks, _native, _triton
from kdkernels._op import Primitive, is_compiling, refuse_create_graph, transforms_active
from kdkernels.ops.relation_match.reference import relation_match_reference
from kdkernels.ops.relation_match.spec import Spec
from kdkernels.ops.relation_match.tiles import empty_gradient, launchers
from kdkernels.ops.scale_grad.op import scale_grad

# Its kernels are those of these ops; on the CPU they are called from C++, a head a thread.
COMPOSED_OF = "kd_loss, hidden_match"
OP = "relation_match"
# Keys, or None where they are the queries.
Pair = tuple[Tensor, Tensor | None]
# What a primitive takes after the student's queries and keys.
Others = tuple[Any, ...]
_ROW_WEIGHTS = 3  # in Others

_INPUTS = (
    "Tensor student_q, Tensor? student_k, Tensor teacher_q, Tensor? teacher_k, Tensor? mask, "
    "Tensor? row_weights, Tensor? denominator, int[] head_map, float[] spec, int tile_bytes"
)


def _fake(student_q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    loss = student_q.new_empty((), dtype=torch.float32)
    return loss, student_q.new_empty(student_q.shape[:3], dtype=torch.float32)


def _fake_grad(
    student_q: Tensor, student_k: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wants_q, wants_k = args[-1]
    k = student_q if student_k is None else student_k
    return (
        _fake(student_q)[0],
        empty_gradient(student_q, wants_q),
        empty_gradient(k, wants_k and student_k is not None),
    )


# row_weights: [batch, 1 or heads, seq].
relation_match_forward = Primitive(
    OP, f"({_INPUTS}) -> (Tensor loss, Tensor rows)", fake=_fake, compiled=False
)
# wanted: of queries and keys. An unwanted gradient is empty.
relation_match_grad = Primitive(
    f"{OP}_grad",
    f"({_INPUTS}, bool[] wanted) -> (Tensor loss, Tensor q, Tensor k)",
    fake=_fake_grad,
    compiled=False,
)


def relation_match(
    student: Pair,
    teacher: Pair,
    mask: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    *,
    head_map: Sequence[int] | None = None,
    tile_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The distance of two models' scores between queries and keys, reduced to a scalar.

    ``loss = sum_{b,h,i} row_weights[b,i] D(s[b,h,i], t[b,head_map[h],i]) / denominator`` over
    queries ``i`` that count, with each model's ``s[b,h,i,j] = scale <q[b,h,i], k[b,h//(H/G),j]>``
    over keys ``j`` that count, for ``H`` heads of queries and ``G`` of keys.

    Args:
        student: queries ``[batch, H, seq, width]`` and keys ``[batch, G, seq, width]``, ``G`` a
            divisor of ``H``; keys ``None``: the queries, whose gradient is then that of both.
            float32, bfloat16, float16 or (reference) float64; any strides. Both get gradients.
        teacher: the same for as many examples and tokens; heads, width and dtype may differ. Takes
            no gradient.
        mask: ``[batch, seq]`` bool, tokens that count, as queries and as keys. Others are never
            read on the CPU, and may hold anything everywhere.
        row_weights: ``[batch, seq]`` factors of the rows' losses.
        denominator: ``[]``; the sum is divided by it (0 counts as 1). ``None``: by the number of
            rows ``(b, h, i)`` that count where ``spec.mean``, else by 1.
        spec: see :class:`~kdkernels.ops.relation_match.spec.Spec`.
        head_map: the teacher's head of each of the student's; ``None``: the same, of as many.
        tile_bytes: size of the scores that exist at a time, of both models; ``None``: by device.
        backend: ``native``, ``triton``, ``reference``, or ``None`` to choose.

    Returns:
        ``loss`` ``[]``, float64 for float64 queries, else float32.

    Numerics: float32 inside. A gradient of bfloat16 is summed up in float32; one of float16 waits
    in float32 for its upstream factor. Without a row that counts loss and gradients are 0.
    """
    name, tensors, others = _prepare(
        student, teacher, mask, row_weights, denominator, spec, head_map, tile_bytes, backend
    )
    if name == "reference":
        return relation_match_reference(*tensors, *others[:-1])[0]
    try:
        if _wants_grad(tensors):
            loss: Tensor = Match.apply(*tensors, others, name)
        else:
            loss, _ = relation_match_forward(name, *tensors, *others)
    except RuntimeError as error:
        raise _checks.as_contract(OP, error) from None
    return loss


def relation_match_rows(
    student: Pair,
    teacher: Pair,
    mask: Tensor | None,
    row_weights: Tensor | None,
    spec: Spec,
    *,
    head_map: Sequence[int] | None = None,
    tile_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """As :func:`relation_match`, one value a row: ``[batch, heads, seq]``, 0 for rows that do not
    count.

    The gradient is computed in the backward pass with the upstream gradient as row weights, so it
    is right for any upstream gradient; the inputs are kept until then.
    """
    spec = spec._replace(mean=False)  # one value a row is never divided
    name, tensors, others = _prepare(
        student, teacher, mask, row_weights, None, spec, head_map, tile_bytes, backend
    )
    if name == "reference":
        return relation_match_reference(*tensors, *others[:-1])[1]
    try:
        if _wants_grad(tensors):
            rows: Tensor = PerRowMatch.apply(*tensors, others, name)
        else:
            _, rows = relation_match_forward(name, *tensors, *others)
    except RuntimeError as error:
        raise _checks.as_contract(OP, error) from None
    return rows


def unsupported(backend: str, *tensors: Tensor | None, device: str | None = None) -> str | None:
    """Why a backend cannot run a call with these tensors; ``None`` when it can.

    ``device`` asks about another device type than that of the tensors.
    """
    if backend == "reference":
        return None
    if device is None:
        device = next(x.device.type for x in tensors if x is not None)
    if transforms_active():
        return "torch.func and forward-mode differentiation need the reference"
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        return "the kernels take float32, bfloat16 and float16, not float64"
    if backend == "native":
        return _native.reason(device)
    return _triton.reason(device) if backend == "triton" else None


def attach(backend: str) -> None:
    """Makes a backend of ``kd_loss`` and ``hidden_match`` one of this op."""
    primitives = relation_match_forward, relation_match_grad
    for primitive, function in zip(primitives, launchers(backend), strict=True):
        primitive.launcher(backend)(function)


# ---- autograd ------------------------------------------------------------------------------------


class Match(torch.autograd.Function):
    """The gradient in the forward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor | None, others: Others, backend: str) -> Tensor:
        wanted = list(ctx.needs_input_grad[:2])
        loss, *grads = relation_match_grad(backend, q, k, *others, wanted)
        ctx.save_for_backward(*(g if want else None for g, want in zip(grads, wanted, strict=True)))
        ctx.backend, ctx.dtype = backend, q.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph(OP)
        grads = (
            None if g is None else _scaled(g, grad_loss, ctx.backend).to(ctx.dtype)
            for g in ctx.saved_tensors
        )
        return *grads, None, None


class PerRowMatch(torch.autograd.Function):
    """One value a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor | None, others: Others, backend: str) -> Tensor:
        _, rows = relation_match_forward(backend, q, k, *others)
        ctx.save_for_backward(q, k)
        # Not differentiated, and a teacher from torch.inference_mode() could not be saved.
        ctx.others, ctx.backend = others, backend
        return rows

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph(OP)
        others = list(ctx.others)
        weights = others[_ROW_WEIGHTS]
        others[_ROW_WEIGHTS] = grad_rows if weights is None else grad_rows * weights
        wanted = list(ctx.needs_input_grad[:2])
        q, k = ctx.saved_tensors
        _, *grads = relation_match_grad(ctx.backend, q, k, *others, wanted)
        found = (g.to(q.dtype) if want else None for g, want in zip(grads, wanted, strict=True))
        return *found, None, None


def _scaled(grad: Tensor, scale: Tensor, backend: str) -> Tensor:
    """By the kernel, which takes dense memory, whatever the order of its dimensions."""
    if is_compiling() or grad.numel() == 0:
        return grad * scale
    strides, shape = grad.stride(), grad.shape
    order = sorted(range(grad.dim()), key=lambda d: (-strides[d], -shape[d]))
    dense = grad.permute(order)
    back = [order.index(d) for d in range(grad.dim())]
    return scale_grad(dense, scale, backend=backend).permute(back)


def _wants_grad(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:2])


# ---- checks --------------------------------------------------------------------------------------


def _prepare(
    student: Pair,
    teacher: Pair,
    mask: Tensor | None,
    row_weights: Tensor | None,
    denominator: Tensor | None,
    spec: Spec,
    head_map: Sequence[int] | None,
    tile_bytes: int | None,
    backend: str | None,
) -> tuple[str, Pair, Others]:
    """Checks; returns the backend, the student's tensors and what a primitive takes after them."""
    (q, k), (teacher_q, teacher_k) = student, teacher
    _check_pair("student", q, k)
    _check_pair("teacher", teacher_q, teacher_k)
    _checks.same_device(OP, "teacher", teacher_q, q.device)
    for x in (teacher_q, teacher_k):
        if x is not None:
            _checks.no_grad(OP, "teacher", x)
    batch, heads, seq, _ = q.shape
    if teacher_q.shape[0] != batch or teacher_q.shape[2] != seq:
        raise ValueError(
            f"{OP}: teacher must have the batch and the tokens of student [{batch}, {seq}], got "
            f"[{teacher_q.shape[0]}, {teacher_q.shape[2]}]"
        )
    places = _check_heads(heads, teacher_q.shape[1], head_map)
    if mask is not None:
        if mask.shape != (batch, seq) or mask.dtype != torch.bool:
            raise ValueError(
                f"{OP}: mask must be bool [{batch}, {seq}], got {mask.dtype} {list(mask.shape)}"
            )
        _checks.same_device(OP, "mask", mask, q.device)
    if row_weights is not None and row_weights.shape != (batch, seq):
        raise ValueError(
            f"{OP}: row_weights must be [{batch}, {seq}], got {list(row_weights.shape)}"
        )
    _, weights, denominator = _checks.row_inputs(
        OP, q[:, 0].flatten(0, 1), None, None if row_weights is None else row_weights.flatten(),
        denominator,
    )  # fmt: skip
    weights = None if weights is None else weights.view(batch, 1, seq)
    if tile_bytes is not None and tile_bytes < 1:
        raise ValueError(f"{OP}: tile_bytes must be at least 1, got {tile_bytes}")
    name = _backend.choose(OP, q.device.type, backend, unsupported, q, k, teacher_q, teacher_k)
    others = (teacher_q, teacher_k, mask, weights, denominator, places, spec, tile_bytes or 0)
    return name, (q, k), others


def _check_pair(name: str, q: Tensor, k: Tensor | None) -> None:
    for x in (q,) if k is None else (q, k):
        if x.dim() != 4 or 0 in (x.shape[1], x.shape[3]):
            raise ValueError(
                f"{OP}: {name} must be [batch, heads, seq, width], got shape {list(x.shape)}"
            )
        if x.layout != torch.strided:
            raise TypeError(f"{OP}: {name} must be a strided tensor, got {x.layout}")
        if x.dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(
                f"{OP}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}"
            )
        _checks.same_device(OP, name, x, q.device)
    if k is None:
        return
    if k.dtype != q.dtype:
        raise TypeError(
            f"{OP}: {name} must have keys of its queries' dtype {q.dtype}, got {k.dtype}"
        )
    rest = (0, 2, 3)
    if any(k.shape[d] != q.shape[d] for d in rest) or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{OP}: {name} must have keys of its queries' shape {list(q.shape)}, or of a number of "
            f"heads that divides theirs, got {list(k.shape)}"
        )


def _check_heads(heads: int, teacher_heads: int, head_map: Sequence[int] | None) -> list[int]:
    if head_map is None:
        if teacher_heads != heads:
            raise ValueError(
                f"{OP}: head_map must be given for {heads} heads of student and {teacher_heads} of "
                "teacher, got None"
            )
        return []
    places = [int(head) for head in head_map]
    if len(places) != heads or any(not 0 <= head < teacher_heads for head in places):
        raise ValueError(
            f"{OP}: head_map must have {heads} heads of teacher in [0, {teacher_heads}), got "
            f"{places}"
        )
    return places


for _name in ("native", "triton"):
    attach(_name)
