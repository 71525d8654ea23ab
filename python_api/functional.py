"""The losses as functions: any leading dimensions, masks, reductions, papers' conventions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._op import is_compiling
from kdkernels.api._rows import KDParts, reduce_rows
from kdkernels.api._spec import REDUCTIONS, choice, chunk_rows_of, kd_spec, number, positive
from kdkernels.api.domain_prototypes import domain_prototypes
from kdkernels.api.gate_scores import gate_scores
from kdkernels.api.hidden import MatchParts, hidden_match_loss, hidden_match_many
from kdkernels.api.interchange import interchange, interchange_at, interchange_subspace
from kdkernels.api.relations import attention_match_loss, relation_match_loss
from kdkernels.api.topk import TopK, linear_topk_kd_loss, topk_kd_loss, topk_logprobs
from kdkernels.ops import linear_kd_loss as linear_op
from kdkernels.ops.kd_loss import Divergence, Spec

__all__ = [
    "KDParts",
    "MatchParts",
    "TopK",
    "attention_match_loss",
    "confidence_penalty_loss",
    "domain_prototypes",
    "gate_scores",
    "hidden_match_loss",
    "hidden_match_many",
    "interchange",
    "interchange_at",
    "interchange_subspace",
    "kd_loss",
    "label_smoothing_loss",
    "linear_kd_loss",
    "linear_topk_kd_loss",
    "multi_teacher_kd_loss",
    "relation_match_loss",
    "tfkd_reg_loss",
    "tfkd_self_loss",
    "topk_kd_loss",
    "topk_logprobs",
]


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float | None = None,
    ce_weight: float | None = None,
    kd_weight: float | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    scale_t2: bool = True,
    label_smoothing: float = 0.0,
    smoothing_convention: str = "torch",
    z_loss: float = 0.0,
    logit_scale: float | tuple[float, float] = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    shift: int = 0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    row_weights: Tensor | None = None,
    inplace: bool = False,
    return_parts: bool = False,
    backend: str | None = None,
) -> Any:  # a Tensor, or KDParts with return_parts: a union would burden every typed caller
    r"""Hard cross-entropy and a teacher-student divergence in one pass over the logits.

    Per valid row, with ``z = softcap * tanh(logit_scale * logits / softcap)`` of each model::

        loss = ce_weight * CE(z_s, label) + kd_weight * T^2 * D(softmax(z_t / T), softmax(z_s / T))
               + z_loss * logsumexp(z_s)^2

    Args:
        student_logits: ``[..., vocab]``, float32, bfloat16, float16 or float64. Gets the gradient.
        teacher_logits: ``[..., vocab]``, any of these dtypes; must not require grad. ``None``: no
            divergence, plain (smoothed) cross-entropy.
        labels: ``[...]`` integers in ``[0, vocab)`` or ``ignore_index``; ``None``: divergence only.
        temperature: ``T > 0`` of the divergence. Cross-entropy is always at temperature 1.
        alpha: weight of the divergence; expands to ``ce_weight=1 - alpha, kd_weight=alpha``.
            Default: 0.5 with teacher and labels, 1 without labels, 0 without a teacher.
        ce_weight: weight of cross-entropy; together with ``kd_weight``, instead of ``alpha``.
        kd_weight: weight of the divergence; together with ``ce_weight``.
        divergence: ``forward_kl`` (KL(teacher || student)), ``soft_ce`` (forward KL plus the
            teacher's entropy: same gradient), ``reverse_kl`` (KL(student || teacher)), ``jsd``
            (``beta KL(t || m) + (1 - beta) KL(s || m)``, ``m = beta t + (1 - beta) s``) or ``tvd``
            (half the L1 distance).
        beta: teacher's weight in the mixture of ``jsd``, in [0, 1]; 0 is forward and 1 reverse KL,
            as in TRL and Liger (the formula's own limits there are 0).
        scale_t2: multiply the divergence by ``temperature ** 2``.
        label_smoothing: share of the label's probability spread over the classes, in [0, 1].
        smoothing_convention: ``torch`` spreads it over all classes, ``tfkd`` over the other ones.
        z_loss: weight of the squared log-partition of the student.
        logit_scale: factor of the logits before the cap; a pair means (student, teacher).
        softcap: Gemma's logit cap; ``None`` for none; a pair means (student, teacher).
        vocab_size: number of real classes where the logits have padding columns: those from
            ``vocab_size`` on get no probability and no gradient, and the two models may then have
            different numbers of columns. ``None``: no padding, equal shapes.
        ignore_index: label of rows to leave out.
        mask: ``[...]`` bool or 0/1; rows that are 0 are left out. They are never read, so they may
            hold NaN.
        shift: 1 for causal language models whose labels, mask and row weights are aligned with the
            *input* tokens: position i is then scored against position i + 1. 0: already aligned.
        reduction: ``mean`` (per valid row), ``batchmean`` (by the first size of the logits),
            ``sum``, ``none`` (one value a row, 0 where left out), ``element_mean`` (cross-entropy
            per valid row, the divergence also divided by the number of classes: torch's
            ``kl_div(reduction="mean")``).
        num_items_in_batch: divides the sum instead (gradient accumulation, several processes: see
            :func:`~kdkernels.global_valid_count`).
        row_weights: ``[...]`` factors of the rows' losses; they do not change the denominator.
        inplace: overwrite ``student_logits`` with their gradient: saves one tensor of that size.
            The logits are lost; they must not be a leaf and their producer must not need them.
        return_parts: return :class:`KDParts` instead of the loss.
        backend: ``native``, ``triton`` or ``reference``; ``None`` chooses. A named backend never
            falls back to another one.

    Returns:
        The loss, ``[]`` (``[...]`` with ``reduction="none"``); float64 for float64 logits, else
        float32. Or :class:`KDParts`.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument.
        TypeError: dtypes that do not fit.
        NotImplementedError: the named backend cannot run this call.

    Note:
        Arithmetic is float32 (float64 for float64 logits). Logits of ``-inf`` are masked classes.
        Without a valid row the loss and the gradient are 0. The gradient is computed in the
        forward pass and kept (one tensor like the logits). With ``reduction="none"``, and for
        float16 logits, whose gradient must meet the factor of a GradScaler before it is rounded,
        the logits are kept and the gradient is computed in the backward pass (``inplace=True``
        rounds first). ``create_graph=True``, ``torch.func`` and forward-mode differentiation need
        the reference backend. On CUDA an out-of-range label
        gives NaN for its row, because a check would synchronise.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Example:
        >>> import kdkernels, torch
        >>> student = torch.randn(4, 100, requires_grad=True)
        >>> teacher, labels = torch.randn(4, 100), torch.tensor([1, 5, -100, 7])
        >>> loss = kdkernels.kd_loss(student, teacher, labels, temperature=2.0, alpha=0.5)
        >>> loss.backward()
        >>> student.grad[2].abs().sum().item()
        0.0
    """
    columns = _columns("kd_loss", "student_logits", student_logits)
    # The cache is for eager loops; a compiled graph keeps the result anyway.
    build = kd_spec.__wrapped__ if is_compiling() else kd_spec
    if type(logit_scale) is list or type(softcap) is list:  # cannot be cached
        raise TypeError("kd_loss: logit_scale and softcap must be numbers or tuples, got a list")
    spec, t2 = build(
        temperature,
        alpha,
        ce_weight,
        kd_weight,
        divergence,
        beta,
        scale_t2,
        label_smoothing,
        smoothing_convention,
        z_loss,
        logit_scale,
        softcap,
        vocab_size,
        ignore_index,
        reduction,
        teacher_logits is not None,
        labels is not None,
        return_parts,
        columns if label_smoothing or reduction == "element_mean" else 1,
    )
    return reduce_rows(
        student_logits,
        teacher_logits,
        labels,
        spec,
        t2,
        mask=mask,
        shift=shift,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        row_weights=row_weights,
        inplace=inplace,
        return_parts=return_parts,
        backend=backend,
    )


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    chunk_bytes: int | None = None,
    temperature: float = 1.0,
    alpha: float | None = None,
    ce_weight: float | None = None,
    kd_weight: float | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    scale_t2: bool = True,
    label_smoothing: float = 0.0,
    smoothing_convention: str = "torch",
    z_loss: float = 0.0,
    logit_scale: float | tuple[float, float] = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    shift: int = 0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    row_weights: Tensor | None = None,
    return_parts: bool = False,
    backend: str | None = None,
) -> Any:  # as kd_loss
    r"""``kd_loss`` straight from hidden states and heads, without ``[tokens, vocab]`` tensors.

    The loss of ``logits = hidden @ weight.T + bias`` of each model; see :func:`kd_loss` for the
    formula. Logits exist for a chunk of rows at a time, in float32, and the gradients of hidden
    states and head are computed in the forward pass.

    Args:
        student_hidden: ``[..., student width]``, float32, bfloat16, float16 or float64: what the
            head gets. Gets a gradient.
        student_weight: ``[vocab, student width]``, the head's (or the tied embedding's) weight, in
            the dtype of the hidden states; under autocast both are cast as a linear layer's. Gets a
            gradient unless it is frozen.
        teacher_hidden: ``[..., teacher width]``; must not require grad. ``None``: cross-entropy
            only, then ``teacher_weight`` is ``None`` too.
        teacher_weight: ``[vocab, teacher width]``.
        labels: ``[...]`` integers in ``[0, vocab)`` or ``ignore_index``.
        student_bias: ``[vocab]``. Gets a gradient.
        teacher_bias: ``[vocab]``.
        chunk_rows: rows whose logits exist at a time.
        chunk_bytes: memory for the float32 logits of a chunk, both models, instead of
            ``chunk_rows``. Default: a quarter of what all logits would take, but 64 to 512 MB.
        temperature: as in :func:`kd_loss`, like every argument that follows.
        alpha: weight of the divergence.
        ce_weight: weight of cross-entropy.
        kd_weight: weight of the divergence.
        divergence: ``forward_kl``, ``soft_ce``, ``reverse_kl``, ``jsd`` or ``tvd``.
        beta: teacher's weight in ``jsd``.
        scale_t2: multiply the divergence by ``temperature ** 2``.
        label_smoothing: share of the label's probability spread over the classes.
        smoothing_convention: ``torch`` or ``tfkd``.
        z_loss: weight of the squared log-partition of the student.
        logit_scale: factor of the logits; a pair means (student, teacher).
        softcap: logit cap; a pair means (student, teacher).
        vocab_size: real classes of padded heads; the rest is not computed.
        ignore_index: label of rows to leave out.
        mask: ``[...]`` rows to use.
        shift: 1 for causal language models.
        reduction: ``mean``, ``batchmean``, ``sum``, ``none`` or ``element_mean``.
        num_items_in_batch: divides the sum instead.
        row_weights: ``[...]`` factors of the rows' losses.
        return_parts: return :class:`KDParts`.
        backend: ``native``, ``triton`` or ``reference``.

    Returns:
        The loss, or :class:`KDParts`, as :func:`kd_loss`.

    Raises:
        ValueError: shapes, values or devices that do not fit; the message names the argument.
        TypeError: dtypes that do not fit.

    Note:
        16-bit hidden states and heads keep float32 logits and float32 sums of the gradients, which
        are rounded once. Rows that are left out take part in no GEMM on the CPU. With
        ``reduction="none"`` the logits are computed again in the backward pass.

    Source: the loss is Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Example:
        >>> import kdkernels, torch
        >>> hidden, head = torch.randn(2, 6, 16), torch.nn.Linear(16, 100, bias=False)
        >>> teacher_hidden, teacher_head = torch.randn(2, 6, 32), torch.randn(100, 32)
        >>> tokens = torch.randint(100, (2, 6))
        >>> loss = kdkernels.linear_kd_loss(
        ...     hidden, head.weight, teacher_hidden, teacher_head, tokens, shift=1, temperature=2.0
        ... )
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([100, 16])
    """
    name = "linear_kd_loss"
    _columns(name, "student_hidden", student_hidden)
    if student_weight.dim() != 2:
        raise ValueError(
            f"{name}: student_weight must be [vocab, width], got shape {list(student_weight.shape)}"
        )
    if type(logit_scale) is list or type(softcap) is list:  # cannot be cached
        raise TypeError(f"{name}: logit_scale and softcap must be numbers or tuples, got a list")
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError(f"{name}: teacher_hidden and teacher_weight must be given together")
    columns = student_weight.shape[0]
    build = kd_spec.__wrapped__ if is_compiling() else kd_spec
    spec, t2 = build(
        temperature,
        alpha,
        ce_weight,
        kd_weight,
        divergence,
        beta,
        scale_t2,
        label_smoothing,
        smoothing_convention,
        z_loss,
        logit_scale,
        softcap,
        vocab_size,
        ignore_index,
        reduction,
        teacher_hidden is not None,
        labels is not None,
        return_parts,
        columns,
        name,
    )
    rows, models = math.prod(student_hidden.shape[:-1]), 2 if spec.needs_teacher else 1
    chunk_rows = chunk_rows_of(name, chunk_rows, chunk_bytes, rows, columns, models)
    heads = linear_op.Heads(student_weight, student_bias, teacher_weight, teacher_bias)
    return reduce_rows(
        student_hidden,
        teacher_hidden,
        labels,
        spec,
        t2,
        mask=mask,
        shift=shift,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        row_weights=row_weights,
        return_parts=return_parts,
        backend=backend,
        name=name,
        reduced=partial(linear_op.linear_kd_loss, heads=heads, chunk_rows=chunk_rows),
        per_row=partial(linear_op.linear_kd_loss_rows, heads=heads, chunk_rows=chunk_rows),
    )


def label_smoothing_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.1,
    convention: str = "torch",
    ignore_index: int = -100,
    mask: Tensor | None = None,
    shift: int = 0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    row_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy against smoothed labels, without a target row.

    ``loss = (1 - e) CE(z, label) + e mean_k(-log p_k)`` with ``e = label_smoothing``; the
    ``tfkd`` convention spreads over the other classes only (``e`` is then scaled by K / (K - 1)).

    Args:
        logits: ``[..., vocab]`` float.
        labels: ``[...]`` integers.
        label_smoothing: share taken from the label, in [0, 1].
        convention: ``torch`` or ``tfkd``.
        ignore_index: as in :func:`kd_loss`, like every argument that follows.
        mask: rows to use.
        shift: 1 for labels aligned with the input tokens.
        reduction: ``mean``, ``batchmean``, ``sum`` or ``none``.
        num_items_in_batch: denominator.
        row_weights: factors of the rows' losses.
        backend: as in :func:`kd_loss`.

    Returns:
        The loss, ``[]`` or ``[...]``, as :func:`kd_loss`.

    Source: Szegedy et al., "Rethinking the Inception Architecture", 2016.

    Example:
        >>> import kdkernels, torch
        >>> kdkernels.label_smoothing_loss(torch.zeros(2, 4), torch.tensor([0, 1])).item() > 1.38
        True
    """
    return kd_loss(
        logits,
        None,
        labels,
        label_smoothing=label_smoothing,
        smoothing_convention=convention,
        ignore_index=ignore_index,
        mask=mask,
        shift=shift,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        row_weights=row_weights,
        backend=backend,
    )


def multi_teacher_kd_loss(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    teacher_weights: Sequence[float] | None = None,
    combine: str = "probability",
    temperature: float = 1.0,
    alpha: float | None = None,
    ce_weight: float | None = None,
    kd_weight: float | None = None,
    **options: Any,
) -> Any:  # as kd_loss
    r"""``kd_loss`` from several teachers of one vocabulary.

    With weights ``w_i`` that sum to 1::

        probability: D(sum_i w_i softmax(z_i / T), softmax(z_s / T))
        loss:        sum_i w_i D(softmax(z_i / T), softmax(z_s / T))

    Forward KL has the same gradient in both forms; the other divergences do not.

    Args:
        student_logits: ``[..., vocab]``. Gets the gradient.
        teacher_logits: one ``[..., vocab]`` a teacher; must not require grad.
        labels: as in :func:`kd_loss`.
        teacher_weights: one positive number a teacher; scaled to sum to 1. Default: equal.
        combine: ``probability`` (the mean of the teachers' distributions teaches) or ``loss`` (the
            mean of their losses).
        temperature: as in :func:`kd_loss`.
        alpha: as in :func:`kd_loss`.
        ce_weight: as in :func:`kd_loss`.
        kd_weight: as in :func:`kd_loss`.
        **options: every other keyword of :func:`kd_loss`, except ``inplace``. With
            ``probability``, ``logit_scale`` and ``softcap`` must leave the teachers alone, whose
            mean is no logit: give the student's as pairs, ``(scale, 1.0)`` and ``(cap, None)``.

    Returns:
        As :func:`kd_loss`.

    Raises:
        ValueError: no teacher, weights that do not fit, unknown ``combine``; else as
            :func:`kd_loss`.

    Note:
        ``probability`` holds one tensor of mean log-probabilities, in float32; ``loss`` runs the
        kernel once for each teacher.

    Source: You, Xu, Xu, Tao, "Learning from Multiple Teacher Networks", KDD 2017 (mean of the
    teachers' softened outputs).

    Example:
        >>> import kdkernels, torch
        >>> student, teachers = torch.randn(4, 9), [torch.randn(4, 9), torch.randn(4, 9)]
        >>> kdkernels.multi_teacher_kd_loss(student, teachers, temperature=2.0).shape
        torch.Size([])
    """
    name = "multi_teacher_kd_loss"
    choice(name, "combine", combine, ("probability", "loss"))
    teachers = list(teacher_logits)
    if not teachers:
        raise ValueError(f"{name}: teacher_logits must hold at least one teacher, got none")
    shares = _teacher_shares(name, teacher_weights, len(teachers))
    if options.get("inplace"):
        raise ValueError(f"{name}: inplace must be False, got True")
    common: dict[str, Any] = {"temperature": temperature, **options}
    common |= {"alpha": alpha, "ce_weight": ce_weight, "kd_weight": kd_weight}
    if combine == "probability":
        for argument, neutral in (("logit_scale", 1.0), ("softcap", None)):
            value = options.get(argument, neutral)
            if (value[1] if isinstance(value, tuple) else value) not in (neutral, 0.0):
                raise ValueError(
                    f"{name}: {argument} must leave the teachers' side at {neutral} with "
                    f"combine='probability', got {value!r}"
                )
        mean = _mean_logits(name, student_logits, teachers, shares, temperature)
        return kd_loss(student_logits, mean, labels, **common)
    results = []
    for share, teacher in zip(shares, teachers, strict=True):
        # Every term that is the student's alone comes along with each share: their sum is one.
        results.append((share, kd_loss(student_logits, teacher, labels, **common)))
    if not options.get("return_parts"):
        return sum(share * loss for share, loss in results)
    fields = [sum(share * parts[i] for share, parts in results) for i in range(4)]
    return KDParts(*[*fields, results[0][1].n_valid])


def _teacher_shares(name: str, weights: Sequence[float] | None, teachers: int) -> list[float]:
    if weights is None:
        return [1.0 / teachers] * teachers
    values = list(weights)
    if len(values) != teachers:
        raise ValueError(
            f"{name}: teacher_weights must have one number for each of {teachers} teachers, "
            f"got {len(values)}"
        )
    for value in values:
        positive(name, "teacher_weights", value)
    return [value / sum(values) for value in values]


def _mean_logits(
    name: str, student: Tensor, teachers: list[Tensor], shares: list[float], temperature: float
) -> Tensor:
    """Logits whose softmax at the temperature is the mean of the teachers' distributions."""
    positive(name, "temperature", temperature)
    mean: Tensor | None = None
    for share, teacher in zip(shares, teachers, strict=True):
        if teacher.shape != student.shape:
            raise ValueError(
                f"{name}: teacher_logits must have the shape of student_logits "
                f"{list(student.shape)}, got {list(teacher.shape)}"
            )
        _checks.same_device(name, "teacher_logits", teacher, student.device)
        _checks.no_grad(name, "teacher_logits", teacher)
        dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
        log_p = (teacher.to(dtype) / temperature).log_softmax(-1) + math.log(share)
        mean = log_p if mean is None else torch.logaddexp(mean, log_p)
    assert mean is not None
    return mean * temperature


def tfkd_reg_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    correct_prob: float = 0.99,
    multiplier: float = 1.0,
    mode: str = "softmax_of_prob",
    scale_t2: bool = False,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    shift: int = 0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    row_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Teacher-free distillation from a virtual teacher (Tf-KD regularisation), in closed form.

    The virtual teacher ``p_d`` gives ``correct_prob`` to the label and spreads the rest evenly::

        loss = (1 - alpha) CE(z, label) + alpha * multiplier * KL(p_d' || p)

    Args:
        logits: ``[..., vocab]`` float.
        labels: ``[...]`` integers.
        alpha: weight of the virtual teacher.
        temperature: ``T`` by which the virtual teacher is softened.
        correct_prob: its probability of the label, in (0, 1).
        multiplier: extra factor of its term (the released code uses 1, 50 or 100 against its
            element-wise mean).
        mode: ``softmax_of_prob``, the released code: ``p_d' = softmax(p_d / T)``, the student at
            temperature 1. ``target``, the formula: ``p_d' ~ p_d ** (1 / T)``, the student at ``T``.
        scale_t2: multiply the term by ``T ** 2``.
        ignore_index: as in :func:`kd_loss`, like every argument that follows.
        mask: rows to use.
        shift: 1 for labels aligned with the input tokens.
        reduction: as in :func:`kd_loss`; the released code's is ``element_mean``.
        num_items_in_batch: denominator.
        row_weights: factors of the rows' losses.
        backend: as in :func:`kd_loss`.

    Returns:
        The loss, ``[]`` or ``[...]``, as :func:`kd_loss`.

    Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing
    Regularization", CVPR 2020.

    Example:
        >>> import kdkernels, torch
        >>> logits = torch.randn(4, 10, requires_grad=True)
        >>> kdkernels.tfkd_reg_loss(logits, torch.arange(4), alpha=0.1, temperature=20.0).backward()
    """
    name = "tfkd_reg_loss"
    number(name, "alpha", alpha, 0.0, 1.0)
    positive(name, "temperature", temperature)
    number(name, "correct_prob", correct_prob, 0.0, 1.0)
    positive(name, "correct_prob", correct_prob)
    number(name, "multiplier", multiplier, -math.inf, math.inf)
    choice(name, "mode", mode, ("softmax_of_prob", "target"))
    choice(name, "reduction", reduction, REDUCTIONS)
    classes = _columns(name, "logits", logits)
    rest = (1.0 - correct_prob) / max(classes - 1, 1)
    # How much less likely another class is than the label; in this form nothing overflows.
    if mode == "target":
        ratio = (rest / correct_prob) ** (1.0 / temperature)
    else:
        ratio = math.exp(min((rest - correct_prob) / temperature, 700.0))
    weight = alpha * multiplier * (temperature**2 if scale_t2 else 1.0)
    spec = Spec(
        divergence=Divergence.SPIKE,
        beta=1.0 / (1.0 + (classes - 1) * ratio),
        temperature=float(temperature) if mode == "target" else 1.0,
        ce_weight=1.0 - alpha,
        kd_weight=weight / classes if reduction == "element_mean" else weight,
        ignore_index=ignore_index,
        mean=reduction in ("mean", "element_mean"),
    )
    return reduce_rows(
        logits,
        None,
        labels,
        spec,
        1.0,
        mask=mask,
        shift=shift,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        row_weights=row_weights,
        backend=backend,
    )


def tfkd_self_loss(
    logits: Tensor,
    pretrained_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    multiplier: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    shift: int = 0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    row_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Teacher-free distillation from a trained copy of the student itself (Tf-KD self-training).

    ``loss = (1 - alpha) CE + alpha * multiplier * T^2 * KL(pretrained_T || student_T)``.

    Args:
        logits: ``[..., vocab]`` float.
        pretrained_logits: ``[..., vocab]``, of the frozen, normally trained copy.
        labels: ``[...]`` integers.
        alpha: weight of the self-teacher.
        temperature: ``T``.
        multiplier: extra factor of its term, as in the released code.
        ignore_index: as in :func:`kd_loss`, like every argument that follows.
        mask: rows to use.
        shift: 1 for labels aligned with the input tokens.
        reduction: as in :func:`kd_loss`; the released code's is ``element_mean``.
        num_items_in_batch: denominator.
        row_weights: factors of the rows' losses.
        backend: as in :func:`kd_loss`.

    Returns:
        The loss, ``[]`` or ``[...]``, as :func:`kd_loss`.

    Source: Yuan et al., CVPR 2020.

    Example:
        >>> import kdkernels, torch
        >>> logits, before = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
        >>> kdkernels.tfkd_self_loss(
        ...     logits, before, torch.arange(4), alpha=0.9, temperature=6.0
        ... ).backward()
    """
    number("tfkd_self_loss", "alpha", alpha, 0.0, 1.0)
    return kd_loss(
        logits,
        pretrained_logits,
        labels,
        temperature=temperature,
        ce_weight=1.0 - alpha,
        kd_weight=alpha * multiplier,
        ignore_index=ignore_index,
        mask=mask,
        shift=shift,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        row_weights=row_weights,
        backend=backend,
    )


def confidence_penalty_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.1,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    shift: int = 0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    row_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy minus ``beta`` times the entropy of the student.

    ``loss = CE(z, label) - beta * H(softmax(z))``.

    Args:
        logits: ``[..., vocab]`` float.
        labels: ``[...]`` integers.
        beta: weight of the penalty, at least 0.
        ignore_index: as in :func:`kd_loss`, like every argument that follows.
        mask: rows to use.
        shift: 1 for labels aligned with the input tokens.
        reduction: as in :func:`kd_loss`.
        num_items_in_batch: denominator.
        row_weights: factors of the rows' losses.
        backend: as in :func:`kd_loss`.

    Returns:
        The loss, ``[]`` or ``[...]``, as :func:`kd_loss`.

    Source: Pereyra et al., "Regularizing Neural Networks by Penalizing Confident Output
    Distributions", 2017.

    Example:
        >>> import kdkernels, torch
        >>> uniform = kdkernels.confidence_penalty_loss(torch.zeros(1, 4), torch.tensor([0]))
        >>> round(uniform.item(), 4)  # log 4 - 0.1 log 4
        1.2477
    """
    number("confidence_penalty_loss", "beta", beta, 0.0, math.inf)
    choice("confidence_penalty_loss", "reduction", reduction, REDUCTIONS)
    classes = _columns("confidence_penalty_loss", "logits", logits)
    spec = Spec(
        divergence=Divergence.NEG_ENTROPY,
        ce_weight=1.0,
        kd_weight=beta / classes if reduction == "element_mean" else float(beta),
        ignore_index=ignore_index,
        mean=reduction in ("mean", "element_mean"),
    )
    return reduce_rows(
        logits,
        None,
        labels,
        spec,
        1.0,
        mask=mask,
        shift=shift,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        row_weights=row_weights,
        backend=backend,
    )


def _columns(name: str, argument: str, logits: Tensor) -> int:
    try:
        columns: int = logits.shape[-1]
    except AttributeError:
        raise TypeError(
            f"{name}: {argument} must be a Tensor, got {type(logits).__name__}"
        ) from None
    except IndexError:
        columns = 0
    if columns == 0:
        raise ValueError(
            f"{name}: {argument} must be [..., classes] with at least one class, got shape "
            f"{list(logits.shape)}"
        )
    return columns
