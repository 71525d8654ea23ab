"""Runs of ``kdkernels distill --method meta-kd``: teachers of domains, students of each."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers import reviewed
from helpers.killed import kill_behind, resume

from kdkernels.api.distill.config import from_yaml
from kdkernels.api.distill.metakd_config import ABLATIONS, LOSSES, MetaKdConfig
from kdkernels.api.distill.metakd_pipeline import load_corpora
from kdkernels.api.distill.metakd_results import Arm, MetaKdResults
from kdkernels.api.distill.metakd_train import Examples, Setting, make_loss
from kdkernels.api.distill.train import Runtime

Command = Callable[..., Result]
CPU = Runtime(torch.device("cpu"), bf16=False)
DOMAINS = ("books", "phones", "trips & co")
ARMS = ("own-tinybert", "meta-metakd")


@pytest.fixture(scope="session")
def domain_reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows of each of three domains, in a column of its own name, with their splits."""
    source = random.Random(0)
    path = tmp_path_factory.mktemp("domains") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "area"])
        for row in range(180):
            label = row // 3 % 2
            words = [
                reviewed.make_text(label, source),
                *["film", "phone", "day"][row % 3 :][:1] * 3,
            ]
            writer.writerow([" ".join(words), ("neg", "pos")[label], DOMAINS[row % 3]])
    return path


@pytest.fixture(scope="session")
def metakd_run(tiny_teacher: Path, domain_reviews: Path) -> list[str]:
    """Options of a run that takes a few seconds; the name comes last."""
    options = ["--method", "meta-kd", "--data", str(domain_reviews), "--domain-column", "area"]
    options += ["--model", str(tiny_teacher), "--student-layers", "0,3", "--arms", ",".join(ARMS)]
    options += ["--epochs", "2", "--teacher-epochs", "6", "--lr", "3e-3", "--teacher-lr", "3e-3"]
    options += ["--batch-size", "16", "--seeds", "0,1", "--share", "1,0.2", "--precision", "fp32"]
    return [*options, "--train-embeddings", "--threads", "1", "--name", "small"]


@pytest.fixture(scope="session")
def finished_metakd(
    invoke: Command, metakd_run: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run; copy it to change it."""
    out = tmp_path_factory.mktemp("finished-metakd")
    done = invoke(*metakd_run, "--out", out)
    assert done.exit_code == 0, done.output
    return out / "small"


def states(folder: Path) -> dict[str, Any]:
    """What the units found, without times."""
    found = {}
    for path in sorted((folder / "state").glob("*.json")):
        result = json.loads(path.read_text())
        found[path.stem] = {key: value for key, value in result.items() if "seconds" not in key}
    return found


def weights(folder: Path) -> dict[str, bytes]:
    return {
        path.parent.name: path.read_bytes() for path in sorted(folder.glob("*/model.safetensors"))
    }


def test_run_of_three_domains(finished_metakd: Path) -> None:
    names = {path.name for path in finished_metakd.iterdir()} - {".lock"}
    slugs = ["books", "phones", "trips___co"]
    files = {"config.yaml", "log.jsonl", "students.png", "report.md", "results.json", "state"}
    assert names == files | {"teacher-meta"} | {
        f"{who}-{name}" for who in ("student", "teacher-own") for name in slugs
    }
    found = states(finished_metakd)
    students = [name for name in found if "-seed" in name]
    assert len(students) == 2 * 3 * 2 * 2
    assert {found[name]["examples"] for name in students if "share1-" in name} <= set(range(33, 49))
    assert {found[name]["steps"] for name in students if "share1-" in name} == {2 * 2 * 3}
    # A fifth of the texts is one batch, and is seen five times as often.
    assert {found[name]["steps"] for name in students if "share0.2-" in name} == {2 * 2 * 5}
    assert min(found["teacher-meta"]["test"].values()) > 70
    kept = json.loads((finished_metakd / "results.json").read_text())
    by_name = {(arm["arm"], arm["share"]): arm for arm in kept["arms"]}
    assert set(by_name) == {(arm, share) for arm in ARMS for share in (1.0, 0.2)}
    one, other = by_name["meta-metakd", 1.0], by_name["own-tinybert", 1.0]
    gain = sum(one["average"]) / 2 - sum(other["average"]) / 2
    difference = next(
        d for d in kept["differences"] if (d["against"], d["share"]) == ("own-tinybert", 1.0)
    )
    assert difference["mean"] == pytest.approx(gain) and difference["pairs"] == 6
    for arm, domain in (("meta-metakd", "books"), ("own-tinybert", "phones")):
        unit = found[f"{arm}-{domain}-share1-seed1"]
        assert by_name[arm, 1.0]["test"][domain][1] == unit["test"]
    report = (finished_metakd / "report.md").read_text()
    assert "meta-teacher, Meta-KD against own domain's teacher, TinyBERT-KD" in report
    from transformers import AutoModelForSequenceClassification

    student = AutoModelForSequenceClassification.from_pretrained(finished_metakd / "student-books")
    assert student.config.num_hidden_layers == 2


def test_slip_7_a_student_is_measured_on_its_own_domain(finished_metakd: Path) -> None:
    """The released script's dev data are those of all domains."""
    config = from_yaml((finished_metakd / "config.yaml").read_text())
    assert isinstance(config, MetaKdConfig)
    corpora = load_corpora(config, lambda line: None)
    assert list(corpora) == list(DOMAINS)
    word = dict(zip(DOMAINS, ("film", "phone", "day"), strict=True))
    for name, corpus in corpora.items():
        for part in (corpus.train, corpus.dev, corpus.test):
            assert len(part) and all(text.endswith(f"{word[name]} " * 2 + word[name])
                                     for text in part.texts)  # fmt: skip
            assert set(part.labels) == {0, 1}


def test_killed_run_resumes_to_the_same_weights(
    finished_metakd: Path, metakd_run: list[str], tmp_path: Path
) -> None:
    """A real SIGKILL, before the meta-teacher is trained."""
    killed, options = tmp_path / "runs" / "killed", [*metakd_run[:-1], "killed"]
    kill_behind(options, tmp_path, killed / "state" / "own-tinybert-trips___co-share0.2-seed1.json")
    resume(options, tmp_path)
    assert states(killed) == states(finished_metakd)
    assert weights(killed) == weights(finished_metakd)


def test_a_domain_that_no_teacher_has_seen(
    command: Command, metakd_run: list[str], finished_metakd: Path
) -> None:
    options = [o for o in metakd_run[:-2] if o not in ("--arms", ",".join(ARMS))]
    options[options.index("1,0.2")] = "0.5"
    options[options.index("0,1")] = "0"
    done = command(*options, "--leave-out", "phones", "--name", "left")
    assert done.exit_code == 0, done.output
    folder = Path("runs/left")
    found = states(folder)
    students = {name for name in found if "-seed" in name}
    arms = ("mixed-tinybert", "mixed-metakd", "meta-tinybert", "meta-metakd")
    assert students == {f"{arm}-phones-share0.5-seed0" for arm in arms}
    from safetensors.torch import load_file

    head = load_file(folder / "teacher-meta" / "domain_head.safetensors")
    assert head["knowledge.embedding.weight"].shape[0] == 2
    whole = load_file(finished_metakd / "teacher-meta" / "domain_head.safetensors")
    assert whole["knowledge.embedding.weight"].shape[0] == 3
    scores = load_file(folder / "state" / "scores.safetensors")
    assert {"teacher/0", "teacher/2", "student/0", "student/1", "student/2"} == set(scores)
    assert not torch.equal(scores["teacher/0"], scores["student/0"])
    assert "No teacher was trained on phones" in (folder / "report.md").read_text()


def test_teachers_of_another_run(
    command: Command, metakd_run: list[str], finished_metakd: Path
) -> None:
    options = [*metakd_run[:-2], "--teachers", str(finished_metakd), "--domains", "books"]
    options[options.index(",".join(ARMS))] = "meta-metakd,meta-no-weights"
    options[options.index("1,0.2")] = "1"
    done = command(*options, "--name", "taken")
    assert done.exit_code == 0, done.output
    found, before = states(Path("runs/taken")), states(finished_metakd)
    for unit in ("teacher-meta", "meta-metakd-books-share1-seed1"):
        assert found[unit] == before[unit]
    losses = {
        line["unit"]: line["loss"]
        for line in map(json.loads, Path("runs/taken/log.jsonl").read_text().splitlines())
        if "loss" in line
    }
    assert losses["meta-no-weights-books-share1-seed0"] > losses["meta-metakd-books-share1-seed0"]
    for number, (more, message) in enumerate(
        [
            (["--max-length", "64"], "teachers must be of a run with max-length 64, got 128"),
            (["--arms", "mixed-metakd"], "this teacher, got"),
            (["--labels", "20"], "the same data and this teacher, got other data in"),
        ]
    ):
        done = command(*options, *more, "--name", f"other{number}")
        assert done.exit_code == 1 and message in done.output.replace("\n", " "), done.output
    assert not Path("runs/other0").exists()


def test_examples_of_several_domains() -> None:
    parts = [
        Examples([[1, 2]] * n, torch.zeros(n).long(), torch.full((n,), k), torch.full((n,), 0.5))
        for k, n in ((0, 3), (1, 2))
    ]
    joined = Examples.joined(parts)
    assert joined.domains.tolist() == [0, 0, 0, 1, 1] and len(joined.ids) == 5
    assert joined.scores is not None and joined.head(4).domains.tolist() == [0, 0, 0, 1]
    config = MetaKdConfig(batch_size=2)
    steps = Setting(config, CPU, 0).steps(joined, 3, seed=1)
    assert sorted(row for rows in steps[:3] for row in rows) == [0, 1, 2, 3, 4]
    assert steps != Setting(config, CPU, 0).steps(joined, 3, seed=2)


@pytest.mark.parametrize(("arm", "options"), sorted(LOSSES.items()))
def test_what_the_ablations_leave_out(
    arm: str, options: dict[str, Any], tiny_teacher: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    from kdkernels import MetaTeacher

    model = AutoModelForSequenceClassification.from_pretrained(tiny_teacher)
    teacher = MetaTeacher(model, 3, special_ids=(2, 3))
    student = AutoModelForSequenceClassification.from_pretrained(tiny_teacher)
    batch = {"input_ids": torch.tensor([[2, 7, 3], [2, 8, 3]]), "labels": torch.tensor([0, 1])}
    config = MetaKdConfig(train_embeddings=True)
    loss = make_loss(config, f"meta-{arm}", student, teacher, 0)
    parts = loss(batch, 0, torch.tensor([0.1, 0.9]), return_parts=True)
    assert (parts.transferable is None) == (options.get("gamma2") == 0)
    assert (parts.weights is None) == (not options.get("weighted", True))
    assert (parts.hidden is None) == (arm == "no-hidden")
    assert (parts.attention is None) == (arm == "no-attention")
    assert loss.faithful_to == ("code" if arm == "code" else "paper")
    other = make_loss(config, f"mixed-{arm}", student, model, 0)
    assert other(batch, return_parts=True).transferable is None
    assert (f"meta-{arm}" in ABLATIONS) == (arm not in ("tinybert", "metakd"))


def test_differences_are_paired_by_seed() -> None:
    def arm(name: str, *test: list[float]) -> Arm:
        figures = dict(zip(("a", "b"), test, strict=True))
        return Arm(name, 1.0, figures, figures)

    arms = [
        arm("mixed-tinybert", [70.0, 72.0, 74.0], [80.0, 82.0, 84.0]),
        arm("meta-metakd", [71.0, 73.0, 75.5], [81.0, 81.0, 85.5]),
    ]
    found = MetaKdResults(["a", "b"], [], arms, {}, {}, {})
    (difference,) = found.differences
    assert arms[0].average == [75.0, 77.0, 79.0]
    assert difference.mean == pytest.approx((1 + 0 + 1.5) / 3)
    assert (difference.wins, difference.pairs) == (5, 6)
    from scipy import stats

    expected = stats.ttest_rel(arms[1].average, arms[0].average).pvalue
    assert difference.p == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "kd"], "arms must name some of own-tinybert, own-metakd, mixed-tinybert"),
        (["--arms", "own-no-weights"], "arms must name some of own-tinybert"),
        (["--share", "0"], "share must lie in (0, 1], got 0.0"),
        (["--share", "0.1,0.1"], "share must differ, got 0.1,0.1"),
        (["--share", "few"], "share must be numbers separated by commas, got 'few'"),
        (["--stages", "3"], "stages must be 1 or 2, got 3"),
        (["--task", "r8"], "task must be one of sentiment, multiemo, mnli, amazon, got 'r8'"),
        (["--faithful-to", "x"], "faithful-to must be one of paper, code, got 'x'"),
        (["--leave-out", "a", "--domains", "b"], "domains must be left out with leave-out, got b"),
        (
            ["--leave-out", "a", "--arms", "own-metakd"],
            "arms must have no teacher of a with leave-",
        ),
        (["--swa-every", "2"], "swa-every must be left out with --method meta-kd, got (2,)"),
        (["--data", "no.csv"], "data must be an existing file or folder, got no.csv"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    command: Command, options: list[str], message: str
) -> None:
    done = command("--method", "meta-kd", *options)
    assert done.exit_code == 1
    assert f"distill: {message}" in done.output, done.output
    assert done.output.count("\n") == 1 and not Path("runs").exists()


def test_domains_that_the_data_do_not_have(command: Command, metakd_run: list[str]) -> None:
    for option in ("--leave-out", "--domains"):
        options = metakd_run
        if option == "--leave-out":
            options = [*metakd_run[:-2], "--arms", "meta-metakd", "--name", "x"]
        done = command(*options, option, "films")
        assert done.exit_code == 1
        assert f"{option[2:]} must name a domain of books, phones, trips & co, got 'films'" in (
            done.output
        )


def test_only_one_method_compares_shares(command: Command) -> None:
    done = command("--method", "diito", "--share", "0.1,0.2")
    assert "distill: share must be one number without --method meta-kd, got [0.1, 0.2]" in (
        done.output
    )
