"""Label regularisers for fine-tuning classifiers, as one family of losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from kdkernels.api._spec import choice, number, positive
from kdkernels.api.functional import (
    confidence_penalty_loss,
    kd_loss,
    label_smoothing_loss,
    tfkd_reg_loss,
    tfkd_self_loss,
)

__all__ = ["METHODS", "LabelRegulariser"]

NAME = "LabelRegulariser"
# The parameters of each method with their defaults.
METHODS: dict[str, dict[str, Any]] = {
    "ft": {},
    "ls": {"label_smoothing": 0.1, "convention": "torch"},
    "tf_reg": {
        "alpha": 0.5,
        "temperature": 1.0,
        "correct_prob": 0.9,
        "mode": "target",
        "multiplier": 1.0,
        "scale_t2": False,
    },
    "tf_self": {"alpha": 0.5, "temperature": 2.0, "multiplier": 1.0},
    "self_kd": {"alpha": 0.5, "temperature": 2.0, "scale_t2": True},
    "kd": {"alpha": 0.5, "temperature": 2.0, "scale_t2": True},
    "confidence_penalty": {"beta": 0.1},
}
# Whose logits a method learns from.
TEACHERS = {"kd": "teacher", "self_kd": "self", "tf_self": "self"}


class LabelRegulariser:
    r"""The loss of fine-tuning with a label regulariser: a softer target in place of the label.

    With ``p`` the student, ``q`` the label's one-hot vector and ``K`` classes::

        ft                  H(q, p)
        ls                  H((1 - e) q + e / K, p)                    e = label_smoothing
        tf_reg              (1 - a) H(q, p) + a KL(p_d || p)           p_d: A on the label
        tf_self             (1 - a) H(q, p) + a m T^2 KL(p_self,T || p_T)
        self_kd             (1 - a) H(q, p) + a T^2 KL(p_self,T || p_T)
        kd                  (1 - a) H(q, p) + a T^2 KL(p_teacher,T || p_T)
        confidence_penalty  H(q, p) - b H(p)

    ``ls`` with ``convention="tfkd"`` spreads ``e`` over the other classes alone. ``tf_reg`` is
    Yuan et al.'s virtual teacher: ``mode="target"`` is their formula, ``"softmax_of_prob"`` their
    code, see :func:`~kdkernels.tfkd_reg_loss`. ``tf_self`` is ``self_kd`` with their multiplier
    ``m``. Nothing but ``kd``, ``self_kd`` and ``tf_self`` needs a teacher's row.

    Logits of one column are a regression: mean squared error to the labels, with a teacher
    ``(1 - a) MSE(z, label) + a MSE(z, teacher)``; the other methods have no meaning there.

    Args:
        method: ``ft``, ``ls``, ``tf_reg``, ``tf_self``, ``self_kd``, ``kd`` or
            ``confidence_penalty``.
        **parameters: Of the method, by name; ``METHODS`` holds them with their defaults:
            ``label_smoothing``, ``convention`` | ``alpha``, ``temperature``, ``correct_prob``,
            ``mode``, ``multiplier``, ``scale_t2`` | ``beta``.

    Attributes:
        method: The method.
        parameters: All its parameters.

    Raises:
        ValueError: An unknown method, a parameter of another one, a value out of range.
        TypeError: A value of a wrong type.

    Source: Kobyzev et al., "Do we need Label Regularization to Fine-tune Pre-trained Language
    Models?", EACL 2023; Yuan et al., CVPR 2020; Szegedy et al., 2016; Pereyra et al., 2017.

    Example:
        >>> import kdkernels, torch
        >>> logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1])
        >>> smooth = kdkernels.LabelRegulariser("ls", label_smoothing=0.05)
        >>> smooth(logits, labels).backward()
        >>> taught = kdkernels.LabelRegulariser("kd", alpha=0.9)
        >>> taught.needs_teacher
        True
        >>> loss = taught(logits, labels, torch.randn(4, 3))
    """

    def __init__(self, method: str, **parameters: Any) -> None:
        choice(NAME, "method", method, tuple(METHODS))
        known = METHODS[method]
        for key in parameters:
            if key not in known:
                names = ", ".join(known) or "none"
                raise ValueError(f"{NAME}: {key} must be a parameter of {method!r} ({names})")
        self.method = method
        self.parameters: dict[str, Any] = {**known, **parameters}
        self._check()
        self._loss: Callable[..., Any] = getattr(self, f"_{method}")

    def __repr__(self) -> str:
        shown = [repr(self.method), *(f"{key}={value!r}" for key, value in self.parameters.items())]
        return f"{NAME}({', '.join(shown)})"

    @property
    def teacher(self) -> str | None:
        """Whose logits it learns from: ``teacher``, ``self`` (a trained copy of the student)."""
        return TEACHERS.get(self.method)

    @property
    def needs_teacher(self) -> bool:
        """Whether a call takes a teacher's logits."""
        return self.teacher is not None

    def __call__(
        self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, **options: Any
    ) -> Any:
        """The loss of a batch.

        Args:
            logits: ``[..., classes]`` float, of the student. Gets the gradient.
            labels: ``[...]`` integers; float for a regression.
            teacher_logits: ``[..., classes]``, where :attr:`needs_teacher`; must not require grad.
            **options: ``ignore_index``, ``mask``, ``shift``, ``reduction``, ``num_items_in_batch``,
                ``row_weights`` and ``backend``, as in :func:`~kdkernels.kd_loss`; none for a
                regression.

        Returns:
            The loss, ``[]``, or as the reduction says.

        Raises:
            ValueError: A teacher's logits missing, or given where none is needed; else as
                :func:`~kdkernels.kd_loss`.
        """
        if (teacher_logits is not None) != self.needs_teacher:
            contract = "be given with" if self.needs_teacher else "be left out with"
            got = "None" if teacher_logits is None else "a tensor"
            raise ValueError(f"{NAME}: teacher_logits must {contract} {self.method!r}, got {got}")
        if logits.shape[-1] == 1:
            return self._regression(logits, labels, teacher_logits, options)
        if teacher_logits is None:
            return self._loss(logits, labels, **self.parameters, **options)
        return self._loss(logits, teacher_logits, labels, **self.parameters, **options)

    def _check(self) -> None:
        """Raises for a value out of range, before the first batch."""
        for key, value in self.parameters.items():
            if key in ("alpha", "label_smoothing", "correct_prob"):
                number(NAME, key, value, 0.0, 1.0)
            elif key in ("beta", "multiplier"):
                number(NAME, key, value, 0.0, math.inf)
            elif key == "temperature":
                positive(NAME, key, value)
            elif key == "convention":
                choice(NAME, key, value, ("torch", "tfkd"))
            elif key == "mode":
                choice(NAME, key, value, ("target", "softmax_of_prob"))
            elif type(value) is not bool:
                raise TypeError(f"{NAME}: {key} must be a bool, got {type(value).__name__}")
        if self.parameters.get("correct_prob") == 0.0:
            raise ValueError(f"{NAME}: correct_prob must be positive, got 0.0")

    def _regression(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher_logits: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        if self.method != "ft" and teacher_logits is None:
            raise ValueError(
                f"{NAME}: logits must have at least two classes with {self.method!r}, got shape "
                f"{list(logits.shape)}"
            )
        if options:
            raise ValueError(f"{NAME}: options must be left out for one column, got {[*options]}")
        student = logits.squeeze(-1)
        hard = F.mse_loss(student, labels.to(student.dtype))
        if teacher_logits is None:
            return hard
        alpha = self.parameters["alpha"]
        return (1.0 - alpha) * hard + alpha * F.mse_loss(student, teacher_logits.squeeze(-1))

    @staticmethod
    def _ft(logits: Tensor, labels: Tensor, **options: Any) -> Any:
        return kd_loss(logits, None, labels, **options)

    _ls = staticmethod(label_smoothing_loss)
    _tf_reg = staticmethod(tfkd_reg_loss)
    _tf_self = staticmethod(tfkd_self_loss)
    _self_kd = staticmethod(kd_loss)
    _kd = staticmethod(kd_loss)
    _confidence_penalty = staticmethod(confidence_penalty_loss)
