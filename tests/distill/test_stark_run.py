"""Runs of ``kdkernels distill --method stark``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.killed import kill_behind, resume, same_student
from rich.console import Console
from safetensors.torch import load_file

from kdkernels import SparseTeacher, TeacherScores
from kdkernels.api.distill.config import from_yaml, make_config
from kdkernels.api.distill.progress import Display
from kdkernels.api.distill.stark_config import Cut, StarkConfig
from kdkernels.api.distill.stark_pipeline import StarkPipeline, make_task
from kdkernels.api.distill.store import RunFolder
from kdkernels.api.distill.tasks.classification import ClassificationTask
from kdkernels.api.distill.train import Runtime, predict

Command = Callable[..., Result]
ACCURACY = "accuracy (%)"
CPU = Runtime(torch.device("cpu"), bf16=False)
ARMS = ("kd", "stark-30-lam0.5", "stark-70-lam0.5", "random-30", "random-70")


@pytest.fixture(scope="session")
def stark_run(tiny_teacher: Path, reviews: Path) -> list[str]:
    """Options of a run that takes a few seconds; the name comes last."""
    options = ["--method", "stark", "--data", str(reviews), "--model", str(tiny_teacher)]
    options += ["--levels", "0.3,0.7", "--teacher-epochs", "8", "--epochs", "4", "--lr", "3e-3"]
    options += ["--teacher-lr", "3e-3", "--batch-size", "16", "--seeds", "0,1"]
    return [*options, "--precision", "fp32", "--train-embeddings", "--name", "small"]


@pytest.fixture(scope="session")
def finished_stark(
    invoke: Command, stark_run: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run; copy it to change it."""
    out = tmp_path_factory.mktemp("finished-stark")
    done = invoke(*stark_run, "--out", out)
    assert done.exit_code == 0, done.output
    return out / "small"


def pipeline(folder: Path) -> StarkPipeline:
    """The pipeline of a finished run."""
    config = from_yaml((folder / "config.yaml").read_text())
    assert isinstance(config, StarkConfig)
    task = make_task(config, CPU, lambda line: None)
    return StarkPipeline(config, RunFolder(folder), CPU, Display(Console(quiet=True)), task)


def results(folder: Path) -> dict[str, Any]:
    """What the units found, without times."""
    found = {}
    for file in (folder / "state").glob("*.json"):
        result = json.loads(file.read_text())
        if file.stem != "speed":
            found[file.stem] = {k: v for k, v in result.items() if "seconds" not in k}
    return found


def test_run(finished_stark: Path) -> None:
    names = {path.name for path in finished_stark.iterdir()} - {".lock"}
    files = {"config.yaml", "log.jsonl", "levels.png", "report.md", "results.json"}
    assert names == files | {"state", "student", "teacher"}
    found = results(finished_stark)
    assert found["teacher"]["kept"]["test"][ACCURACY] > 80
    teachers = [found[f"teacher-{arm}"] for arm in ARMS[:3]]
    sizes = [teacher["parameters"] for teacher in teachers]
    assert sizes[0] > sizes[1] > sizes[2]
    # 4 layers of 2 heads and 64 neurons: 30 and 70 % of 8 heads go.
    assert [sum(heads for heads, _ in t["widths"]) for t in teachers[1:]] == [6, 2]
    kept = json.loads((finished_stark / "results.json").read_text())
    assert tuple(kept["arms"]) == ("teacher", *ARMS)
    assert set(kept["speed"]["faster"]) == set(ARMS[:3]) and kept["speed"]["faster"]["kd"] == 1
    report = (finished_stark / "report.md").read_text()
    assert "layers 0, 1 of the teacher, each from the same weights" in report
    assert "(20% of all) gave the scores and trained nothing" in report


def test_the_level_is_the_best_on_dev_and_is_compared_at_the_same_level(
    finished_stark: Path,
) -> None:
    kept = json.loads((finished_stark / "results.json").read_text())
    dev = {name: sum(arm["dev"]) for name, arm in kept["arms"].items()}
    chosen = max(ARMS[1:3], key=dev.__getitem__)
    random = max(ARMS[3:], key=dev.__getitem__)
    pairs = [(d["arm"], d["against"]) for d in kept["differences"]]
    level = chosen.split("-")[1]
    assert pairs == [(chosen, "kd"), (chosen, f"random-{level}"), (random, "kd")]


def test_students_of_a_level_learn_from_its_teacher(finished_stark: Path) -> None:
    """The file of logits that they read is what the dense teacher gives when it is cut by hand."""
    run = pipeline(finished_stark)
    scores = TeacherScores.load(finished_stark / "state" / "scores.pt")
    sparse = SparseTeacher(run._teacher, scores)
    sparse.sparsify(0.7)
    expected = run.taught.transfer_logits(sparse.model)
    file = finished_stark / "state" / "teacher-stark-70-lam0.5.safetensors"
    assert torch.equal(load_file(file)["transfer"], expected)
    dense = load_file(finished_stark / "state" / "teacher-kd.safetensors")["transfer"]
    sparse.sparsify(0.0)
    assert torch.equal(dense, run.taught.transfer_logits(sparse.model))
    assert not torch.equal(dense, expected)


def test_every_student_begins_with_the_dense_teachers_layers(finished_stark: Path) -> None:
    run = pipeline(finished_stark)
    one, other = run._new_student().state_dict(), run._new_student().state_dict()
    teacher = run._teacher.state_dict()
    assert len({key.split(".")[3] for key in one if "encoder.layer" in key}) == 2
    assert all(torch.equal(one[k], other[k]) and torch.equal(one[k], teacher[k]) for k in one)


def test_what_gives_the_scores_trains_nothing_and_chooses_nothing(finished_stark: Path) -> None:
    run = pipeline(finished_stark)
    assert isinstance(run.taught, ClassificationTask) and isinstance(run.scored, ClassificationTask)
    texts, scored = run.taught._train.ids, run.scored._train.ids
    assert (len(texts), len(scored)) == (84, 21)  # of 105 with a label
    everything = [*texts, *scored]
    assert everything == make_task(run.config, CPU, lambda line: None)._train.ids  # type: ignore[attr-defined]
    scored_by = sum(len(batch["labels"]) for batch in run._score_batches())
    assert scored_by == 21


def test_faithful_scores_come_from_dev(tiny_teacher: Path, reviews: Path, tmp_path: Path) -> None:
    given = {"data": str(reviews), "model": str(tiny_teacher), "faithful": True}
    config = make_config({"objective": "stark", **given})
    assert isinstance(config, StarkConfig)
    task = make_task(config, CPU, lambda line: None)
    run = StarkPipeline(config, RunFolder(tmp_path), CPU, Display(Console(quiet=True)), task)
    assert isinstance(task, ClassificationTask) and isinstance(run.scored, ClassificationTask)
    assert run.scored._train.ids == task._ids["dev"] and run.taught is task


def test_a_teacher_reads_the_texts_once_for_all_students(
    command: Command, stark_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    read = ClassificationTask.transfer_logits

    def counted(task: ClassificationTask, model: Any) -> Any:
        passes.append(len(task.transfer_ids))
        return read(task, model)

    monkeypatch.setattr(ClassificationTask, "transfer_logits", counted)
    options = [*stark_run[:-1], "few", "--arms", "stark", "--epochs", "1", "--teacher-epochs", "1"]
    done = command(*options)
    assert done.exit_code == 0, done.output
    assert passes == [90] * 3  # levels 0, 30 and 70 %, whatever the number of seeds


def test_killed_run_resumes_to_the_same_weights(
    finished_stark: Path, stark_run: list[str], tmp_path: Path
) -> None:
    """A real SIGKILL, in the middle of the students."""
    killed, options = tmp_path / "runs" / "killed", [*stark_run[:-1], "killed"]
    kill_behind(options, tmp_path, killed / "state" / "stark-30-lam0.5-seed0.json")
    resume(options, tmp_path)
    assert results(killed) == results(finished_stark)
    assert same_student(killed, finished_stark)


def test_pruned_students_and_several_lams(command: Command, stark_run: list[str]) -> None:
    options = [*stark_run[:-1], "pruned", "--student-kind", "pruned", "--student-level", "0.5"]
    options += ["--lams", "1,0", "--levels", "0.5", "--arms", "stark", "--seeds", "0"]
    done = command(*options, "--epochs", "1", "--teacher-epochs", "2")
    assert done.exit_code == 0, done.output
    folder = Path("runs/pruned")
    kept = json.loads((folder / "results.json").read_text())
    assert list(kept["arms"]) == ["teacher", "kd", "stark-50-lam1", "stark-50-lam0"]
    assert "## Share of expressiveness" in (folder / "report.md").read_text()
    student = SparseTeacher.from_pretrained(folder / "student")
    assert sum(heads for heads, _ in student.widths) == 4
    best = kept["student"].removesuffix("-seed0")
    run = pipeline(folder)
    part = run.taught._eval["test"]  # type: ignore[attr-defined]
    logits = predict(student.model, part.ids, CPU, run.taught.tokenizer.pad_token_id)
    right = 100.0 * (logits.argmax(-1) == part.labels).float().mean().item()
    assert right == pytest.approx(kept["arms"][best]["test"][0])


@pytest.mark.parametrize("task", ["rte", "sts-b"])
def test_tasks_of_glue(task: str, command: Command, tiny_teacher: Path, glue_folder: Path) -> None:
    """Pairs with classes, and with scores, whose one output has squared errors as both losses."""
    options = ["--method", "stark", "--task", task, "--data", glue_folder, "--model", tiny_teacher]
    options += ["--levels", "0.5", "--seeds", "0", "--epochs", "1", "--teacher-epochs", "2"]
    done = command(*options, "--precision", "fp32", "--lr", "1e-3", "--max-length", "32")
    assert done.exit_code == 0, done.output
    kept = json.loads(Path("runs/stark/results.json").read_text())
    assert list(kept["arms"]) == ["teacher", "kd", "stark-50-lam0.5", "random-50"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", "1.5"], "levels must lie in [0, 0.95], got 1.5"),
        (["--levels", "0"], "levels must name at least one above 0, got 0.0"),
        (["--levels", "0.3,x"], "levels must be numbers separated by commas, got '0.3,x'"),
        (["--lams", "2"], "lams must lie in [0, 1], got 2.0"),
        (["--lams", "1,1"], "lams must differ, got 1.0,1.0"),
        (["--per", "row"], "per must be one of batch, example, got 'row'"),
        (["--held-out", "1"], "held-out must lie between 0 and 1, got 1.0"),
        (["--held-out", "0.001"], "held-out must leave out some of 105 training texts, and not"),
        (["--arms", "kd"], "arms must name some of stark, random, got 'kd'"),
        (["--student-kind", "small"], "student-kind must be one of dropped, pruned, got 'small'"),
        (["--student-layers", "7"], "student-layers must lie in 0..3 for this model, got [7]"),
        (["--swa-every", "2"], "swa-every must be left out with --method stark, got (2,)"),
        (["--task", "ner"], "task must be one of sentiment, r8, r52, 20news, cola"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    command: Command, tiny_teacher: Path, reviews: Path, options: list[str], message: str
) -> None:
    given = ["--method", "stark", "--data", reviews, "--model", tiny_teacher]
    done = command(*given, *options)
    assert done.exit_code == 1
    assert f"distill: {message}" in done.output, done.output
    assert done.output.count("\n") == 1 and not Path("runs").exists()


def test_arms() -> None:
    config = make_config({"objective": "stark", "levels": (0.0, 0.25), "lams": (0.5, 1.0)})
    assert isinstance(config, StarkConfig)
    names = [cut.name for cut in config.cuts]
    assert names == ["kd", "stark-25-lam0.5", "stark-25-lam1", "random-25"]
    assert config.cuts[1] == Cut("stark", 0.25, 0.5)
