"""Keywords that reproduce the loss of other toolkits, so that runs can be compared or moved."""

from __future__ import annotations

from typing import Any

# Each entry holds what differs from the defaults of kd_loss. tests/api/test_compat.py checks every
# one against that toolkit's formula, written there independently.
_PRESETS: dict[str, dict[str, Any]] = {
    # Hinton et al. 2015: soft cross-entropy scaled by T^2, a small weight on the hard labels.
    "hinton": {"temperature": 4.0, "alpha": 0.9, "divergence": "soft_ce"},
    # Teacher-free KD, self-training: torch's element mean, so alpha depends on the class count.
    "tfkd": {"temperature": 20.0, "alpha": 0.95, "reduction": "element_mean"},
    # torchdistill KDLoss; its alpha is the weight of cross-entropy.
    "torchdistill": {
        "temperature": 4.0,
        "ce_weight": 0.5,
        "kd_weight": 0.5,
        "reduction": "batchmean",
    },
    # TextBrewer: soft cross-entropy without T^2, no hard labels unless asked for.
    "textbrewer": {
        "temperature": 4.0,
        "ce_weight": 0.0,
        "kd_weight": 1.0,
        "divergence": "soft_ce",
        "scale_t2": False,
    },
    # DistilBERT's script with both terms on the masked tokens (restrict_ce_to_mask).
    "distilbert": {"temperature": 2.0, "ce_weight": 2.0, "kd_weight": 5.0},
    # TRL GKDTrainer: generalised JSD per valid token, no T^2; its "temperature" is for sampling.
    "trl_gkd": {
        "ce_weight": 0.0,
        "kd_weight": 1.0,
        "divergence": "jsd",
        "beta": 0.5,
        "scale_t2": False,
    },
    # Liger's fused linear JSD: half hard, half soft.
    "liger_jsd": {"alpha": 0.5, "divergence": "jsd", "beta": 0.5, "scale_t2": False},
    # NVIDIA ModelOpt LogitsDistillationLoss: KL over the batch size, KD only.
    "modelopt": {"ce_weight": 0.0, "kd_weight": 1.0, "reduction": "batchmean"},
    # StarK: the mean of soft cross-entropy (with T^2) and cross-entropy.
    "stark": {"temperature": 2.0, "alpha": 0.5, "divergence": "soft_ce"},
}


def presets() -> tuple[str, ...]:
    """The names :func:`preset` knows."""
    return tuple(_PRESETS)


def preset(name: str, **overrides: Any) -> dict[str, Any]:
    """Keywords of :func:`kdkernels.kd_loss` that reproduce another toolkit's loss.

    Args:
        name: one of :func:`presets`.
        **overrides: keywords to change, e.g. ``temperature=2.0``; overriding ``alpha`` drops the
            explicit weights and the other way round.

    Raises:
        ValueError: unknown name.

    Example:
        >>> import kdkernels, torch
        >>> options = kdkernels.compat.preset("trl_gkd", beta=0.1)
        >>> loss = kdkernels.kd_loss(torch.randn(2, 7), torch.randn(2, 7), **options)
    """
    if name not in _PRESETS:
        raise ValueError(f"preset: name must be one of {', '.join(_PRESETS)}, got {name!r}")
    options = dict(_PRESETS[name])
    if "alpha" in overrides:
        options.pop("ce_weight", None)
        options.pop("kd_weight", None)
    if "ce_weight" in overrides or "kd_weight" in overrides:
        options.pop("alpha", None)
    return options | overrides
