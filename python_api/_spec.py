"""The numbers of a call: validated, and resolved to what the kernels take."""

from __future__ import annotations

import math
from functools import lru_cache

from kdkernels.ops.kd_loss import Divergence, Spec, Tail
from kdkernels.ops.linear_kd_loss import plan_chunk_rows

DIVERGENCES = {
    "forward_kl": Divergence.FORWARD_KL,
    "soft_ce": Divergence.SOFT_CE,
    "reverse_kl": Divergence.REVERSE_KL,
    "jsd": Divergence.JSD,
    "tvd": Divergence.TVD,
}
# What a sparse teacher can be compared by, and what stands for the mass that it does not list.
SPARSE_DIVERGENCES = ("forward_kl", "reverse_kl")
TAILS = {
    "bucket": Tail.BUCKET,
    "renorm": Tail.RENORM,
    "none": Tail.NONE,
    "uniform": Tail.UNIFORM,
}
REDUCTIONS = ("mean", "batchmean", "sum", "none", "element_mean")


@lru_cache(maxsize=256)
def kd_spec(
    temperature: float,
    alpha: float | None,
    ce_weight: float | None,
    kd_weight: float | None,
    divergence: str,
    beta: float,
    scale_t2: bool,
    label_smoothing: float,
    smoothing_convention: str,
    z_loss: float,
    logit_scale: float | tuple[float, float],
    softcap: float | tuple[float | None, float | None] | None,
    classes: int | None,
    ignore_index: int,
    reduction: str,
    has_teacher: bool,
    has_labels: bool,
    return_parts: bool,
    columns: int,
    name: str = "kd_loss",
    tail: str | None = None,
) -> tuple[Spec, float]:
    """Validates the numbers of a call; cached, so it costs nothing in a loop."""
    positive(name, "temperature", temperature)
    choice(name, "divergence", divergence, SPARSE_DIVERGENCES if tail else tuple(DIVERGENCES))
    if tail is not None:
        choice(name, "tail", tail, tuple(TAILS))
    choice(name, "reduction", reduction, REDUCTIONS)
    choice(name, "smoothing_convention", smoothing_convention, ("torch", "tfkd"))
    number(name, "beta", beta, 0.0, 1.0)
    number(name, "label_smoothing", label_smoothing, 0.0, 1.0)
    number(name, "z_loss", z_loss, 0.0, math.inf)
    if classes is not None and (not _is_int(classes) or classes < 1):
        raise ValueError(f"{name}: vocab_size must be an integer of at least 1, got {classes!r}")
    # The kernels take it among floating-point numbers.
    if not _is_int(ignore_index) or abs(ignore_index) > 2**53:
        raise ValueError(f"{name}: ignore_index must be an integer, got {ignore_index!r}")
    ce, kd = _weights(name, alpha, ce_weight, kd_weight, has_teacher, has_labels)
    kind = DIVERGENCES[divergence]
    if kind == Divergence.JSD and beta in (0.0, 1.0):
        # The limits that users of beta expect; the formula itself gives 0 there.
        kind = Divergence.FORWARD_KL if beta == 0.0 else Divergence.REVERSE_KL
    if not has_teacher or (kd == 0.0 and not return_parts):
        kind = Divergence.NONE
    real = columns if classes is None else classes
    if label_smoothing and smoothing_convention == "tfkd":
        label_smoothing = label_smoothing * real / (real - 1) if real > 1 else 0.0
    t2 = float(temperature) ** 2 if scale_t2 else 1.0
    if reduction == "element_mean":
        t2 /= real
    scales, caps = _pair(name, "logit_scale", logit_scale), _pair(name, "softcap", softcap)
    for cap in caps:
        if cap is not None:
            positive(name, "softcap", cap)
    for scale in scales:
        number(name, "logit_scale", scale, -math.inf, math.inf)
    spec = Spec(
        divergence=int(kind),
        beta=float(beta),
        temperature=float(temperature),
        ce_weight=ce,
        kd_weight=kd * t2,
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        student_scale=float(scales[0] or 0.0),
        teacher_scale=float(scales[1] or 0.0),
        student_softcap=float(caps[0] or 0.0),
        teacher_softcap=float(caps[1] or 0.0),
        ignore_index=ignore_index,
        classes=-1 if classes is None else classes,
        mean=reduction in ("mean", "element_mean"),
        want_ce=return_parts and has_labels,
        tail=int(Tail.FULL if tail is None else TAILS[tail]),
    )
    return spec, t2


def _weights(
    name: str,
    alpha: float | None,
    ce_weight: float | None,
    kd_weight: float | None,
    has_teacher: bool,
    has_labels: bool,
) -> tuple[float, float]:
    """``(ce_weight, kd_weight)`` from either form, checked against what is there."""
    if alpha is not None and (ce_weight is not None or kd_weight is not None):
        raise ValueError(f"{name}: alpha must not be given together with ce_weight or kd_weight")
    if (ce_weight is None) != (kd_weight is None):
        raise ValueError(f"{name}: ce_weight and kd_weight must be given together")
    if alpha is not None:
        number(name, "alpha", alpha, 0.0, 1.0)
        ce, kd = 1.0 - alpha, float(alpha)
    elif ce_weight is not None and kd_weight is not None:
        number(name, "ce_weight", ce_weight, -math.inf, math.inf)
        number(name, "kd_weight", kd_weight, -math.inf, math.inf)
        ce, kd = float(ce_weight), float(kd_weight)
    elif has_teacher and has_labels:
        ce, kd = 0.5, 0.5
    else:
        ce, kd = (0.0, 1.0) if has_teacher else (1.0, 0.0)
    if kd != 0.0 and not has_teacher:
        raise ValueError(f"{name}: teacher must be given with a KD weight of {kd:g}, got None")
    if ce != 0.0 and not has_labels:
        raise ValueError(
            f"{name}: labels must be given with a cross-entropy weight of {ce:g}, got None"
        )
    return ce, kd


def _pair(name: str, argument: str, value: object) -> tuple[float | None, float | None]:
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(
                f"{name}: {argument} must be a number or a (student, teacher) pair, got {value!r}"
            )
        return value
    return value, value  # type: ignore[return-value]


def number(name: str, argument: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: {argument} must be a number, got {type(value).__name__}")
    # No math.isfinite: under torch.compile(dynamic=True) the value may be symbolic.
    if not (low <= value <= high) or not (-math.inf < value < math.inf):
        contract = f"in [{low:g}, {high:g}]"
        if math.isinf(high):
            contract = "finite" if math.isinf(low) else f"finite and {low:g} or more"
        raise ValueError(f"{name}: {argument} must be {contract}, got {value!r}")


def integer(name: str, argument: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: {argument} must be {least} or more, got {value}")


def positive(name: str, argument: str, value: object) -> None:
    number(name, argument, value, -math.inf, math.inf)
    if value <= 0:  # type: ignore[operator]
        raise ValueError(f"{name}: {argument} must be positive, got {value!r}")


def chunk_rows_of(
    name: str,
    chunk_rows: int | None,
    chunk_bytes: int | None,
    rows: int,
    columns: int,
    models: int,
) -> int | None:
    """Rows at a time from either form; ``None``: the op plans them."""
    if chunk_bytes is None:
        return chunk_rows
    if chunk_rows is not None:
        raise ValueError(f"{name}: chunk_rows must not be given together with chunk_bytes")
    positive(name, "chunk_bytes", chunk_bytes)
    return plan_chunk_rows(rows, columns, models, int(chunk_bytes))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def choice(name: str, argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {argument} must be one of {', '.join(choices)}, got {value!r}")
