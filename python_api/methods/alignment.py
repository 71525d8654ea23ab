"""Which layers of a teacher and a student hold the same variable of an interchange."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdkernels.api._files import write_text
from kdkernels.api._spec import choice, integer

__all__ = ["AlignedLayers", "Alignment"]

NAME = "Alignment"
NAMES = ("single_middle", "middle_late", "multilayer")
# Of middle_late: so far from the end are the two layers.
LATE = (3, 2)


@dataclass(frozen=True)
class AlignedLayers:
    """Layers that are swapped in the same step.

    Attributes:
        teacher: Layers of the teacher, from 0; all of them are overwritten in one run.
        student: Layers of the student.
        teacher_dims: Columns ``(start, stop)``, e.g. those of some heads; None for all.
        student_dims: The student's.
    """

    teacher: tuple[int, ...]
    student: tuple[int, ...]
    teacher_dims: tuple[int, int] | None = None
    student_dims: tuple[int, int] | None = None


@dataclass(frozen=True)
class Alignment:
    """The variables that teacher and student share, one of which is drawn for each step.

    Layers count from 0. :meth:`named` makes the published ones for any two depths, :meth:`load`
    reads one from a file.

    Args:
        teacher_layers: how many layers the teacher has.
        student_layers: how many layers the student has.
        mappings: the variables.

    Raises:
        ValueError: layers that the models do not have, or none.

    References:
        Wu et al., Causal Distillation for Language Models, arXiv 2112.02505.

    Example:
        >>> import kdkernels
        >>> alignment = kdkernels.Alignment.named("multilayer", 12, 3)
        >>> [(m.teacher, m.student) for m in alignment.mappings]
        [((0, 1, 2, 3), (0,)), ((4, 5, 6, 7), (1,)), ((8, 9, 10, 11), (2,))]
    """

    teacher_layers: int
    student_layers: int
    mappings: tuple[AlignedLayers, ...]

    def __post_init__(self) -> None:
        for who in ("teacher", "student"):
            count = getattr(self, f"{who}_layers")
            integer(NAME, f"{who}_layers", count, 1)
            for mapping in self.mappings:
                _check_layers(who, getattr(mapping, who), count)
                _check_dims(who, getattr(mapping, f"{who}_dims"))
        if not self.mappings:
            raise ValueError(f"{NAME}: mappings must hold at least one, got none")

    @classmethod
    def named(cls, name: str, teacher_layers: int, student_layers: int) -> Alignment:
        """A published alignment, for any two depths; for 12 to 3, 6 and 9 layers the published one.

        Args:
            name: ``single_middle``: the layer in the middle of each. ``middle_late``: the second
                and third but last layers, one after the other. ``multilayer``: each layer of the
                student with as many consecutive ones of the teacher; of a rest the first student
                layers get one more.
            teacher_layers: how many layers the teacher has.
            student_layers: how many layers the student has; not more than the teacher.
        """
        choice(NAME, "name", name, NAMES)
        integer(NAME, "student_layers", student_layers, 1)
        if teacher_layers < student_layers:
            raise ValueError(
                f"{NAME}: teacher_layers must be at least the {student_layers} of the student, got "
                f"{teacher_layers}"
            )
        pairs: list[tuple[tuple[int, ...], int]] = []
        if name == "single_middle":
            pairs.append(((teacher_layers // 2,), student_layers // 2))
        elif name == "middle_late":
            if student_layers < max(LATE):
                raise ValueError(
                    f"{NAME}: student_layers must be at least {max(LATE)} for middle_late, got "
                    f"{student_layers}"
                )
            pairs += [((teacher_layers - late,), student_layers - late) for late in LATE]
        else:
            each, more = divmod(teacher_layers, student_layers)
            first = 0
            for layer in range(student_layers):
                end = first + each + (layer < more)
                pairs.append((tuple(range(first, end)), layer))
                first = end
        mappings = tuple(AlignedLayers(teacher, (student,)) for teacher, student in pairs)
        return cls(teacher_layers, student_layers, mappings)

    @classmethod
    def load(cls, path: Path | str) -> Alignment:
        """Reads a file that :meth:`save` wrote, or one like it.

        JSON with ``teacher_layers``, ``student_layers`` and ``mappings``, each of which has lists
        ``teacher`` and ``student`` and may have ``teacher_dims`` and ``student_dims``.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            mappings = tuple(_mapping(entry) for entry in values.pop("mappings"))
            return cls(**values, mappings=mappings)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{NAME}: path must name a readable file, got {error}") from error
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{NAME}: path must hold JSON with teacher_layers, student_layers and mappings of "
                f"teacher and student, got {path}: {error}"
            ) from error

    def save(self, path: Path | str) -> None:
        """Writes the alignment as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(asdict(self), indent=1) + "\n")


def _mapping(entry: Mapping[str, Any]) -> AlignedLayers:
    values: dict[str, Any] = {k: None if v is None else tuple(v) for k, v in entry.items()}
    return AlignedLayers(**values)


def _check_layers(who: str, layers: Sequence[int], count: int) -> None:
    good = layers and len(set(layers)) == len(layers)
    if not good or any(type(x) is not int or not 0 <= x < count for x in layers):
        raise ValueError(
            f"{NAME}: {who} layers of a mapping must be different integers in 0..{count - 1}, got "
            f"{list(layers)}"
        )


def _check_dims(who: str, dims: Sequence[int] | None) -> None:
    if dims is not None and not (len(dims) == 2 and 0 <= dims[0] < dims[1]):
        raise ValueError(f"{NAME}: {who}_dims must be (start, stop), got {list(dims)}")
