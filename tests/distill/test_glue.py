"""GLUE: its published files, its figures, and the tasks."""

from __future__ import annotations

import math
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdkernels.api.distill import fetch, glue, models, tasks
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.glue import TASKS, Example, load_glue, load_sts
from kdkernels.api.distill.task import TaskOptions
from kdkernels.api.distill.train import Loop, Recipe, Runtime, run
from kdkernels.api.methods.label_regularisation import LabelRegulariser

RUNTIME = Runtime(torch.device("cpu"), bf16=False)
# Columns of the published files, as one row of them.
ROWS = {
    "cola": "gj04\t{label}\t*\t{a}",
    "sst-2": "{a}\t{label}",
    "mrpc": "{label}\t702876\t702977\t{a}\t{b}",
    "qqp": "133273\t213221\t213222\t{a}\t{b}\t{label}",
    "sts-b": "7\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\t{a}\t{b}\t{label}",
    "mnli": "7\t31193n\t31193n\ttravel\t( {a} )\t( {b} )\t(R)\t(R)\t{a}\t{b}\tneutral\t{label}",
    "qnli": "7\t{a}\t{b}\t{label}",
    "rte": "7\t{a}\t{b}\t{label}",
    "wnli": "7\t{a}\t{b}\t{label}",
}
MNLI = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
MNLI += "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\t"
HEADERS = {
    "sst-2": "sentence\tlabel",
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "sts-b": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
    "\tscore",
    "mnli": f"{MNLI}label1\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}
# MNLI's dev files have the labels of five people.
DEV_HEADERS = HEADERS | {"mnli": f"{MNLI}label1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label"}
DEV_ROWS = ROWS | {"mnli": ROWS["mnli"].replace("neutral", "\t".join(["neutral"] * 5))}


def labels_of(name: str) -> list[str]:
    return list(TASKS[name].classes) or ["0.000", "2.5", "5"]


def content(name: str, count: int, dev: bool, rows: list[str] | None = None) -> str:
    """A file of a task; texts hold quotes that open and do not close."""
    header = (DEV_HEADERS if dev else HEADERS).get(name)
    labels, row = labels_of(name), (DEV_ROWS if dev else ROWS)[name]
    lines = [
        row.format(a=f'"the film {i}', b=f"it's {i} \u0085day", label=labels[i % len(labels)])
        for i in range(count)
    ]
    return "\n".join([*([header] if header else []), *lines, *(rows or [])]) + "\n"


def write(folder: Path, name: str, train: int = 40, dev: int = 12) -> Path:
    """The files of a task in their folder; returns the folder above."""
    home = folder / TASKS[name].title
    home.mkdir(parents=True)
    files = TASKS[name].layouts[0]
    (home / files[0]).write_bytes(content(name, train, dev=False).encode())
    for file in files[1:]:
        (home / file).write_bytes(content(name, dev, dev=True).encode())
    return folder


def expected(name: str, count: int) -> list[Example]:
    texts = (('"the film {0}', "it's {0} \u0085day"))[: len(TASKS[name].texts)]
    labels = labels_of(name)
    return [
        Example(
            tuple(text.format(i) for text in texts),
            i % len(labels) if TASKS[name].classes else float(labels[i % len(labels)]),
        )
        for i in range(count)
    ]


def by_text(examples: list[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: (example.texts, example.label))


@pytest.mark.parametrize("name", TASKS)
def test_published_files(name: str, tmp_path: Path) -> None:
    above = write(tmp_path, name)
    data = load_glue(name, above)
    assert by_text(data.train + data.dev) == by_text(expected(name, 40)) and len(data.dev) == 4
    assert tuple(data.tests) == TASKS[name].parts
    for found in data.tests.values():
        assert by_text(found) == by_text(expected(name, 12)) and found != expected(name, 12)
    assert data == load_glue(name, above / TASKS[name].title), "the folder itself, the same cut"
    assert data.broken == {} and data.source.startswith(f"{TASKS[name].title}, scored on dev")


def test_equal_examples_are_on_one_side(tmp_path: Path) -> None:
    home = write(tmp_path, "rte") / "RTE"
    again = [f"7\tthe  Film {i}\tday\tentailment" for i in range(20)]
    again += [f"8\tthe film {i}\tday\tnot_entailment" for i in range(20)]
    (home / "train.tsv").write_text(content("rte", 5, dev=False, rows=again), encoding="utf-8")
    data = load_glue("rte", home)
    sides = [
        {" ".join(e.texts[0].lower().split()) for e in part} for part in (data.train, data.dev)
    ]
    assert len(data.train) + len(data.dev) == 45 and not sides[0] & sides[1]


def test_large_training_files_keep_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glue, "DEV_MOST", 2)
    assert len(load_glue("sst-2", write(tmp_path, "sst-2")).dev) == 2


def test_microsofts_own_layout_of_mrpc(tmp_path: Path) -> None:
    for split, count in (("train", 40), ("test", 12)):
        text = "\ufeff" + content("mrpc", count, dev=False).replace("\n", "\r\n")
        (tmp_path / f"msr_paraphrase_{split}.txt").write_bytes(text.encode("utf-8"))
    data = load_glue("mrpc", tmp_path)
    assert by_text(data.train + data.dev) == by_text(expected("mrpc", 40))
    assert by_text(data.tests[""]) == by_text(expected("mrpc", 12))
    assert data.source == "MRPC, scored on msr_paraphrase_test.txt"
    write(tmp_path, "mrpc", 30)
    assert len(load_glue("mrpc", tmp_path).train) == 36, "what is in the folder itself comes first"


BROKEN = ["1\t2\t3\tthe film", "1\t2\t3\tthe film\tday\tmaybe", "1\t2\t3\ta\tb\tc\t1"]


def test_broken_lines_of_qqp_are_left_out_and_told(tmp_path: Path, tiny_teacher: Path) -> None:
    home = write(tmp_path, "qqp") / "QQP"
    (home / "train.tsv").write_text(content("qqp", 40, dev=False, rows=BROKEN), encoding="utf-8")
    data = load_glue("qqp", home)
    assert by_text(data.train + data.dev) == by_text(expected("qqp", 40))
    assert data.broken == {"train.tsv": 3}
    told: list[str] = []
    tasks.glue_task(TaskOptions(tiny_teacher, None, RUNTIME, notify=told.append), "qqp", home)
    assert told == ["train.tsv: 3 broken lines are left out"]


@pytest.mark.parametrize(
    ("name", "train", "message"),
    [
        (
            "rte",
            "a\tb",
            "sentence1, sentence2, label for RTE, got none called sentence1, sentence2",
        ),
        ("cola", content("sst-2", 3, False), "4 columns in every line of CoLA, got 2 in line 1 of"),
        ("rte", content("wnli", 3, False), "of entailment, not_entailment, got '0' in line 2 of"),
        ("rte", content("rte", 3, False, ["7\tx"]), "in every line of RTE, got 2 in line 5"),
        ("sts-b", content("sts-b", 3, False).replace("2.5", "x"), "score, got 'x' in line 3 of t"),
        ("sts-b", content("sts-b", 3, False).replace("2.5", "nan"), "score, got 'nan' in line 3"),
        ("sst-2", HEADERS["sst-2"], "have train examples, got none"),
    ],
)
def test_bad_files(name: str, train: str, message: str, tmp_path: Path, tiny_teacher: Path) -> None:
    home = write(tmp_path, name) / TASKS[name].title
    (home / "train.tsv").write_text(train, encoding="utf-8")
    with pytest.raises(DistillError, match=r"^data must have ") as caught:
        tasks.glue_task(TaskOptions(tiny_teacher, None, RUNTIME), name, home)
    assert message in str(caught.value)


def test_wrong_folders(tmp_path: Path, tiny_teacher: Path) -> None:
    home = write(tmp_path, "mnli") / "MNLI"
    (home / "dev_mismatched.tsv").unlink()
    with pytest.raises(DistillError, match=r"^data must be the folder of MNLI .* without dev_mism"):
        load_glue("mnli", tmp_path)
    with pytest.raises(DistillError, match=r"^data must be the folder of MRPC \(train.tsv, dev.t"):
        load_glue("mrpc", tmp_path)
    (write(tmp_path, "rte") / "RTE" / "dev.tsv").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DistillError, match=r"^data must be UTF-8 text, got .*dev.tsv"):
        load_glue("rte", tmp_path)
    options = TaskOptions(tiny_teacher, None, RUNTIME)
    with pytest.raises(DistillError, match=r"^data must name the folder of GLUE's files for rte"):
        tasks.glue_task(options, "rte")
    with pytest.raises(DistillError, match=r"^task must be one of cola, .*, got 'ax'"):
        tasks.glue_task(options, "ax", tmp_path)


def ranks(values: list[float]) -> list[float]:
    """Ranks from 1; equal values have the mean of theirs."""
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2
        for value in values
    ]


def correlation(left: list[float], right: list[float]) -> float:
    means = sum(left) / len(left), sum(right) / len(right)
    pairs = [(a - means[0], b - means[1]) for a, b in zip(left, right, strict=True)]
    spread = math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))
    return 100 * sum(a * b for a, b in pairs) / spread


def test_figures_are_the_formulas() -> None:
    source = random.Random(1)
    labels = [source.randint(0, 1) for _ in range(60)]
    said = [label if source.random() < 0.7 else 1 - label for label in labels]
    counts = {(s, t): sum((a, b) == (s, t) for a, b in zip(said, labels, strict=True))
              for s in (0, 1) for t in (0, 1)}  # fmt: skip
    tn, fn, fp, tp = counts[0, 0], counts[0, 1], counts[1, 0], counts[1, 1]
    both = torch.tensor(said), torch.tensor(labels)
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    sides = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert glue.accuracy(*both) == pytest.approx(100 * (tp + tn) / 60)
    assert glue.f1(*both) == pytest.approx(200 * precision * recall / (precision + recall))
    assert glue.matthews(*both) == pytest.approx(100 * (tp * tn - fp * fn) / math.sqrt(sides))
    scores = [source.choice([0.0, 1.0, 2.5, 5.0]) for _ in range(60)]
    guesses = [round(score + source.gauss(0, 2), 1) for score in scores]
    both = torch.tensor(guesses), torch.tensor(scores)
    assert glue.pearson(*both) == pytest.approx(correlation(guesses, scores), rel=1e-5)
    expected_rank = correlation(ranks(guesses), ranks(scores))
    assert glue.spearman(*both) == pytest.approx(expected_rank, rel=1e-5)


def test_undefined_figures_are_zero() -> None:
    zeros, mixed = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 0, 1])
    assert glue.f1(zeros, zeros) == glue.f1(zeros, mixed) == glue.matthews(zeros, mixed) == 0.0
    for figure in (glue.pearson, glue.spearman):
        assert figure(torch.full((4,), 2.7), mixed.float()) == 0.0
        assert figure(torch.tensor([1.0, math.nan, 2.0, 3.0]), mixed.float()) == 0.0


@pytest.fixture
def options(tiny_teacher: Path) -> TaskOptions:
    return TaskOptions(tiny_teacher, (0, 3), RUNTIME, max_length=32, train_embeddings=True)


@pytest.fixture
def pairs(tmp_path: Path, make_text: Callable[[int, random.Random], str]) -> Callable[[str], Path]:
    """Writes a task of pairs: whether the second text is good decides, whatever the first is."""
    source = random.Random(5)

    def written(name: str) -> Path:
        home, labels = tmp_path / TASKS[name].title, labels_of(name)
        home.mkdir()
        for number, file in enumerate(TASKS[name].layouts[0]):
            lines = [HEADERS[name]]
            for i in range(40 if number else 260):
                a, b = source.randint(0, 1), source.randint(0, 1)
                label = labels[-b]
                texts = {"a": make_text(a, source), "b": f"{make_text(b, source)} {i}"}
                lines.append(ROWS[name].format(label=label, **texts))
            (home / file).write_text("\n".join(lines), encoding="utf-8")
        return home

    return written


def fit(task: tasks.GlueTask, epochs: int) -> Any:
    model = task.new_model(0)
    loop = Loop[Any](
        loss=lambda step: task.loss(model, step),
        evaluate=lambda: 0.0,
        metric="none",
        size=task.size,
        on_event=lambda event: None,
    )
    steps = task.schedule(epochs, 16, 0)
    run(model, steps, loop, Recipe(epochs, 3e-3, 16, 0, evaluations=0))
    return model


def test_single_texts_are_learnt(
    options: TaskOptions, tmp_path: Path, make_text: Callable[[int, random.Random], str]
) -> None:
    source = random.Random(6)
    for file, count in (("train.tsv", 170), ("dev.tsv", 40)):
        rows = [f"x\t{i % 2}\t\t{make_text(i % 2, source)} {i}" for i in range(count)]
        (tmp_path / file).write_text("\n".join(rows), encoding="utf-8")
    task = tasks.glue_task(options, "cola", tmp_path)
    assert task.source == "CoLA, scored on dev.tsv: 153 training, 17 dev and 40 test examples"
    assert task.metric == "Matthews correlation (%)"
    model = fit(task, 6)
    figures = task.evaluate(model, "test")
    assert list(figures) == [task.metric] and figures[task.metric] > 80
    assert list(task.evaluate(model, "dev")) == [task.metric] and not model.training
    assert model.config.id2label == {0: "unacceptable", 1: "acceptable"}
    with pytest.raises(DistillError, match=r"^split must be one of .*, got 'train'"):
        task.evaluate(model, "train")


def test_pairs_are_two_segments_and_scores_are_regressed(
    options: TaskOptions, pairs: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task = tasks.glue_task(options, "sts-b", pairs("sts-b"))
    model, step = task.new_model(0).eval(), task.schedule(1, 16, 0)[0]
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    examples = [task.examples["train"][row] for row in step]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # One pair at a time: without padding.
    each = [tokenizer(*example.texts, return_tensors="pt") for example in examples]
    assert all(int(encoding["token_type_ids"].max()) == 1 for encoding in each)
    outputs = torch.cat([model(**encoding).logits[:, 0] for encoding in each])
    scores = torch.tensor([example.label for example in examples])
    torch.testing.assert_close(task.loss(model, step), F.mse_loss(outputs, scores))
    blind = torch.cat([model(input_ids=encoding["input_ids"]).logits[:, 0] for encoding in each])
    assert not torch.allclose(outputs, blind), "the segments are told apart"
    order = [task.examples["test"].index(example) for example in task.examples["test"][:5]]
    said = task.predict(model, "test")[order, 0]
    first = [tokenizer(*e.texts, return_tensors="pt") for e in task.examples["test"][:5]]
    torch.testing.assert_close(said, torch.cat([model(**e).logits[:, 0] for e in first]).detach())

    model = fit(task, 8)
    figures = task.evaluate(model, "test")
    assert list(figures) == ["Pearson (%)", "Spearman (%)"] and figures["Pearson (%)"] > 50
    saved = tmp_path / "saved"
    saved.mkdir()
    task.save(model, saved)
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    assert loaded.config.problem_type == "regression" and loaded.config.num_labels == 1
    assert task.evaluate(loaded, "test") == figures


def test_labels_are_regularised_and_a_batch_is_its_own_source(
    options: TaskOptions, pairs: Callable[[str], Path]
) -> None:
    task = tasks.glue_task(options, "mrpc", pairs("mrpc"))
    model, step = task.new_model(0), task.schedule(1, 16, 0)[0]
    base, source = task.pair(step)
    assert source is None
    labels, lengths = base.pop("labels"), base.pop("lengths")
    assert torch.equal(lengths, base["attention_mask"].sum(1))
    logits = model(**base).logits
    smoothed = task.regularised(LabelRegulariser("ls", label_smoothing=0.1))
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(smoothed.loss(model, step), expected)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(task.loss(model, step), plain)
    taught = task.regularised(
        LabelRegulariser("kd", alpha=1.0, temperature=2.0), task.train_logits(model)
    )
    assert taught.loss(model, step).item() == pytest.approx(0.0, abs=1e-5)  # its own teacher
    used = task.used_tokens()
    assert set(base["input_ids"].flatten().tolist()) <= set(used.tolist())
    with pytest.raises(DistillError, match="teacher_logits must have shape .*, got None"):
        task.regularised(LabelRegulariser("kd"))


def test_mnli_has_two_figures(options: TaskOptions, pairs: Callable[[str], Path]) -> None:
    limited = replace(options, train=100, dev=10, test=20)
    task = tasks.glue_task(limited, "mnli", pairs("mnli"))
    heads = ["accuracy, matched (%)", "accuracy, mismatched (%)"]
    model = task.new_model(0)
    found = task.evaluate(model, "test")
    assert list(found) == heads and list(task.evaluate(model, "dev")) == heads[:1]
    assert task.metric == heads[0]
    for head, part in zip(heads, ("matched", "mismatched"), strict=True):
        right = task.predict(model, part).argmax(-1).tolist()
        labels = [example.label for example in task.examples[part]]
        share = sum(a == b for a, b in zip(right, labels, strict=True)) / 20
        assert found[head] == pytest.approx(100 * share)
    assert task.source.endswith("100 training, 10 dev and 20 matched and 20 mismatched examples")
    step = task.schedule(1, 16, 0)[0]
    assert task.loss(model, step).item() == pytest.approx(math.log(3), abs=0.3)


def test_models_without_segments_are_told_none(
    options: TaskOptions, pairs: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    folder, tokenizer = tmp_path / "distilbert", AutoTokenizer.from_pretrained(options.model)
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=2, hidden_dim=64
    )
    DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    task = tasks.glue_task(replace(options, model=folder, layers=None), "rte", pairs("rte"))
    assert list(task.evaluate(task.new_model(0), "dev")) == ["accuracy (%)"]


def test_a_head_for_other_classes_is_replaced_where_asked(
    options: TaskOptions, pairs: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "three"
    three = models.load_classifier(options.model, ["a", "b", "c"], "model", 0)
    three.model.config.problem_type = "regression"  # as of a model for scores
    folder.mkdir()
    three.save(folder)
    with pytest.raises(DistillError, match=r"^model must be a folder that transformers loads as"):
        models.load_classifier(folder, ["neg", "pos"], "model", 0)
    task = tasks.glue_task(replace(options, model=folder), "rte", pairs("rte"))
    heads = [task.new_model(seed).classifier.weight for seed in (0, 0, 1)]
    assert heads[0].shape == (2, 32) and torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    model = task.new_model(0)
    assert model.config.problem_type == "single_label_classification"
    kept = three.model.bert.encoder.layer[3].output.dense.weight
    assert torch.equal(model.bert.encoder.layer[1].output.dense.weight, kept)
    config = models.read_config(folder, "model")
    config.intermediate_size = 32
    config.save_pretrained(folder)
    with pytest.raises(DistillError, match=r"the weights of bert\.encoder\S+ do not have the size"):
        task.new_model(0)


def sts_row(number: int, more: str = "") -> str:
    row = f"main-news\theadlines\t2016\t{number}\t{number % 6}.000\tthe film {number}\tday\u2028"
    return row + more


def test_published_test_pairs_of_sts(
    options: TaskOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sts.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for split, count in (("train", 30), ("dev", 6), ("test", 9)):
            rows = [sts_row(i, "\tone source\tanother" * (i % 2)) for i in range(count)]
            wheel.writestr(glue.STS_MEMBER.format(split=split), "\n".join(rows) + "\n")
    data = load_sts(path)
    assert by_text(data.tests[""]) == by_text(
        [Example((f"the film {i}", "day"), i % 6) for i in range(9)]
    )
    assert (len(data.train), len(data.dev)) == (30, 6)
    monkeypatch.setattr(fetch, "fetch", lambda archive, notify: path)
    task = tasks.glue_task(options, "sts-b")
    assert task.licences == [fetch.STS.licence]
    assert task.source == (
        "STS-B with its published test pairs: 30 training, 6 dev and 9 test examples"
    )


@pytest.mark.network
def test_published_sts() -> None:
    """Downloads 0.4 MB; run with ``pytest tests/distill -m network -k published_sts``."""
    data = load_sts(fetch.fetch(fetch.STS, lambda _: None))
    parts = (data.train, data.dev, data.tests[""])
    assert [len(part) for part in parts] == [5749, 1500, 1379]
    assert all(0 <= e.label <= 5 and all(e.texts) for part in parts for e in part)
    assert {type(e.label) for part in parts for e in part} == {float}
