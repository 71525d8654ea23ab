"""The configuration of a run: defaults, validation, and a YAML round trip."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

from kdkernels.api.distill.errors import DistillError, require

PRECISIONS = ("auto", "bf16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
RECIPES = ("tinybert", "pkd", "minilm", "distilbert")
# Where a run lives does not change what it computes, so a resume may name it differently.
LOCATION_KEYS = frozenset({"name", "out"})
# A number that YAML 1.1, which wants a dot in it, reads as text.
EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


@dataclass(frozen=True)
class RunConfig:
    """What the runs of every objective have; a subclass is the configuration of one objective.

    Attributes:
        name: Name of the run; its files go to ``<out>/<name>``.
        out: Folder of all runs.
        data: The user's own data; None for what the objective downloads.
        seeds: One student per arm and seed.
        temperature: Temperature of the distillation loss.
        alpha: Weight of the distillation loss; that of the labels is ``1 - alpha``.
        epochs: Epochs over the training data.
        lr: Peak learning rate of the students.
        batch_size: Texts per step.
        train_embeddings: Whether the embeddings are trained; frozen otherwise.
        precision: ``bf16`` autocast, ``fp32``, or ``auto`` by what the processor supports.
        device: ``cpu``, ``cuda``, or ``auto``.
        threads: CPU threads; None for torch's default.
        quick: A tiny run that only shows that everything works.
    """

    objective: ClassVar[str]
    # How a command asks for it.
    option: ClassVar[str]
    # Keys of the configuration it is derived from that mean nothing to it.
    unused: ClassVar[frozenset[str]] = frozenset()

    name: str = "demo"
    out: str = "runs"
    data: str | None = None
    seeds: tuple[int, ...] = (0,)
    temperature: float = 1.0
    alpha: float = 1.0
    epochs: int = 1
    lr: float = 1e-4
    batch_size: int = 32
    train_embeddings: bool = False
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None
    quick: bool = False

    @property
    def folder(self) -> Path:
        """Where the run's files are."""
        return Path(self.out) / self.name

    @classmethod
    def presets(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values that take the place of defaults because of what the user gave."""
        return {}

    def validate(self) -> None:
        """Raises ``DistillError`` for the first value that breaks its contract."""
        require(
            re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name) is not None,
            "name",
            "consist of letters, digits, '.', '_' and '-', and start with a letter or digit",
            repr(self.name),
        )
        self._require_at_least(1, "threads", "batch_size", "epochs")
        temperature = self.temperature
        good = 0 < temperature < math.inf
        require(good, "temperature", "be positive and finite", temperature)
        require(0 <= self.alpha <= 1, "alpha", "lie in [0, 1]", self.alpha)
        require(0 < self.lr < 1, "lr", "lie between 0 and 1", self.lr)
        seeds = list(self.seeds)
        require(len(seeds) > 0, "seeds", "name at least one seed", "none")
        require(len(set(seeds)) == len(seeds), "seeds", "differ", seeds)
        require(min(seeds) >= 0, "seeds", "be at least 0", seeds)
        require(
            self.precision in PRECISIONS, "precision", f"be one of {PRECISIONS}", self.precision
        )
        require(self.device in DEVICES, "device", f"be one of {DEVICES}", self.device)

    def _require_at_least(self, least: int, *keys: str) -> None:
        for key in keys:
            value = getattr(self, key)
            require(
                value is None or value >= least, option_name(key), f"be at least {least}", value
            )


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """Everything that determines a run of the classification objective.

    Attributes:
        data: CSV or JSONL file with ``text`` and ``label``; None for the demo's corpus.
        alpha: Weight of the distillation loss; labelled texts join with ``1 - alpha``.
        epochs: Epochs over the transfer texts.
        teacher: transformers folder of the teacher; None for the demo's pretrained encoder.
        student: transformers folder of the student; None cuts it from the teacher.
        student_layers: Layers of the teacher that make up a cut student.
        labels: Number of labelled training texts; None for all.
        transfer: Number of unlabelled texts the teacher labels; None for all.
        test: Number of test texts; None for all.
        label_epochs: Epochs of the labels-only student.
        teacher_epochs: Epochs of fine-tuning the teacher; 0 uses it as it is.
        teacher_lr: Peak learning rate of fine-tuning the teacher.
        max_length: Longest text in tokens; the rest is cut off.
        throughput: Whether to time the loss at language-model vocabulary sizes.
        recipe: Recipes to compare with plain soft labels; none: the demo's arms.
    """

    objective: ClassVar[str] = "classification"
    option: ClassVar[str] = "--objective classification"

    seeds: tuple[int, ...] = (0, 1, 2)
    temperature: float = 2.0
    epochs: int = 2
    # Demo, dev accuracy, mean over the three arms and three seeds, at 4e-4 and 8e-4: 76.6, 76.0 %;
    # with two epochs, at 1e-4, 2e-4, 4e-4 and 8e-4: 76.5, 77.1, 77.2, 76.4 %.
    lr: float = 4e-4
    teacher: str | None = None
    student: str | None = None
    student_layers: tuple[int, ...] = (0, 5)
    labels: int | None = None
    transfer: int | None = None
    test: int | None = None
    label_epochs: int = 3
    teacher_epochs: int = 3
    teacher_lr: float = 1e-4
    max_length: int = 128
    throughput: bool = True
    recipe: tuple[str, ...] = ()

    @classmethod
    def presets(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The demo's sizes without data of one's own; those of recipes or a quick run."""
        demo = DEMO_DEFAULTS if given.get("data") is None else {}
        if given.get("recipe"):
            for key in NOT_WITH_RECIPE:
                contract = "be left out with --recipe"
                require(key not in given, option_name(key), contract, given.get(key))
            demo = {key: RECIPE_DEMO_DEFAULTS[key] for key in demo} | RECIPE_DEFAULTS
        return demo | (QUICK_DEFAULTS if given.get("quick") else {})

    def validate(self) -> None:
        """Raises ``DistillError`` for the first value that breaks its contract."""
        super().validate()
        self._require_at_least(1, "labels", "transfer", "test", "label_epochs")
        self._require_at_least(0, "teacher_epochs")
        self._require_at_least(4, "max_length")
        require(0 < self.teacher_lr < 1, "teacher-lr", "lie between 0 and 1", self.teacher_lr)
        named = len(self.student_layers) > 0
        require(named, "student-layers", "name at least one layer", "none")
        for key in ("teacher", "student"):
            path = getattr(self, key)
            require(path is None or Path(path).is_dir(), key, "be an existing folder", path)
        found = self.data is None or Path(self.data).is_file()
        require(found, "data", "be an existing file", self.data)
        known = f"name some of {', '.join(RECIPES)}"
        for name in self.recipe:
            require(name in RECIPES, "recipe", known, repr(name))
        differ = len(set(self.recipe)) == len(self.recipe)
        require(differ, "recipe", "differ", ",".join(self.recipe))


# A second epoch takes three minutes more, and brings some 0.6 points.
DEMO_DEFAULTS: dict[str, Any] = {"labels": 2000, "transfer": 10000, "epochs": 1}
# Every step runs the teacher, and there are three students for each recipe.
RECIPE_DEMO_DEFAULTS: dict[str, Any] = {"labels": 2000, "transfer": 3000, "epochs": 2}
RECIPE_DEFAULTS: dict[str, Any] = {"name": "recipes", "throughput": False}
# Recipes learn without labels.
NOT_WITH_RECIPE = ("alpha", "label_epochs", "throughput")
QUICK_DEFAULTS: dict[str, Any] = {
    "labels": 64,
    "transfer": 128,
    "test": 200,
    "seeds": (0,),
    "epochs": 1,
    "label_epochs": 1,
    "teacher_epochs": 1,
    "throughput": False,
}


def option_name(key: str) -> str:
    """The command-line spelling of a configuration key."""
    return key.replace("_", "-")


def check_keys(kind: type[RunConfig], given: Mapping[str, Any]) -> None:
    """Raises ``DistillError`` for a key that is none of this kind's."""
    known = _keys(kind)
    for key, value in given.items():
        contract = f"be left out with {kind.option}"
        require(key in known, option_name(str(key)), contract, value)


def suggestion(key: object, known: Iterable[str]) -> str:
    """What the user may have meant, as the end of a sentence; nothing if no name is near."""
    near = difflib.get_close_matches(str(key).replace("-", "_"), sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def config_class(objective: object) -> type[RunConfig]:
    """The kind of configuration that an objective has."""
    kinds: dict[object, type[RunConfig]] = {kind.objective: kind for kind in config_classes()}
    named = tuple(
        kind.objective for kind in kinds.values() if kind.option.startswith("--objective")
    )
    require(objective in kinds, "objective", f"be one of {named}", repr(objective))
    return kinds[objective]


def config_classes() -> tuple[type[RunConfig], ...]:
    """Every kind of configuration."""
    from kdkernels.api.distill.diito_config import DiitoConfig  # they import this module
    from kdkernels.api.distill.finetune_config import FinetuneConfig
    from kdkernels.api.distill.lm_config import LmConfig
    from kdkernels.api.distill.metakd_config import MetaKdConfig
    from kdkernels.api.distill.stark_config import StarkConfig
    from kdkernels.api.distill.swa_config import SwaConfig

    return (
        DistillConfig,
        LmConfig,
        SwaConfig,
        FinetuneConfig,
        DiitoConfig,
        StarkConfig,
        MetaKdConfig,
    )


def make_config(given: Mapping[str, Any]) -> RunConfig:
    """Builds a configuration from what the user gave; everything else takes its default.

    Args:
        given: Values by key; ``objective`` chooses the kind of configuration.

    Raises:
        DistillError: A value breaks its contract, or is none of this objective's.
    """
    values = dict(given)
    kind = config_class(values.pop("objective", DistillConfig.objective))
    check_keys(kind, values)
    config = kind(**(kind.presets(values) | values))
    _check_types(config)
    config.validate()
    return config


def _keys(kind: type[RunConfig]) -> set[str]:
    """What a configuration of this kind may be given."""
    return {field.name for field in dataclasses.fields(kind)} - kind.unused


# Lists that a configuration may hold: what they are called, and the types of their items.
LISTS: dict[Any, tuple[str, tuple[type, ...]]] = {
    tuple[str, ...]: ("names", (str,)),
    tuple[int, ...]: ("integers", (int,)),
    tuple[float, ...]: ("numbers", (float, int)),
}


def _check_types(config: RunConfig) -> None:
    """Raises unless every value has the annotated type; an int may stand for a float."""
    hints = get_type_hints(type(config))
    for key in (field.name for field in dataclasses.fields(config)):
        value, hint = getattr(config, key), hints[key]
        listed = next((kind for kind in LISTS if kind in (hint, *get_args(hint))), None)
        if listed is not None and (value is not None or hint == listed):
            words, item_types = LISTS[listed]
            good = isinstance(value, tuple) and all(type(item) in item_types for item in value)
            require(good, option_name(key), f"be {words} separated by commas", repr(value))
        elif listed is None:
            options = {hint} if isinstance(hint, type) else set(hint.__args__)
            if float in options:
                options.add(int)
            names = " or ".join(sorted(kind.__name__ for kind in options))
            require(type(value) in options, option_name(key), f"be {names}", repr(value))


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, in the order of its fields."""
    import yaml

    values = {"objective": config.objective} | {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
        if key not in config.unused
    }
    return str(yaml.safe_dump(values, sort_keys=False))


def from_yaml(text: str) -> RunConfig:
    """Reads what ``to_yaml`` wrote.

    Raises:
        DistillError: The text is no such configuration.
    """
    values = _parsed(text, "config.yaml")
    # Runs from before there were several objectives do not name theirs.
    kind = config_class(values.pop("objective", DistillConfig.objective))
    known = _keys(kind)
    unknown = sorted(map(str, set(values) - known))
    meant = suggestion(unknown[0], known) if unknown else ""
    require(not unknown, "config.yaml", "hold known keys only", f"{unknown}{meant}")
    config = kind(**values)
    _check_types(config)
    return config


def read_values(path: Path) -> dict[str, Any]:
    """The values in a configuration file of the user's, by key; a run's own file is one.

    Raises:
        DistillError: There is none, or it is no YAML of keys and values, or a key is no option of
            any method.
    """
    require(path.is_file(), "config", "be an existing file", path)
    values = _parsed(path.read_text(encoding="utf-8"), str(path))
    known = {"method", "objective"}.union(*map(_keys, config_classes()))
    for key in values:
        meant = suggestion(key, known)
        require(key in known, str(path), "hold options of kdkernels distill", f"{key!r}{meant}")
    if "method" in values:
        method = values.pop("method")
        methods = [k.objective for k in config_classes() if k.option.startswith("--method")]
        require(method in methods, "method", f"be one of {', '.join(methods)}", repr(method))
        require("objective" not in values, "objective", "be left out with method", method)
        values["objective"] = method
    return values


def _parsed(text: str, name: str) -> dict[str, Any]:
    """Keys and values of a YAML text, lists as tuples."""
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DistillError(f"{name} must be YAML, got: {' '.join(str(error).split())}") from error
    require(isinstance(values, dict), name, "hold keys and values", type(values).__name__)
    return {key: _value(value) for key, value in values.items()}


def _value(value: Any) -> Any:
    """A value of a YAML text: lists as tuples, and 1e-4, which YAML 1.1 takes for a word."""
    if isinstance(value, list):
        return tuple(map(_value, value))
    if isinstance(value, str) and EXPONENT.fullmatch(value):
        return float(value)
    return value


def check_same(stored: RunConfig, given: Mapping[str, Any]) -> None:
    """Raises unless every value the user gave equals that of the run to resume.

    Values that were not given are those of the stored run.
    """
    check_keys(type(stored), {k: v for k, v in given.items() if k != "objective"})
    for key, value in given.items():
        old = getattr(stored, key, None)
        if key not in LOCATION_KEYS and old != value:
            raise DistillError(
                f"{option_name(key)} must be {_shown(old)}, as the run began, to resume it, "
                f"got {_shown(value)}; another --name starts a run afresh"
            )


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
