"""Studies from YAML: what is read, and what is refused in one sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdkernels.api.distill.errors import DistillError
from kdkernels.api.study import grid
from kdkernels.api.study.config import StudyConfig, from_yaml, make_config, read_config
from kdkernels.api.study.grid import trials_of
from kdkernels.api.study.worker import keyed

STUDIES = Path(__file__).parents[2] / "studies" / "label-regularisation"


@pytest.fixture
def config(values: dict[str, Any]) -> StudyConfig:
    return make_config(values)


def test_the_grid_is_the_product_of_its_lists(config: StudyConfig) -> None:
    trials = trials_of(config)
    # Seeds, initialisations, and ft, two of ls, kd, self_kd.
    assert len(trials) == 2 * 2 * 5 == len({trial.key for trial in trials})
    assert [trial.arm for trial in trials[:5]] == ["ft", "ls", "ls", "kd", "self_kd"]
    assert {trial.seed for trial in trials[:10]} == {0}
    assert {trial.teacher.name if trial.teacher else None for trial in trials} == {"whole", None}
    assert trials[1].loss.parameters == {"label_smoothing": 0.1, "convention": "torch"}
    assert trials[1].title == "reviews tiny pretrained ls label_smoothing=0.1 lr=0.005 seed=0"


def test_baselines_come_first_wherever_they_are_listed(values: dict[str, Any]) -> None:
    trials = trials_of(make_config(values | {"methods": ["self_kd", "ft"]}))
    assert [trial.arm for trial in trials[:2]] == ["ft", "self_kd"]
    assert trials[1].baseline().key == trials[0].key


def test_keys_are_stable(config: StudyConfig, values: dict[str, Any]) -> None:
    keys = set(keyed(config))
    assert keys == set(keyed(make_config(copy.deepcopy(values))))
    # What does not change a result does not change a key.
    names = [{"method": "ft", "name": "plain"}, *values["methods"][1:]]
    for same in ({"margin": 2.0, "name": "other"}, {"methods": names}):
        assert set(keyed(make_config(values | same))) == keys
    defaults = [*values["methods"][:2], {"method": "kd", "alpha": 0.5}, "self_kd"]
    spelt = {key.rpartition("#")[2] for key in keyed(make_config(values | {"methods": defaults}))}
    assert spelt == {key.rpartition("#")[2] for key in keys}


@pytest.mark.parametrize(
    "changed", [{"epochs": 3}, {"batch_size": 8}, {"precision": "bf16"}, {"dropout": True}]
)
def test_what_changes_results_changes_keys(
    config: StudyConfig, values: dict[str, Any], changed: dict[str, Any]
) -> None:
    assert not set(keyed(config)) & set(keyed(make_config(values | changed)))


def test_other_texts_change_keys(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("text,label\na,b\n")
    task = {"reviews": {"task": "own", "data": str(path), "max_length": 32}}
    before = set(keyed(make_config(values | {"tasks": task})))
    path.write_text("text,label\na,c\n")
    grid._content.cache_clear()
    assert not before & set(keyed(make_config(values | {"tasks": task})))


def test_a_study_may_grow(config: StudyConfig, values: dict[str, Any]) -> None:
    more = make_config(values | {"seeds": [0, 1, 2], "methods": [*values["methods"], "tf_reg"]})
    assert set(keyed(config)) < set(keyed(more))


def test_numbers_as_yaml_takes_them_for_texts(values: dict[str, Any]) -> None:
    config = make_config(values | {"lr": {"pretrained": "4e-4", "scratch": ["1e-3", 2.0e-3]}})
    assert config.lr == {"pretrained": (4e-4,), "scratch": (1e-3, 2e-3)}


def test_lists_of_one(values: dict[str, Any]) -> None:
    config = make_config(values | {"seeds": 3, "initialisations": "scratch"})
    assert config.seeds == (3,) and config.initialisations == ("scratch",)


TASK = {"task": "own", "data": "x.csv"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sedes": [0]}, "sedes must be a known key (seeds is the nearest one), got 'sedes'"),
        ({"tasks": {"a": TASK | {"lables": 3}}}, "tasks.a.lables must be a known key (labels is"),
        ({"students": {"a": {}}}, "students.a.model must be given, got nothing"),
        ({"tasks": {"sentimant": {}}}, "(sentiment is the nearest one), got 'sentimant'"),
        ({"tasks": {"r8": {"data": "x"}}}, "tasks.r8.data must be left out, got x"),
        ({"tasks": {"own": {}}}, "tasks.own.data must name its file or folder, got None"),
        ({"tasks": {"a b": TASK}}, "tasks must have names of letters, digits, '.', '_' and '-'"),
        ({"tasks": {"r8": {"labels": 0}}}, "tasks.r8.labels must be at least 1, got 0"),
        ({"tasks": {"r8": {"labels": "x"}}}, "tasks.r8.labels must be int, got 'x'"),
        ({"methods": ["kd"]}, "methods must have ft, the baseline, once, got 0 times"),
        ({"methods": ["ft", "best"]}, "methods[1].method must be one of ft, ls, tf_reg"),
        (
            {"methods": ["ft", {"method": "ls", "alpha": 1}]},
            "methods[1].alpha must be a known key (",
        ),
        (
            {"methods": ["ft", {"method": "kd", "alpha": [0.1, 2]}]},
            "methods[1].alpha must be in [0, 1], got 2",
        ),
        (
            {"methods": ["ft", "kd", {"method": "kd", "alpha": 0.1}]},
            "methods must have different names (name: ...) where a method occurs twice",
        ),
        ({"teachers": {}}, "teachers must hold names with their values, got {}"),
        ({"seeds": [1, 1]}, "seeds must be different integers of at least 0, got [1, 1]"),
        ({"seeds": ["a"]}, "seeds must be int, got 'a'"),
        ({"lr": {"scratch": 1e-3}}, "lr must have learning rates for pretrained, got ['scratch']"),
        ({"lr": 3}, "lr must be numbers between 0 and 1, got 3"),
        ({"initialisations": ["cold"]}, "initialisations must be some of pretrained, scratch"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"margin": 0}, "margin must be positive, in points of the metric, got 0.0"),
        ({"level": 1.5}, "level must lie between 0 and 1, got 1.5"),
        ({"dropout": "no"}, "dropout must be bool, got 'no'"),
    ],
)
def test_refusals(values: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError) as caught:
        make_config(values | changed)
    assert message in str(caught.value)


def test_teachers_that_are_not_clear(values: dict[str, Any]) -> None:
    two = {"a": {"model": "x"}, "b": {"model": "y"}}
    with pytest.raises(DistillError, match=r"students.tiny.teacher must be given: a method needs"):
        make_config(values | {"teachers": two})
    student = {**values["students"]["tiny"], "teacher": "c"}
    with pytest.raises(DistillError, match="students.tiny.teacher must be one of a, b, got c"):
        make_config(values | {"teachers": two, "students": {"tiny": student}})


def test_files_that_are_not_there(write_study: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="config must be an existing YAML file"):
        read_config(tmp_path / "no.yaml")
    path = write_study(tmp_path, tasks={"mine": {"task": "own", "data": "no.csv"}})
    with pytest.raises(DistillError, match=r"tasks.mine.data must exist, got no.csv"):
        read_config(path)
    assert read_config(path, data=False).tasks[0].data == "no.csv"
    for text, message in (("[", "config must be YAML"), ("- a", "config must hold keys and")):
        with pytest.raises(DistillError, match=message):
            from_yaml(text)


@pytest.mark.parametrize("path", sorted(STUDIES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_committed_studies_are_whole(path: Path) -> None:
    """Their files need not be there."""
    config = read_config(path, data=False)
    assert len(config.seeds) == 5 and set(config.initialisations) == {"pretrained", "scratch"}
    assert len(config.tasks) > 1 and len(config.methods) > 3
    assert {config.teacher_of(student) for student in config.students} != {None}
