"""Which layer of the student learns from which layer of the teacher, and through what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LayerMap", "Projections"]

RULES = ("uniform", "last", "first")
HIDDEN = "hidden-state lists hold the embedding output and then one entry a layer"
ATTENTIONS = "attention lists hold one entry a layer and none for the embedding"


@dataclass(frozen=True)
class LayerMap:
    r"""Which student layer learns from which teacher layer.

    Layers count from 1, and 0 is the output of the embedding: the indices of a list of hidden
    states, which has one entry more than there are layers. A list of attention maps, or of what
    the layers of a :class:`kdkernels.Capture` produce, has no entry for the embedding: its entry
    ``i`` belongs to layer ``i + 1``.

    With ``S`` student and ``T`` teacher layers, ``i = 1..S``::

        uniform: i -> round(i * T / S), halves up    3 of 12: 1 -> 4, 2 -> 8, 3 -> 12
        last:    i -> T - S + i                      3 of 12: 1 -> 10, 2 -> 11, 3 -> 12
        first:   i -> i                              3 of 12: 1 -> 1, 2 -> 2, 3 -> 3

    ``uniform`` is TinyBERT's and PKD's "skip" where ``T`` is a multiple of ``S``, and spread as
    evenly as whole layers can be elsewhere.

    Args:
        rule: ``uniform``, ``last``, ``first``, or pairs ``(student layer, teacher layer)``.
        include_embedding: the pair ``(0, 0)`` as well. Pairs name it themselves.
        student_layers: number of student layers, if lists are to be checked against it: one entry
            too few or too many cannot be told from the list alone.
        teacher_layers: number of teacher layers, likewise.

    Raises:
        ValueError: layers out of range, or lists of a wrong length.
        TypeError: entries that are no tensors.

    Source: Sun et al., "Patient Knowledge Distillation for BERT Model Compression", 2019; Jiao et
    al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020.

    Example:
        >>> import kdkernels
        >>> layers = kdkernels.LayerMap("uniform", include_embedding=True)
        >>> layers.pairs(student_layers=4, teacher_layers=12)
        [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]
        >>> student, teacher = [torch.randn(2, 5, 8)] * 5, [torch.randn(2, 5, 16)] * 13
        >>> len(layers.hidden(student, teacher))
        5
        >>> len(layers.attentions(student[1:], teacher[1:]))
        4
    """

    rule: str | Sequence[tuple[int, int]]
    include_embedding: bool = False
    student_layers: int | None = None
    teacher_layers: int | None = None

    def __post_init__(self) -> None:
        for name in ("student_layers", "teacher_layers"):
            if getattr(self, name) is not None:
                _check_count("LayerMap", name, getattr(self, name))
        if not isinstance(self.include_embedding, bool):
            got = type(self.include_embedding).__name__
            raise TypeError(f"LayerMap: include_embedding must be a bool, got {got}")
        if isinstance(self.rule, str):
            if self.rule not in RULES:
                raise ValueError(
                    f"LayerMap: rule must be one of {', '.join(RULES)} or pairs of layers, got "
                    f"{self.rule!r}"
                )
            return
        object.__setattr__(self, "rule", _explicit(self.rule))
        if self.include_embedding:
            raise ValueError(
                "LayerMap: include_embedding must be False with pairs, which may hold (0, 0), got "
                "True"
            )

    def pairs(self, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
        """``(student layer, teacher layer)`` for models of so many layers, 0 the embedding."""
        for name, count in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
            _check_count("LayerMap", name, count)
            expected = getattr(self, name)
            if expected not in (None, count):
                raise ValueError(f"LayerMap: {name} must be {expected}, got {count}")
        if not isinstance(self.rule, str):
            for student, teacher in self.rule:
                _check_layer("student", student, student_layers)
                _check_layer("teacher", teacher, teacher_layers)
            return list(self.rule)
        if student_layers > teacher_layers:
            raise ValueError(
                f"LayerMap: student_layers must be at most the {teacher_layers} of the teacher for "
                f"{self.rule!r}, got {student_layers}"
            )
        layers = range(1, student_layers + 1)
        if self.rule == "uniform":  # in whole numbers, so that halves always go up
            s, t = student_layers, teacher_layers
            pairs = [(i, (2 * i * t + s) // (2 * s)) for i in layers]
        elif self.rule == "last":
            pairs = [(i, teacher_layers - student_layers + i) for i in layers]
        else:
            pairs = [(i, i) for i in layers]
        return [(0, 0), *pairs] if self.include_embedding else pairs

    def hidden(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs of tensors from two lists of hidden states, the embedding output first."""
        return self._select("hidden", student, teacher, embedding=1)

    def attentions(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs of tensors from two lists with one entry a layer; pairs with 0 are left out."""
        return self._select("attentions", student, teacher, embedding=0)

    def _select(
        self, name: str, student: Sequence[Tensor], teacher: Sequence[Tensor], *, embedding: int
    ) -> list[tuple[Tensor, Tensor]]:
        convention = HIDDEN if embedding else ATTENTIONS
        for who, entries in (("student", student), ("teacher", teacher)):
            _check_entries(name, who, entries)
            layers = getattr(self, f"{who}_layers")
            if layers is not None and len(entries) != layers + embedding:
                raise ValueError(
                    f"LayerMap.{name}: {who} must have {layers + embedding} entries for {layers} "
                    f"layers, got {len(entries)}; {convention}"
                )
            if len(entries) <= embedding:
                raise ValueError(
                    f"LayerMap.{name}: {who} must have an entry for each layer, got {len(entries)}"
                    f"; {convention}"
                )
        try:
            pairs = self.pairs(len(student) - embedding, len(teacher) - embedding)
        except ValueError as error:
            raise ValueError(f"{error}; {convention}") from None
        first = 1 - embedding  # the layer of the first entry
        selected = [(s - first, t - first) for s, t in pairs if min(s, t) >= first]
        if not selected:
            raise ValueError(f"LayerMap.{name}: rule must pair layers, got {pairs}; {convention}")
        return [(student[s], teacher[t]) for s, t in selected]


class Projections(nn.Module):
    r"""Learned linear maps from the width of student layers to that of their teacher layers.

    One ``torch.nn.Linear(student width, teacher width)`` a pair: a sequence to be given to a loss
    beside its pairs, or applied by hand. They live beside the student: give
    ``projections.parameters()`` to the optimizer with the student's. They are never part of the
    student nor of its ``state_dict()``; to resume, keep their own.

    Args:
        student_widths: last size of the student's tensor of each pair.
        teacher_widths: last size of the teacher's.
        bias: whether they have one.
        share: one map for all pairs, as TinyBERT's; widths must then be the same for all.
        skip_equal: ``None`` instead of a map where the widths agree. Off by default, as in
            TinyBERT: equal widths do not mean that the two models use them in the same way.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: numbers of pairs or widths that do not fit.
        TypeError: widths that are no integers.

    Note:
        Several processes must start from the same parameters and average their gradients, as
        DistributedDataParallel does for the student; it does not see those of a module beside it.

    Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020.

    Example:
        >>> import kdkernels, torch
        >>> student = torch.nn.Linear(4, 312)
        >>> projections = kdkernels.Projections([312, 312], [768, 768])
        >>> optimizer = torch.optim.AdamW([*student.parameters(), *projections.parameters()])
        >>> projections[1](student(torch.randn(2, 5, 4))).shape
        torch.Size([2, 5, 768])
        >>> len(projections)
        2
    """

    def __init__(
        self,
        student_widths: Sequence[int],
        teacher_widths: Sequence[int],
        *,
        bias: bool = True,
        share: bool = False,
        skip_equal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = _check_widths(student_widths, teacher_widths, share)

        def linear(student: int, teacher: int) -> nn.Linear | None:
            if skip_equal and student == teacher:
                return None
            return nn.Linear(student, teacher, bias=bias, device=device, dtype=dtype)

        self._pairs = len(widths)
        # A shared one is registered, and saved, once.
        made = [linear(*pair) for pair in (widths[:1] if share else widths)]
        self.linears = nn.ModuleList(made)  # type: ignore[arg-type]  # it may hold None

    @classmethod
    def for_pairs(cls, pairs: Sequence[tuple[Tensor, Tensor]], **options: Any) -> Projections:
        """Made for sample pairs ``(student, teacher)``, as :class:`LayerMap` gives them.

        ``options`` are those of the constructor; the device is that of the student's tensors.
        """
        for index, pair in enumerate(pairs):
            if len(pair) != 2 or not all(isinstance(x, Tensor) and x.dim() for x in pair):
                raise TypeError(f"Projections: pairs must hold two tensors, got others at {index}")
        if pairs:
            options = {"device": pairs[0][0].device, **options}
        return cls([s.shape[-1] for s, _ in pairs], [t.shape[-1] for _, t in pairs], **options)

    def __len__(self) -> int:
        return self._pairs

    def __getitem__(self, index: int) -> nn.Linear | None:
        """The map of a pair; ``None`` where it has none."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Projections: index must be below {len(self)}, got {index}")
        return self.linears[index % len(self.linears)]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[nn.Linear | None]:
        return (self[index] for index in range(len(self)))


def _explicit(rule: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(rule, Sequence):
        raise TypeError(f"LayerMap: rule must be a name or pairs, got {type(rule).__name__}")
    pairs = tuple(tuple(pair) if isinstance(pair, Sequence) else (pair,) for pair in rule)
    for pair in pairs:
        if len(pair) != 2 or not all(_is_count(layer) for layer in pair):
            raise ValueError(
                "LayerMap: rule must hold pairs (student layer, teacher layer) of integers of at "
                f"least 0, got {pair!r}"
            )
        if pairs.count(pair) > 1:
            raise ValueError(f"LayerMap: rule must hold different pairs, got {pair!r} twice")
    if not pairs:
        raise ValueError("LayerMap: rule must hold at least one pair, got none")
    return pairs


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_count(name: str, argument: str, value: object) -> None:
    if not _is_count(value) or value == 0:
        raise ValueError(f"{name}: {argument} must be an integer of at least 1, got {value!r}")


def _check_layer(who: str, layer: int, layers: int) -> None:
    if layer > layers:
        raise ValueError(
            f"LayerMap: {who} layer must be at most {layers}, counting from 1 with 0 the "
            f"embedding, got {layer}"
        )


def _check_entries(name: str, who: str, entries: object) -> None:
    if not isinstance(entries, Sequence):
        got = type(entries).__name__
        raise TypeError(f"LayerMap.{name}: {who} must be a list of tensors, got {got}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, Tensor):
            hint = " (attention maps need attn_implementation='eager')" if entry is None else ""
            raise TypeError(
                f"LayerMap.{name}: {who} must hold tensors, got {type(entry).__name__} at {index}"
                f"{hint}"
            )


def _check_widths(student: Any, teacher: Any, share: bool) -> list[tuple[int, int]]:
    for argument, widths in (("student_widths", student), ("teacher_widths", teacher)):
        if isinstance(widths, str) or not isinstance(widths, Sequence):
            got = type(widths).__name__
            raise TypeError(f"Projections: {argument} must be a list of integers, got {got}")
        for width in widths:
            _check_count("Projections", argument, width)
        if share and len(set(widths)) > 1:
            raise ValueError(f"Projections: {argument} must agree with share=True, got {widths}")
    if len(student) != len(teacher):
        raise ValueError(
            "Projections: teacher_widths must be as many as student_widths "
            f"({len(student)}), got {len(teacher)}"
        )
    if not student:
        raise ValueError("Projections: student_widths must name at least one pair, got none")
    return list(zip(student, teacher, strict=True))
