"""What a study is: a YAML file, read into typed and checked values."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from kdkernels.api.distill.config import DEVICES, PRECISIONS
from kdkernels.api.distill.errors import DistillError, require
from kdkernels.api.methods.label_regularisation import METHODS, LabelRegulariser
from kdkernels.api.study.tasks import BUILT_IN, check_name

PRETRAINED, SCRATCH = "pretrained", "scratch"
INITIALISATIONS = (PRETRAINED, SCRATCH)
BASELINE = "ft"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
Scalar = str | int | float | bool


@dataclass(frozen=True)
class TaskSpec:
    """One task of the grid.

    Attributes:
        name: Its name in trials and tables.
        task: What it is: ``sentiment``, ``r8``, ``r52``, ``20news``, ``multiemo``, ``own``, ...;
            None for ``name``.
        data: The user's file of ``own``, or the folder a task is read from.
        labels: Training examples; None for all.
        dev: Dev examples; None for all.
        test: Test examples; None for all.
        max_length: Longest input in tokens.
        epochs: Epochs of the students; None for the study's.
    """

    name: str
    task: str | None = None
    data: str | None = None
    labels: int | None = None
    dev: int | None = None
    test: int | None = None
    max_length: int = 128
    epochs: int | None = None

    @property
    def kind(self) -> str:
        """What is behind the name."""
        return self.task or self.name


@dataclass(frozen=True)
class TeacherSpec:
    """A model that is fine-tuned on the labels and then teaches.

    Attributes:
        name: Its name.
        model: ``all-minilm-l6-v2`` or ``bert-tiny`` (downloaded), or a transformers folder.
        layers: Layers of it that are used; None for all.
        epochs: Epochs of its fine-tuning.
        lr: Its peak learning rate.
        batch_size: Examples per step of its fine-tuning.
    """

    name: str
    model: str
    layers: tuple[int, ...] | None = None
    epochs: int = 3
    lr: float = 1e-4
    batch_size: int = 32


@dataclass(frozen=True)
class StudentSpec:
    """A model that is trained in every trial.

    Attributes:
        name: Its name in trials and tables.
        model: As of a teacher.
        layers: Layers of it that are used; None for all.
        teacher: Name of its teacher; None where there is one teacher only.
        initialisations: ``pretrained`` and ``scratch``; none for the study's.
    """

    name: str
    model: str
    layers: tuple[int, ...] | None = None
    teacher: str | None = None
    initialisations: tuple[str, ...] = ()


@dataclass(frozen=True)
class MethodSpec:
    """One arm: a method, with every combination of the values of its parameters.

    Attributes:
        name: Its name in trials and tables.
        method: A method of :class:`~kdkernels.LabelRegulariser`.
        parameters: Values to try, by parameter.
    """

    name: str
    method: str
    parameters: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyConfig:
    """Everything that determines a study.

    Attributes:
        name: Name of the study in its store.
        tasks: The tasks.
        students: The students.
        methods: The arms; ``ft`` is the one that the others are compared with.
        teachers: The teachers, where an arm needs one.
        initialisations: ``pretrained``, ``scratch`` or both.
        seeds: Of the head, of weights from scratch, and of the order.
        lr: Peak learning rates to try, by initialisation.
        epochs: Epochs over the training examples.
        batch_size: Examples per step.
        train_embeddings: Whether pretrained embeddings are trained; those from scratch always are.
        dropout: Whether the models keep their dropout.
        precision: ``bf16``, ``fp32`` or ``auto``.
        device: ``cpu``, ``cuda`` or ``auto``.
        margin: Half the width of what counts as no difference, in points of the metric.
        level: Level of the tests.
    """

    name: str
    tasks: tuple[TaskSpec, ...]
    students: tuple[StudentSpec, ...]
    methods: tuple[MethodSpec, ...]
    lr: Mapping[str, tuple[float, ...]]
    teachers: tuple[TeacherSpec, ...] = ()
    initialisations: tuple[str, ...] = (PRETRAINED,)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 3
    batch_size: int = 32
    train_embeddings: bool = False
    dropout: bool = False
    precision: str = "auto"
    device: str = "auto"
    margin: float = 0.5
    level: float = 0.05

    def teacher_of(self, student: StudentSpec) -> TeacherSpec | None:
        """The teacher of a student, if there is one."""
        if student.teacher is None:
            return self.teachers[0] if len(self.teachers) == 1 else None
        return next(teacher for teacher in self.teachers if teacher.name == student.teacher)

    def initialisations_of(self, student: StudentSpec) -> tuple[str, ...]:
        """How a student's weights begin."""
        return student.initialisations or self.initialisations


def read_config(path: Path, data: bool = True) -> StudyConfig:
    """Reads and checks a study's YAML file.

    Args:
        path: The file.
        data: Whether the files it names must be there.

    Raises:
        DistillError: No such file, no YAML, or a value that breaks its contract.
    """
    require(path.is_file(), "config", "be an existing YAML file", path)
    config = from_yaml(path.read_text(encoding="utf-8"))
    for task in config.tasks if data else ():
        exists = task.data is None or Path(task.data).exists()
        require(exists, f"tasks.{task.name}.data", "exist", task.data)
    return config


def from_yaml(text: str) -> StudyConfig:
    """A study from the text of its YAML file.

    Raises:
        DistillError: No YAML, an unknown key, or a value that breaks its contract.
    """
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DistillError(f"config must be YAML, got: {' '.join(str(error).split())}") from error
    require(isinstance(values, dict), "config", "hold keys and values", type(values).__name__)
    return make_config(values)


def make_config(values: Mapping[str, Any]) -> StudyConfig:
    """A study from plain values, as YAML gives them.

    Raises:
        DistillError: An unknown key, or a value that breaks its contract.
    """
    given = dict(values)
    parts: dict[str, Any] = {}
    for key, kind in (("tasks", TaskSpec), ("students", StudentSpec), ("teachers", TeacherSpec)):
        if key in given:
            parts[key] = _named(kind, given.pop(key), key)
    if "methods" in given:
        parts["methods"] = _methods(given.pop("methods"))
    if "lr" in given:
        parts["lr"] = _rates(given.pop("lr"))
    config = _read(StudyConfig, given, "", parts)
    _check(config)
    return config


def _named(kind: type[Any], values: Any, where: str) -> tuple[Any, ...]:
    """``{name: {key: value}}`` as specs."""
    require(
        isinstance(values, dict) and bool(values), where, "hold names with their values", values
    )
    found = []
    for name, entry in values.items():
        place = f"{where}.{name}"
        good = isinstance(name, str | int) and NAME.fullmatch(str(name)) is not None
        require(good, where, "have names of letters, digits, '.', '_' and '-'", repr(name))
        require(isinstance(entry, dict | None), place, "hold keys and values", repr(entry))
        found.append(_read(kind, entry or {}, place, {"name": str(name)}))
    return tuple(found)


def _methods(values: Any) -> tuple[MethodSpec, ...]:
    """The list of methods; every parameter may be a list of values to try."""
    good = isinstance(values, list) and bool(values)
    require(good, "methods", "be a list of methods", repr(values))
    found = []
    for number, value in enumerate(values):
        where = f"methods[{number}]"
        entry = {"method": value} if isinstance(value, str) else value
        good = isinstance(entry, dict) and "method" in entry
        require(good, where, "name a method", repr(value))
        entry = dict(entry)
        method, name = entry.pop("method"), entry.pop("name", None)
        require(method in METHODS, f"{where}.method", f"be one of {', '.join(METHODS)}", method)
        name = str(method if name is None else name)
        require(NAME.fullmatch(name) is not None, f"{where}.name", "be a plain name", repr(name))
        for key in entry:
            _known(key, (*METHODS[method], "method", "name"), where)
        parameters = {
            key: tuple(_number(v) for v in (value if isinstance(value, list) else [value]))
            for key, value in entry.items()
        }
        for key, choices in parameters.items():
            require(len(choices) > 0, f"{where}.{key}", "name at least one value", "none")
            for choice in choices:
                try:
                    LabelRegulariser(method, **{key: choice})
                except (ValueError, TypeError) as error:
                    raise DistillError(str(error).replace("LabelRegulariser: ", f"{where}.")) from (
                        error
                    )
        found.append(MethodSpec(name, method, parameters))
    return tuple(found)


def _rates(values: Any) -> dict[str, tuple[float, ...]]:
    """Learning rates by initialisation; one list is for all of them."""
    entries = values if isinstance(values, dict) else dict.fromkeys(INITIALISATIONS, values)
    found = {}
    for key, value in entries.items():
        _known(key, INITIALISATIONS, "lr")
        rates = [_number(rate) for rate in (value if isinstance(value, list) else [value])]
        good = bool(rates) and all(type(rate) is float and 0 < rate < 1 for rate in rates)
        require(good, "lr", "be numbers between 0 and 1", value)
        found[key] = tuple(float(rate) for rate in rates)
    return found


def _number(value: Any) -> Any:
    """YAML takes ``4e-4`` for a text: it wants ``4.0e-4``."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _known(key: Any, known: Sequence[str], where: str) -> None:
    """Raises for an unknown key, with the nearest one."""
    if key in known:
        return
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
    hint = f"{near[0]} is the nearest one" if near else "there are none"
    place = f"{where}.{key}" if where else str(key)
    raise DistillError(f"{place} must be a known key ({hint}), got {key!r}")


def _read(kind: type[Any], values: Mapping[str, Any], where: str, parts: Mapping[str, Any]) -> Any:
    """A dataclass from values; ``parts`` are fields that have been read already."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    read = dict(parts)
    for key, value in values.items():
        _known(key, [name for name in fields if name not in parts or name != "name"], where)
        place = f"{where}.{key}" if where else key
        read[key] = _value(hints[key], value, place)
    for key, entry in fields.items():
        needed = entry.default is dataclasses.MISSING and (
            entry.default_factory is dataclasses.MISSING
        )
        place = f"{where}.{key}" if where else key
        require(key in read or not needed, place, "be given", "nothing")
    return kind(**read)


def _value(hint: Any, value: Any, place: str) -> Any:
    """A value of a field, checked against its type."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if get_origin(option) is tuple:
            item = get_args(option)[0]
            values = value if isinstance(value, list | tuple) else [value]
            return tuple(_value(item, v, place) for v in values)
        if option is float and type(_number(value)) in (int, float):
            return float(_number(value))
        if type(value) is option:
            return value
        if option is str and type(value) is int:  # a folder or a set may be called 20
            return str(value)
    names = [getattr(option, "__name__", str(option)) for option in options]
    wanted = " or ".join(name for name in names if name != "NoneType")
    raise DistillError(f"{place} must be {wanted}, got {value!r}")


def _check(config: StudyConfig) -> None:
    """Raises ``DistillError`` for the first value that breaks its contract."""
    good = NAME.fullmatch(config.name) is not None
    require(good, "name", "be a plain name", repr(config.name))
    _check_numbers(config)
    for task in config.tasks:
        check_name(task.kind, f"tasks.{task.name}")
        own = task.data is not None
        contract = "be left out" if task.kind in BUILT_IN else "name its file or folder"
        fits = own == (task.kind not in BUILT_IN)
        require(fits, f"tasks.{task.name}.data", contract, task.data)
    _check_arms(config)
    for student in config.students:
        where = f"students.{student.name}"
        names = [teacher.name for teacher in config.teachers]
        known = student.teacher is None or student.teacher in names
        require(known, f"{where}.teacher", f"be one of {', '.join(names)}", student.teacher)
        needed = any(LabelRegulariser(m.method).teacher == "teacher" for m in config.methods)
        contract = "be given: a method needs one, and there is more than one or none to take"
        given = config.teacher_of(student) is not None
        require(given or not needed, f"{where}.teacher", contract, "none")
        for key in config.initialisations_of(student):
            contract = f"be some of {', '.join(INITIALISATIONS)}"
            require(key in INITIALISATIONS, "initialisations", contract, repr(key))
            require(key in config.lr, "lr", f"have learning rates for {key}", [*config.lr])


def _check_arms(config: StudyConfig) -> None:
    names = [method.name for method in config.methods]
    contract = "have different names (name: ...) where a method occurs twice"
    require(len(set(names)) == len(names), "methods", contract, names)
    plain = [method.name for method in config.methods if method.method == BASELINE]
    require(len(plain) == 1, "methods", "have ft, the baseline, once", f"{len(plain)} times")


def _check_numbers(config: StudyConfig) -> None:
    seeds = config.seeds
    good = len(seeds) > 0 and len(set(seeds)) == len(seeds) and min(seeds) >= 0
    require(good, "seeds", "be different integers of at least 0", list(seeds))
    counted: list[tuple[str, Any, tuple[str, ...]]] = [("", config, ("epochs", "batch_size"))]
    counted += [
        (f"tasks.{task.name}.", task, ("labels", "dev", "test", "epochs")) for task in config.tasks
    ]
    counted += [(f"teachers.{t.name}.", t, ("epochs", "batch_size")) for t in config.teachers]
    for where, holder, keys in counted:
        for key in keys:
            value = getattr(holder, key)
            require(value is None or value >= 1, f"{where}{key}", "be at least 1", value)
    for task in config.tasks:
        where = f"tasks.{task.name}.max_length"
        require(task.max_length >= 4, where, "be at least 4", task.max_length)
    for teacher in config.teachers:
        where = f"teachers.{teacher.name}.lr"
        require(0 < teacher.lr < 1, where, "lie between 0 and 1", teacher.lr)
    require(
        config.precision in PRECISIONS, "precision", f"be one of {PRECISIONS}", config.precision
    )
    require(config.device in DEVICES, "device", f"be one of {DEVICES}", config.device)
    good = 0 < config.margin < math.inf
    require(good, "margin", "be positive, in points of the metric", config.margin)
    require(0 < config.level < 1, "level", "lie between 0 and 1", config.level)
