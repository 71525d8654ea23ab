"""Recipes: fused against eager losses, training, whole runs, refusals."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from kdkernels.api.distill import recipe_measure, recipe_report, recipe_train, recipes_eager
from kdkernels.api.distill.config import make_config
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.log import read_log
from kdkernels.api.distill.recipe_measure import Setting, Step, check_equal
from kdkernels.api.distill.recipe_results import RecipeResults, gather, measure_name
from kdkernels.api.distill.recipes import ARMS, Options, Pkd
from kdkernels.api.distill.results import unit_name
from kdkernels.api.distill.text import collate
from kdkernels.api.distill.train import EvalSet, Recipe, Runtime

Command = Callable[..., Result]
NAMES = ("tinybert", "pkd", "minilm", "distilbert")
RUNTIME = Runtime(torch.device("cpu"), bf16=False)
# Of different lengths: there is padding.
IDS = [[2, *range(5, 5 + length), 3] for length in (3, 7, 5, 9)]


def classifier(width: int, heads: int, layers: int, seed: int = 0) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    return BertForSequenceClassification(config)


@pytest.fixture(params=["same widths", "other widths and heads"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A student and its teacher."""
    width, heads = (32, 4) if request.param == "same widths" else (24, 3)
    return classifier(width, heads, 2, seed=1), classifier(32, 4, 5).requires_grad_(False).eval()


def setting(arm: str) -> Setting:
    options = Options(temperature=2.0, train_embeddings=True)
    return Setting(arm, options, ["neg", "pos"], Path(), Path(), None, lr=3e-3)


def batch(rows: int = len(IDS)) -> dict[str, torch.Tensor]:
    return collate(IDS, range(rows), 0, torch.device("cpu"))


@pytest.mark.parametrize("arm", ARMS)
def test_fused_equals_eager_and_trains(arm: str, pair: tuple[Any, Any]) -> None:
    check_equal(setting(arm), *pair, batch(), RUNTIME)
    step = Step(setting(arm), *pair, RUNTIME, recipe_measure.VARIANTS["fused"])
    before = step.loss(batch()).item()
    for _ in range(60):
        step(batch())
    assert step.loss(batch()).item() < 0.5 * before


def test_a_loss_that_differs_is_not_timed(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = recipes_eager.match_relations
    monkeypatch.setattr(recipes_eager, "match_relations", lambda *given: 1.01 * right(*given))
    with pytest.raises(DistillError, match=r"^the fused loss of minilm must equal the eager one"):
        check_equal(setting("minilm"), *pair, batch(), RUNTIME)


@pytest.mark.parametrize("arm", NAMES)
def test_projections_are_trained_and_stay_out_of_the_student(arm: str) -> None:
    student, teacher = classifier(24, 3, 2), classifier(32, 4, 5)
    names = set(student.state_dict())
    recipe = setting(arm).recipe(student, teacher)
    before = [p.clone() for p in recipe.projections.parameters()]
    assert (len(before) > 0) == (arm != "minilm")  # relations fit whatever the widths
    texts = IDS * 8
    dev = EvalSet(IDS, torch.tensor([0, 1, 0, 1]))
    hyper, events = Recipe(2, 1e-2, 4, seed=0), []
    result = recipe_train.fit(
        recipe, student, teacher, texts, dev, hyper, RUNTIME, 0, events.append
    )
    after = list(recipe.projections.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert set(student.state_dict()) == names
    assert [event["step"] for event in events] == list(range(1, 17)) and result.steps == 16
    assert result.examples == 64
    first = 8 if recipe.stages == 2 else 0  # no curve before the head is trained
    assert result.curve[0][0] > first and result.curve[-1][0] == 16


def test_equal_widths_need_no_projection() -> None:
    models = classifier(32, 4, 2), classifier(32, 4, 5)
    assert not any(p for p in setting("tinybert").recipe(*models).projections.parameters())


def test_maps_of_layers_and_heads() -> None:
    student, teacher = classifier(24, 3, 2), classifier(32, 4, 6)
    assert setting("tinybert").recipe(student, teacher).hidden == [(0, 0), (1, 3), (2, 6)]
    assert setting("tinybert").recipe(student, teacher)._head_map == [0, 1, 2]
    assert setting("pkd").recipe(student, teacher).hidden == [(1, 3)]
    assert setting("distilbert").recipe(student, teacher).hidden == [(2, 6)]
    assert setting("minilm").recipe(student, teacher)._heads == 4


# ---- whole runs ----------------------------------------------------------------------------------


def fake_peaks(*given: Any) -> list[dict[str, float | None]]:
    return [{"fused": 1.0, "eager": 2.0} for _ in range(2 + len(given[2]))]


def measure_little(patch: pytest.MonkeyPatch) -> None:
    """Memory is measured by processes of their own, of which each takes seconds to begin."""
    patch.setattr(recipe_measure, "_peaks", fake_peaks)
    for name in ("BATCHES", "ROUNDS", "LEAST", "ENOUGH"):
        patch.setattr(recipe_measure, name, 1)
    patch.setattr(recipe_measure, "MOST", 2)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """See :func:`measure_little`."""
    measure_little(monkeypatch)


@pytest.fixture(scope="session")
def recipe_run(small_run: list[str]) -> list[str]:
    """Options of a run of two recipes; the name comes last."""
    options = [option for option in small_run if option != "--no-throughput"]
    place = options.index("--label-epochs")
    del options[place : place + 2]
    return ["--quick", "--recipe", "tinybert,pkd", "--labels", "105", *options]


@pytest.fixture(scope="session")
def finished_recipes(
    invoke: Callable[..., Result], recipe_run: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """A finished run and what it printed; copy it to change it."""
    out = tmp_path_factory.mktemp("recipes")
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch)
        done = invoke(*recipe_run, "--out", out)
    assert done.exit_code == 0, done.output
    yield out / "small", done.output


def accuracies(folder: Path) -> dict[str, list[float]]:
    arms = json.loads((folder / "results.json").read_text())["arms"]
    return {arm: values["test_accuracy"] for arm, values in arms.items()}


def test_run_leaves_everything_behind(finished_recipes: tuple[Path, str]) -> None:
    folder, output = finished_recipes
    names = {path.name for path in folder.iterdir()} - {".lock"}
    files = {"config.yaml", "log.jsonl", "curves.png", "report.md", "results.json"}
    assert names == files | {"state", "student", "teacher"}
    assert list(accuracies(folder)) == ["teacher", "soft", "tinybert", "pkd"]
    assert all(len(found) == 2 for arm, found in accuracies(folder).items() if arm != "teacher")
    arms = json.loads((folder / "results.json").read_text())["arms"]
    for arm in ("soft", "tinybert", "pkd"):
        assert arms[arm]["step"]["ms"]["fused"] > 0 and arms[arm]["step"]["mb"]["eager"] == 2.0
        assert [case["tokens"] for case in arms[arm]["losses"][1:]] == [16]
    report = (folder / "report.md").read_text()
    for part in ("| soft labels |", "| TinyBERT |", "arXiv 1908.09355", "recipe:", "curves.png"):
        assert part in report
    assert "points against soft labels alone" in output and "results.json" not in output


def test_log_has_the_parts_of_losses(finished_recipes: tuple[Path, str]) -> None:
    log = read_log(finished_recipes[0])
    for seed in (0, 1):
        assert log[f"soft-seed{seed}"].parts == {"soft_labels": log[f"soft-seed{seed}"].loss}
        pkd = log[f"pkd-seed{seed}"]
        soft, hidden = (dict(pkd.parts[name]) for name in ("soft_labels", "hidden"))
        for step, loss in pkd.loss:
            assert loss == pytest.approx(soft[step] + Pkd.BETA * hidden[step], rel=1e-4)
        assert "attention" in log[f"tinybert-seed{seed}"].parts and pkd.speed


def test_the_kept_student_is_a_plain_one_and_best_on_dev(
    finished_recipes: tuple[Path, str],
) -> None:
    from transformers import AutoModelForSequenceClassification

    folder, _ = finished_recipes
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        folder / "student", output_loading_info=True
    )
    assert model.config.num_hidden_layers == 2
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    assert set(load_file(folder / "student" / "model.safetensors")) <= set(model.state_dict())
    found = json.loads((folder / "results.json").read_text())
    every = [dev for arm, row in found["arms"].items() if arm != "teacher"
             for dev in row["dev_accuracy"]]  # fmt: skip
    arm, _, seed = found["student"].rpartition("-seed")
    assert found["arms"][arm]["dev_accuracy"][int(seed)] == max(every)


class Crash(BaseException):
    """Stands for a kill: no handler of the run may catch it."""


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("last", [5, 8])
def test_stopped_run_resumes_to_the_same_numbers(
    command: Command,
    recipe_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished_recipes: tuple[Path, str],
    last: int,
) -> None:
    count = 0
    for name in ("replace", "rename"):
        original = getattr(os, name)

        def stop(*arguments: Any, original: Callable[..., None] = original) -> None:
            nonlocal count
            count += 1
            if count > last:
                raise Crash
            original(*arguments)

        monkeypatch.setattr(os, name, stop)
    with pytest.raises(Crash):
        command(*recipe_run)
    monkeypatch.undo()
    measure_little(monkeypatch)
    monkeypatch.chdir(tmp_path)
    done = command("--resume", *recipe_run)
    assert done.exit_code == 0, done.output
    assert accuracies(tmp_path / "runs" / "small") == accuracies(finished_recipes[0])


def test_resume_finds_the_recipes_by_name(
    command: Command, finished_recipes: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(finished_recipes[0], tmp_path / "runs" / "recipes")
    again = command("--resume", "--recipe", "tinybert,pkd")
    assert again.exit_code == 0, again.output
    other = command("--resume", "--recipe", "pkd")
    assert other.exit_code == 1
    assert "distill: recipe must be tinybert,pkd, as the run began, to resume it" in other.output


def test_peaks_are_found_in_processes_of_their_own(finished_recipes: tuple[Path, str]) -> None:
    folder, _ = finished_recipes
    chosen = Setting(
        "minilm",
        Options(),
        ["neg", "pos"],
        folder / "teacher",
        folder / "teacher",
        (0, 3),
        lr=1e-3,
    )
    step, losses, large = recipe_measure._peaks(chosen, batch(), ((4, 256),), RUNTIME)
    for found in (step, losses, large):
        assert found["fused"] is not None and found["eager"] is not None
    assert large["fused"] < 0.7 * large["eager"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--recipe", "pkd,x"],
            "recipe must name some of tinybert, pkd, minilm, distilbert, got 'x'",
        ),
        (["--recipe", "pkd,pkd"], "recipe must differ, got pkd,pkd"),
        (
            ["--recipe", "pkd", "--objective", "lm"],
            "recipe must be left out with --objective lm, got ('pkd',)",
        ),
        (["--recipe", "pkd", "--alpha", "0.5"], "alpha must be left out with --recipe, got 0.5"),
    ],
)
def test_bad_options_are_refused(command: Command, arguments: list[str], message: str) -> None:
    failed = command(*arguments)
    assert failed.exit_code == 1
    assert f"distill: {message}" in failed.output


def test_a_student_of_one_layer_is_refused_by_pkd(
    command: Command, recipe_run: list[str], tmp_path: Path
) -> None:
    failed = command(*recipe_run, "--student-layers", "0")
    assert failed.exit_code == 1
    assert "distill: student must have at least 2 layers for pkd, which leaves" in failed.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("layers", "words", "message"),
    [
        (5, None, "student must have at most the teacher's 4 layers for tinybert, got 5"),
        (2, ["zebra"], "student must have the teacher's tokenizer, so that their tokens are at"),
    ],
)
def test_students_that_do_not_map_are_refused(
    command: Command,
    recipe_run: list[str],
    tiny_teacher: Path,
    tmp_path: Path,
    layers: int,
    words: list[str] | None,
    message: str,
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    if words is not None:
        tokenizer.add_tokens(words)
    classifier(32, 2, layers).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    failed = command(*recipe_run, "--student", tmp_path / "student")
    assert failed.exit_code == 1
    assert f"distill: {message}" in failed.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("little")
def test_a_student_of_its_own_width(
    command: Command, recipe_run: list[str], tiny_teacher: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    student = classifier(24, 3, 2)
    student.resize_token_embeddings(len(tokenizer))
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    names = ",".join(NAMES)
    options = ["--student", tmp_path / "student", "--recipe", names, "--seeds", "0"]
    done = command(*recipe_run, *options)
    assert done.exit_code == 0, done.output
    kept = tmp_path / "runs" / "small" / "student"
    _, loaded = AutoModelForSequenceClassification.from_pretrained(kept, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]


def test_a_model_that_is_built_otherwise_is_refused() -> None:
    model = classifier(24, 3, 2)
    model.config.num_hidden_layers = 3
    with pytest.raises(DistillError, match=r"^student must have a module bert.embeddings and one"):
        recipe_train.Watched(model, "student", [0], [], ())


# ---- tables --------------------------------------------------------------------------------------


@pytest.fixture
def found() -> RecipeResults:
    def student(accuracy: float) -> dict[str, Any]:
        curve = [[10, accuracy]]
        return {"test_accuracy": accuracy, "dev_accuracy": accuracy, "curve": curve,
                "parameters": 10, "seconds": 2.0}  # fmt: skip

    figures = {"ms": {"fused": 100.0, "eager": 150.0}, "mb": {"fused": 20.0, "eager": None}}
    case = {"rows": 16, "tokens": 512, "width": 768, **figures}
    units: dict[str, dict[str, Any]] = {"teacher": student(82.0), "student": {"best": "pkd-seed0"}}
    for arm, mean in (("soft", 78.0), ("pkd", 78.2), ("minilm", 76.0)):
        for seed, shift in ((0, -0.5), (1, 0.5)):
            units[unit_name(arm, seed)] = student(mean + shift)
        units[measure_name(arm)] = {"step": figures, "losses": [case], "seconds": 1.0}
    return gather(units, ("soft", "pkd", "minilm"), (0, 1))


def test_table_holds_accuracy_time_and_memory(found: RecipeResults, tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=(tmp_path / "screen").open("w"))
    recipe_report.show(console, tmp_path, found)
    lines = console.export_text().splitlines()
    assert "…" not in "".join(lines)
    (soft,) = [line for line in lines if line.strip().startswith("soft labels ")]
    assert soft.split()[2:] == ["78.00", "±", "0.71", "100", "150", "1.50", "20", "-"]
    assert any(line.split()[:4] == ["PKD", "16", "x", "512"] for line in lines)


def test_findings_do_not_claim_what_the_spread_covers(found: RecipeResults) -> None:
    pkd, minilm = recipe_report.findings(found)
    assert pkd == "PKD: +0.20 points against soft labels alone, within the spread over seeds."
    assert (
        minilm == "MiniLM: -2.00 points against soft labels alone, more than the spread over seeds."
    )


def test_defaults_of_a_recipe_run() -> None:
    config = make_config({"recipe": ("pkd",)})
    assert config.name == "recipes"
    assert (config.transfer, config.throughput) == (3000, False)  # type: ignore[attr-defined]
