"""How much a teacher needs each head and neuron, and how much its student does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdkernels.api import _sites
from kdkernels.api._files import write_file
from kdkernels.api._spec import choice, number, positive
from kdkernels.api.gate_scores import PER, gate_scores
from kdkernels.api.methods.structure import KINDS, layers_of, watched

__all__ = ["TeacherScores", "score"]

NAME = "SparseTeacher.score"
# Added to the norm of a layer's scores, by which they are divided.
EPSILON = 1e-7
# Tokens of a text up to which, in 16 bits on a CPU, plain products are faster than the flash kernel
# with its backward pass: BERT-base's scores took 1.15 s instead of 1.33 at 8 x 128, but 1.32 s
# instead of 1.20 at 4 x 256, and in float32 3.40 instead of 3.13 at 8 x 128.
SHORT = 128

# For each kind of unit, the scores of each layer.
Units = Mapping[str, Sequence[Tensor]]


@dataclasses.dataclass(frozen=True)
class TeacherScores:
    r"""Scores of all heads and neurons of a teacher, ``SparseTeacher.score``.

    Attributes:
        expressiveness: ``{"heads": ..., "neurons": ...}``, for each layer ``[units]``: absolute
            gradients of the teacher's own loss at gates on the units, summed over batches or
            examples.
        friendliness: the same of the distillation loss; None without a student.
        lam: share of expressiveness in :attr:`combined`.

    Raises:
        ValueError: ``lam`` out of [0, 1], or below 1 without friendliness; scores that are not
            finite.
    """

    expressiveness: Units
    friendliness: Units | None = None
    lam: float = 0.5

    def __post_init__(self) -> None:
        number("TeacherScores", "lam", self.lam, 0.0, 1.0)
        if self.friendliness is None and self.lam < 1.0:
            raise ValueError(f"TeacherScores: lam must be 1 without a student, got {self.lam:g}")
        for units in (self.expressiveness, self.friendliness):
            for kind in KINDS if units is not None else ():
                for layer, scores in enumerate(units[kind]):  # type: ignore[index]
                    if not scores.isfinite().all():
                        raise ValueError(
                            f"TeacherScores: scores of {kind} must be finite, got others in layer "
                            f"{layer}"
                        )

    @property
    def combined(self) -> dict[str, list[Tensor]]:
        """``lam E / |E| + (1 - lam) F / |F|``, norms over a layer's heads or neurons; float64."""
        friendliness = self.friendliness or self.expressiveness  # of no weight then
        return {
            kind: [
                self.lam * _normalised(e) + (1 - self.lam) * _normalised(f)
                for e, f in zip(self.expressiveness[kind], friendliness[kind], strict=True)
            ]
            for kind in KINDS
        }

    def at(self, lam: float) -> TeacherScores:
        """The same measurements with another share of expressiveness."""
        return dataclasses.replace(self, lam=lam)

    def save(self, path: Path | str) -> None:
        """Writes the scores for ``torch.load``, whole or not at all."""
        parts = (self.expressiveness, self.friendliness)
        e, f = (units and {kind: list(units[kind]) for kind in KINDS} for units in parts)
        state = {"expressiveness": e, "friendliness": f, "lam": self.lam}
        write_file(Path(path), partial(torch.save, state))

    @classmethod
    def load(cls, path: Path | str) -> TeacherScores:
        """Reads what :meth:`save` wrote."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(state, dict) or set(state) != fields:
            raise ValueError(f"TeacherScores: path must hold saved scores, got {path}")
        return cls(**state)


def score(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    student: nn.Module | None = None,
    per: str = "batch",
    lam: float = 0.5,
    temperature: float = 2.0,
) -> TeacherScores:
    """What ``SparseTeacher.score`` documents."""
    choice(NAME, "per", per, PER)
    number(NAME, "lam", lam, 0.0, 1.0)
    positive(NAME, "temperature", temperature)
    if student is None and lam < 1.0:
        raise ValueError(f"{NAME}: student must be given with a lam of {lam:g} below 1, got None")
    for each in (model, student):
        if each is not None:
            _sites.check_model(NAME, each)
    teacher = _sites.unwrapped(model)
    run = _Pass(teacher, student, per, float(temperature))
    with torch.enable_grad(), _frozen(teacher), _frozen(student):
        for batch in loader:
            run.add(batch)
    if not run.batches:
        raise ValueError(f"{NAME}: loader must have at least one batch, got none")
    return TeacherScores(run.total(0), None if student is None else run.total(1), float(lam))


class _Pass:
    """Sums over batches."""

    def __init__(self, teacher: nn.Module, student: nn.Module | None, per: str, t: float) -> None:
        self._teacher, self._student, self._per, self._t = teacher, student, per, t
        self._layers = layers_of(NAME, teacher)
        parameter = next(teacher.parameters())
        self._device, self._narrow = parameter.device, parameter.dtype.itemsize == 2
        self._sums: dict[tuple[int, int, str], Tensor] = {}
        self.batches = 0

    def total(self, term: int) -> Units:
        """Of expressiveness (0) or friendliness (1)."""
        layers = range(len(self._layers))
        return {k: [self._sums[term, i, k].double().cpu() for i in layers] for k in KINDS}

    def add(self, batch: Mapping[str, Any]) -> None:
        """One batch: a pass forward, and back for every loss that needs its own."""
        inputs, labels = self._inputs(batch)
        self._mask = inputs.get("attention_mask")
        self._leaves: list[Tensor] = []
        with watched(self._layers, self._see), self._attention(inputs):
            logits = _logits("model", self._teacher, inputs)
        cotangents = [_own(logits.detach(), labels)]
        if self._student is not None:
            with torch.no_grad():
                taught = _logits("student", self._student, inputs)
            if taught.shape != logits.shape:
                raise ValueError(
                    f"{NAME}: student must have the teacher's logits {list(logits.shape)}, got "
                    f"{list(taught.shape)}"
                )
            cotangents.append(_students(logits.detach(), taught, self._t))
        if self._per == "batch":
            cotangents = [each / len(logits) for each in cotangents]
        if logits.shape[1] <= 2:
            # They sum to 0 over the classes: both are multiples of one direction, example by
            # example, and so are the gradients that they lead to. One pass back gives both, and
            # reads each activation once.
            direction = torch.ones_like(logits)
            direction[:, 1:] = -1
            self._back(logits, direction, [(i, c[:, 0]) for i, c in enumerate(cotangents)])
        else:
            # Keeping the first loss's gradients until the second's arrive would take as much memory
            # as all activations; reading an activation that was just used takes little time.
            for i, cotangent in enumerate(cotangents):
                self._back(logits, cotangent, [(i, None)], keep=i + 1 < len(cotangents))
        self.batches += 1

    def _attention(self, inputs: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """The attention kernels of the pass that gradients come back through."""
        ids = inputs.get("input_ids")
        short = isinstance(ids, Tensor) and ids.shape[-1] <= SHORT
        narrow = torch.is_autocast_enabled(self._device.type) or self._narrow
        plain = short and narrow and self._device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    def _back(
        self,
        logits: Tensor,
        cotangent: Tensor,
        terms: list[tuple[int, Tensor | None]],
        keep: bool = False,
    ) -> None:
        self._terms = terms
        torch.autograd.grad(
            logits, self._leaves, cotangent.to(logits.dtype), retain_graph=keep, allow_unused=True
        )

    def _see(self, index: int, kind: str, x: Tensor) -> Tensor:
        """Starts the graph at the first activation: nothing before it needs a gradient."""
        if not x.requires_grad:
            x = x.detach().requires_grad_()
            self._leaves.append(x)
        x.register_hook(partial(self._arrived, index, kind, x.detach()))
        return x

    @torch.no_grad()
    def _arrived(self, index: int, kind: str, activation: Tensor, grad: Tensor) -> None:
        """The gradient at an activation is there; it is used while it is in the cache."""
        shape = (-1, *[1] * (grad.dim() - 1))
        grads = [grad if f is None else grad * f.to(grad.dtype).view(shape) for _, f in self._terms]
        keys = [(term, index, kind) for term, _ in self._terms]
        into = [self._sums[key] for key in keys if key in self._sums]
        mask = self._mask
        if mask is not None and mask.shape != activation.shape[:-1]:
            mask = None
        found = gate_scores(
            activation,
            grads if len(grads) > 1 else grads[0],
            width=self._layers[index].width(kind),
            per=self._per,
            mask=mask,
            accumulate_into=None if not into else into if len(grads) > 1 else into[0],
        )
        if not into:
            parts = found if len(grads) > 1 else [found]
            self._sums.update(zip(keys, parts, strict=True))

    def _inputs(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"{NAME}: loader must give mappings of a model's arguments, got "
                f"{type(batch).__name__}"
            )
        if not isinstance(batch.get("labels"), Tensor):
            raise ValueError(f"{NAME}: batches must have labels, got {', '.join(batch)}")
        moved = {
            key: x.to(self._device) if isinstance(x, Tensor) else x for key, x in batch.items()
        }
        labels = moved.pop("labels")
        return moved, labels


def _logits(argument: str, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    output = model(**inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shown = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(f"{NAME}: {argument} must give logits [batch, classes], got {shown}")
    return logits


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient at the logits of each example's cross-entropy; one column: squared error."""
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    if labels.numel() != len(logits):
        raise ValueError(
            f"{NAME}: labels must be one of each of {len(logits)} examples, got shape "
            f"{list(labels.shape)}"
        )
    if logits.shape[1] == 1:
        return 2 * (wide - labels.view(-1, 1).to(wide.dtype))
    if labels.is_floating_point():
        raise TypeError(f"{NAME}: labels must be class indices, got {labels.dtype}")
    return wide.softmax(-1) - F.one_hot(labels.view(-1), logits.shape[1])


def _students(teacher: Tensor, student: Tensor, t: float) -> Tensor:
    """Gradient at the teacher's logits of each example's distillation loss, the student fixed.

    The loss is half of ``T^2`` times the soft cross-entropy; its other half, the student's own
    cross-entropy, does not depend on the teacher. One column: half of the squared difference.
    """
    wide = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    teacher, student = teacher.to(wide), student.to(wide)
    if teacher.shape[1] == 1:
        return teacher - student
    p, log_q = (teacher / t).softmax(-1), (student / t).log_softmax(-1)
    return -t / 2 * p * (log_q - (p * log_q).sum(-1, keepdim=True))


def _normalised(scores: Tensor) -> Tensor:
    wide = scores.double().cpu()
    return wide / (wide.norm() + EPSILON)


@contextmanager
def _frozen(model: nn.Module | None) -> Iterator[None]:
    """No dropout and no gradients of weights in the block, whose products cost as much again."""
    if model is None:
        yield
        return
    training = [(module, module.training) for module in model.modules()]
    required = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
        for module, mode in training:
            module.training = mode
