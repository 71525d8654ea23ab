"""Defaults, contracts and the YAML round trip of a run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdkernels.api.distill.config import (
    check_same,
    from_yaml,
    make_config,
    read_values,
    to_yaml,
)
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.lm_config import LmConfig


def test_defaults_depend_on_the_task(tmp_path: Any) -> None:
    demo, quick = make_config({}), make_config({"quick": True})
    assert (demo.labels, demo.transfer, demo.seeds) == (2000, 10000, (0, 1, 2))
    assert quick.labels is not None and quick.labels < 100 and not quick.throughput
    own = tmp_path / "own.csv"
    own.write_text("text,label\n")
    assert make_config({"data": str(own)}).labels is None


def test_what_is_given_wins_over_quick() -> None:
    assert make_config({"quick": True, "labels": 7, "throughput": True}).labels == 7


def test_the_objective_chooses_the_kind() -> None:
    small, full = (make_config({"objective": "lm", "full": full}) for full in (False, True))
    assert isinstance(small, LmConfig) and isinstance(full, LmConfig)
    assert small.tokens == 40960 and full.tokens is None
    assert small.text == full.text == "wikitext-2" and small.name == "lm"
    assert from_yaml(to_yaml(full)) == full
    with pytest.raises(DistillError, match="^labels must be left out with --objective lm, got 5$"):
        make_config({"objective": "lm", "labels": 5})
    with pytest.raises(DistillError, match=r"^objective must be one of .*, got 'x'$"):
        from_yaml("objective: x")


def test_runs_that_do_not_name_their_objective_are_of_classification() -> None:
    text = to_yaml(make_config({"seeds": (3,)}))
    assert text.startswith("objective: classification\n")
    assert from_yaml(text.split("\n", 1)[1]) == from_yaml(text)


def test_yaml_round_trip() -> None:
    config = make_config({"seeds": (3, 1), "alpha": 0.25, "threads": 2, "name": "a.b-c"})
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"labels": 0}, "labels must be at least 1, got 0"),
        ({"batch_size": -1}, "batch-size must be at least 1, got -1"),
        ({"seeds": (1, 1)}, r"seeds must differ, got \[1, 1\]"),
        ({"seeds": ()}, "seeds must name at least one seed, got none"),
        ({"seeds": (-1,)}, r"seeds must be at least 0, got \[-1\]"),
        ({"lr": 3.0}, "lr must lie between 0 and 1, got 3.0"),
        ({"name": "../x"}, "name must consist of letters.*, got '../x'"),
        ({"data": "no.csv"}, "data must be an existing file, got no.csv"),
        ({"teacher": "nowhere"}, "teacher must be an existing folder, got nowhere"),
        ({"precision": "int8"}, "precision must be one of .*, got int8"),
        ({"epochs": 1.5}, "epochs must be int, got 1.5"),
        ({"objective": "lm", "top_k": 0}, "top-k must be at least 1, got 0"),
        ({"objective": "lm", "seq_len": 1}, "seq-len must be at least 2, got 1"),
        ({"objective": "lm", "full": True, "quick": True}, "full must be left out .*, got both"),
    ],
)
def test_contracts(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=f"^{message}$"):
        make_config(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must hold keys and values, got list"),
        ("nme: x", r"must hold known keys only, got \['nme'\]; did you mean name\?$"),
        ("a: [", "must be YAML, got"),
    ],
)
def test_damaged_yaml_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(DistillError, match=message) as caught:
        from_yaml(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labls: 5", r"own\.yaml must hold options of .*, got 'labls'; did you mean labels\?$"),
        ("batch-size: 5", r"got 'batch-size'; did you mean batch_size\?$"),
        ("zebra: 5", r"got 'zebra'$"),
        ("7: 5", r"got 7$"),
        ("method: sgd", r"^method must be one of swa, .*, got 'sgd'$"),
        ("method: swa\nobjective: lm", r"^objective must be left out with method, got swa$"),
    ],
)
def test_a_file_of_options_holds_options(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DistillError, match=message):
        read_values(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels: many", "labels must be NoneType or int, got 'many'"),
        ("quick: 1", "quick must be bool, got 1"),
        ("seeds: 3", "seeds must be integers separated by commas, got 3"),
        ("recipe: pkd", "recipe must be names separated by commas, got 'pkd'"),
        ("lr: {a: 1}", "lr must be float or int, got {'a': 1}"),
        ("tokens: 9", "tokens must be left out with --objective classification, got 9"),
    ],
)
def test_a_file_of_options_has_their_types(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DistillError) as caught:
        make_config(read_values(path))
    assert str(caught.value) == message


def test_a_file_of_options_is_read_as_flags_are(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("method: swa\nlr: 5e-4\nseeds: [4, 5]\nswa_start: [0.5, 1e-1]\n")
    config = make_config(read_values(path))
    assert config.objective == "swa" and config.lr == 5e-4 and config.seeds == (4, 5)
    assert config == make_config(
        {"objective": "swa", "lr": 5e-4, "seeds": (4, 5), "swa_start": (0.5, 0.1)}
    )


def test_resume_names_a_key_that_is_none() -> None:
    with pytest.raises(DistillError, match="^tokens must be left out with --objective class"):
        check_same(make_config({}), {"tokens": 3})


def test_resume_compares_only_what_is_given() -> None:
    stored = make_config({"labels": 500, "seeds": (0, 1)})
    check_same(stored, {"name": "elsewhere", "out": "other", "labels": 500})
    with pytest.raises(DistillError, match=r"^seeds must be 0,1, .*got 0,2;"):
        check_same(stored, {"seeds": (0, 2)})
    with pytest.raises(DistillError, match=r"^teacher-epochs must be 3, .*got 4;"):
        check_same(stored, {"teacher_epochs": 4})
