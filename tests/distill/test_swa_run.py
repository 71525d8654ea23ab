"""Runs of ``kdkernels distill --method swa``, and runs that are killed."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.killed import kill_behind, resume, same_student

from kdkernels.api.distill import arm_results, swa_train
from kdkernels.api.distill.config import from_yaml
from kdkernels.api.distill.results import unit_name
from kdkernels.api.distill.swa_config import ARMS, SwaConfig
from kdkernels.api.distill.swa_pipeline import make_task
from kdkernels.api.distill.train import Runtime

Command = Callable[..., Result]
ACCURACY = "accuracy (%)"


@pytest.fixture(scope="session")
def swa_run(tiny_teacher: Path, reviews: Path) -> list[str]:
    """Options of a run that takes a few seconds; the name comes last."""
    options = ["--method", "swa", "--data", str(reviews), "--model", str(tiny_teacher)]
    options += ["--student-layers", "0,3", "--epochs", "6", "--transfer-epochs", "6"]
    options += ["--teacher-epochs", "8", "--lr", "3e-3", "--teacher-lr", "3e-3"]
    options += ["--batch-size", "16", "--seeds", "0,1", "--evaluations", "4"]
    options += ["--swa-start", "0.5,0.25", "--swa-every", "1,3"]
    return [*options, "--precision", "fp32", "--train-embeddings", "--name", "small"]


@pytest.fixture(scope="session")
def finished_swa(
    invoke: Callable[..., Result], swa_run: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run; copy it to change it."""
    out = tmp_path_factory.mktemp("finished-swa")
    done = invoke(*swa_run, "--out", out)
    assert done.exit_code == 0, done.output
    return out / "small"


def results(folder: Path) -> dict[str, Any]:
    """What the units found, without times."""
    found = {}
    for unit in ["teacher", *(unit_name(arm, seed) for arm in ARMS for seed in (0, 1))]:
        result = json.loads((folder / "state" / f"{unit}.json").read_text())
        found[unit] = {key: value for key, value in result.items() if "seconds" not in key}
    return found


def test_run_leaves_everything_behind(finished_swa: Path) -> None:
    names = {path.name for path in finished_swa.iterdir()} - {".lock"}
    files = {"config.yaml", "log.jsonl", "curves.png", "report.md", "results.json"}
    assert names == files | {"state", "student"}
    config = from_yaml((finished_swa / "config.yaml").read_text())
    assert isinstance(config, SwaConfig) and config.swa_start == (0.5, 0.25)
    found = results(finished_swa)
    assert found["teacher"]["kept"]["test"][ACCURACY] > 80
    for seed in (0, 1):
        averaged, plain = found[f"swa-seed{seed}"], found[f"ft-seed{seed}"]
        # 105 training texts, 7 batches, 6 epochs: 42 steps, of which the average begins at 21.
        assert averaged["steps"] == plain["steps"] == 42
        models = {"start 0.5, K 1": 22, "start 0.5, K 3": 8}
        models |= {"start 0.25, K 1": 33, "start 0.25, K 3": 11}
        assert averaged["models"] == models
        assert averaged["kept"] == averaged["averages"]["start 0.5, K 1"]
        assert plain["averages"] == {} and plain["kept"] == plain["live"]
        assert [point["step"] for point in averaged["curve"]] == [11, 22, 33, 42]
        assert ["average" in point for point in averaged["curve"]] == [False, True, True, True]


def test_the_kept_model_is_the_average_that_was_tested(finished_swa: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    stored = from_yaml((finished_swa / "config.yaml").read_text())
    assert isinstance(stored, SwaConfig)
    best = json.loads((finished_swa / "state" / "student.json").read_text())["best"]
    task = make_task(stored, Runtime(torch.device("cpu"), bf16=False), lambda line: None)
    model = AutoModelForSequenceClassification.from_pretrained(finished_swa / "student")
    assert task.evaluate(model, "test") == results(finished_swa)[best]["kept"]["test"]
    scores = {u: r["kept"]["dev"][ACCURACY] for u, r in results(finished_swa).items()}
    del scores["teacher"]
    assert scores[best] == max(scores.values())


def test_report_says_what_the_units_say(finished_swa: Path) -> None:
    report = (finished_swa / "report.md").read_text()
    found = results(finished_swa)
    for arm in ARMS:
        values = [found[unit_name(arm, seed)]["kept"]["test"][ACCURACY] for seed in (0, 1)]
        assert f"| {arm_results.TITLES[arm]} | {arm_results.mean_text(values)} |" in report
    assert "SWA against fine-tuning" in report and "distilled, SWA against distilled" in report
    assert "start 0.25, K 3" in report and "SWA: best on dev is start" in report
    kept = json.loads((finished_swa / "results.json").read_text())
    pairs = zip(kept["arms"]["swa"]["test"], kept["arms"]["ft"]["test"], strict=True)
    differences = {d["arm"]: d for d in kept["differences"]}
    assert differences["swa"]["mean"] == pytest.approx(statistics.mean(a - b for a, b in pairs))


def test_killed_run_resumes_to_the_same_weights(
    finished_swa: Path, swa_run: list[str], tmp_path: Path
) -> None:
    """A real SIGKILL, in the middle of a training that averages."""
    killed, options = tmp_path / "runs" / "killed", [*swa_run[:-1], "killed"]
    kill_behind(options, tmp_path, killed / "state" / "swa-seed0.json")
    resume(options, tmp_path)
    assert results(killed) == results(finished_swa)
    assert same_student(killed, finished_swa)


def test_the_average_does_not_change_the_training(
    finished_swa: Path, swa_run: list[str], command: Command
) -> None:
    """Neither do the others beside it: one training serves a whole comparison."""
    options = [*swa_run[:-1], "one", "--arms", "swa"]
    options[options.index("--swa-start") + 1] = "0.25"
    options[options.index("--swa-every") + 1] = "3"
    done = command(*options)
    assert done.exit_code == 0, done.output
    state = Path("runs") / "one" / "state"
    for seed in (0, 1):
        alone = json.loads((state / f"swa-seed{seed}.json").read_text())
        among = results(finished_swa)[f"swa-seed{seed}"]
        assert alone["kept"] == among["averages"]["start 0.25, K 3"]
        assert alone["live"] == among["live"]


def test_patience_keeps_the_best_average(
    tiny_teacher: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SwaConfig(
        data=str(reviews), model=str(tiny_teacher), student_layers=(0, 3), epochs=6, lr=3e-3,
        batch_size=16, evaluations=14, patience=2, swa_start=(0.25,), train_embeddings=True,
    )  # fmt: skip
    task = make_task(config, Runtime(torch.device("cpu"), bf16=False), lambda line: None)
    asked: list[dict[str, torch.Tensor]] = []
    scores = iter([0.0, 1.0, 0.0, 5.0, 0.0, 9.0, 0.0, 8.0, 0.0, 9.0])

    def evaluate(model: Any, split: str) -> dict[str, float]:
        asked.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {task.metric: next(scores)}

    monkeypatch.setattr(task, "evaluate", evaluate)
    trained = swa_train.fit(task, config, True, config.epochs, 0, lambda event: None)
    # Live, average, live, ...: the first three evaluations come before the average.
    averages = [point["average"] for point in trained.curve if "average" in point]
    assert trained.fitted.steps < 42 and trained.best is not None
    best = max(range(len(averages)), key=lambda i: averages[i])
    assert len(averages) == best + 3
    at = next(i for i, point in enumerate(trained.curve) if point.get("average") == averages[best])
    assert trained.best[0] == trained.curve[at]["step"]
    place = sum(2 if "average" in point else 1 for point in trained.curve[: at + 1]) - 1
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, asked[place][name])


def test_language_model(command: Command, tiny_lm: Path, tiny_text: Path) -> None:
    options = ["--method", "swa", "--task", "lm", "--model", tiny_lm, "--data", tiny_text]
    options += ["--student-layers", "0,1,2", "--max-length", "32", "--tokens", "4096"]
    options += ["--eval-tokens", "256", "--seeds", "0", "--lr", "1e-3", "--precision", "fp32"]
    done = command(*options, "--name", "lm", "--evaluations", "2")
    assert done.exit_code == 0, done.output
    assert "perplexity by arm" in done.output and "of too few seeds" in done.output
    kept = json.loads(Path("runs/lm/results.json").read_text())
    # Better is lower: the sign says which arm is better, not which figure is higher.
    gain = kept["arms"]["ft"]["test"][0] - kept["arms"]["swa"]["test"][0]
    assert kept["differences"][0]["mean"] == pytest.approx(gain)


def test_tagging(command: Command, tiny_teacher: Path, tmp_path: Path) -> None:
    source, path = random.Random(3), tmp_path / "tagged.txt"
    lines = []
    for _ in range(60):
        words = source.choices(["the", "film", "was"], k=4)
        lines += [f"{word} O" for word in words] + ["good B-P", "great I-P", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    options = ["--method", "swa", "--task", "ner", "--data", path, "--model", tiny_teacher]
    done = command(*options, "--seeds", "0", "--epochs", "2", "--name", "ner")
    assert done.exit_code == 0, done.output
    assert "span F1 (%)" in done.output and "token accuracy (%)" in Path(
        "runs/ner/report.md"
    ).read_text().replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "tags"], "task must be one of sentiment, r8, r52, 20news, ner, qa, lm"),
        (["--swa-start", "1"], "swa-start must lie in [0, 1), got [1.0]"),
        (["--swa-start", "x"], "swa-start must be numbers separated by commas, got 'x'"),
        (["--swa-every", "0,1"], "swa-every must be at least 1, got [0, 1]"),
        (["--swa-every", "1,1"], "swa-every must differ, got [1, 1]"),
        (["--arms", "ft,best"], "arms must name some of ft, swa, kd, kd-swa, got 'best'"),
        (["--task", "ner", "--arms", "kd"], "arms must need no teacher where there are no texts"),
        (["--task", "lm", "--labels", "3"], "labels must be left out with --task lm, got 3"),
        (["--tokens", "3"], "tokens must be left out with --task sentiment, got 3"),
        (["--task", "r8", "--data", "x.csv"], "data must exist, got x.csv"),
        (["--convention", "both"], "convention must be one of paper, torch, got 'both'"),
        (["--patience", "2", "--swa-every", "1,2"], "patience must be left out where several"),
        (["--swa-lr", "1e-4", "--swa-start", "0.5,0.6"], "swa-lr must be the same as lr where"),
        (["--objective", "lm"], "objective must be left out with --method, got swa"),
        (["--recipe", "pkd"], "recipe must be left out with --method swa, got ('pkd',)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    command: Command, options: list[str], message: str
) -> None:
    done = command("--method", "swa", *options)
    assert done.exit_code == 1
    assert f"distill: {message}" in done.output, done.output
    assert done.output.count("\n") == 1 and not Path("runs").exists()


def test_unknown_methods_are_named(command: Command) -> None:
    done = command("--method", "sgd")
    assert done.exit_code == 1
    assert "distill: method must be one of swa, diito, stark, meta-kd, got 'sgd'" in done.output
    done = command("--objective", "swa")
    assert "distill: objective must be asked for by --method, got swa" in done.output
