"""Questions with contexts: reading, windows, the official figures, and the task."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdkernels.api.distill import fetch, squad, tasks
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.squad import Question, divide_questions, load_squad
from kdkernels.api.distill.task import TaskOptions
from kdkernels.api.distill.tasks.qa import best_spans
from kdkernels.api.distill.train import Loop, Recipe, Runtime, run

RUNTIME = Runtime(torch.device("cpu"), bf16=False)
WORDS = ["the", "film", "was", "and", "it", "very", "day"]


@pytest.fixture
def options(tiny_teacher: Path) -> TaskOptions:
    return TaskOptions(tiny_teacher, (0, 3), RUNTIME, max_length=32, train_embeddings=True)


def article(title: str, context: str, question: str, *answers: tuple[str, int]) -> dict[str, Any]:
    given = [{"text": text, "answer_start": start} for text, start in answers]
    entry = {"id": "1", "question": question, "answers": given}
    return {"title": title, "paragraphs": [{"context": context, "qas": [entry]}]}


@pytest.fixture(scope="module")
def squad_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 articles; what is asked for is one good word, or one bad one."""
    source = random.Random(4)
    articles = []
    for number in range(300):
        good, bad = source.choice(["good", "great", "lovely"]), source.choice(["bad", "dull"])
        words = [*source.choices(WORDS, k=source.randint(4, 9)), good, bad]
        source.shuffle(words)
        context, wanted = " ".join(words), (good, bad)[number % 2]
        question = f"{('happy', 'sad')[number % 2]} story"
        articles.append(article(str(number), context, question, (wanted, context.find(wanted))))
    path = tmp_path_factory.mktemp("squad") / "made-up.json"
    path.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return path


def write(path: Path, *articles: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"data": list(articles)}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("said", "answers", "f1", "exact"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1.0, 1.0),
        ("denver  broncos", ["Carolina", "a Denver Broncos"], 1.0, 1.0),
        ("Broncos of Denver", ["Denver Broncos"], 2 * 2 / (3 + 2), 0.0),
        ("to to be", ["to be to be"], 2 * 3 / (3 + 4), 0.0),
        ("theatre", ["the atre"], 0.0, 0.0),
        ("U.S.A.", ["USA"], 1.0, 1.0),
        ("", ["nothing"], 0.0, 0.0),
    ],
)
def test_figures_by_hand(said: str, answers: list[str], f1: float, exact: float) -> None:
    assert squad.f1(said, answers) == pytest.approx(f1)
    assert squad.exact_match(said, answers) == exact


def test_answers_not_at_their_offset_are_dropped(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.json",
        article("a", "It was good.", "How?", ("good", 7), ("fine", 7)),
        article("a", "It was good.", "How?", ("good", 6), ("good", 7)),
        article("a", "It was good.", "How?", ("good", -5)),
        article("a", "It was good.", "How?", (" ", 2)),
    )
    found = load_squad(path)
    assert found.dropped == 3
    assert found.questions == [Question("0 a", "It was good.", "How?", ("good", "fine"), 7)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"^data must be UTF-8 JSON, got .*q.json"),
        (b"\xe9", r"^data must be UTF-8 JSON, got .*q.json"),
        (b"[]", r"^data must have the format of SQuAD v1.1 .*, got .*q.json without: list"),
        (b"{}", r"^data must have the format of SQuAD v1.1 .*, got .*q.json without: 'data'"),
        (b'{"data": []}', r"^data must have at least one question .*, got none of 0 in"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "q.json"
    path.write_bytes(content)
    with pytest.raises(DistillError, match=message):
        load_squad(path)


def test_bad_questions(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"^data must be an existing file, got .*none.json"):
        load_squad(tmp_path / "none.json")
    path = write(tmp_path / "q.json", article("a", "context", "Why?"))
    with pytest.raises(DistillError, match=r"^data must have an answer to every question, .*Why"):
        load_squad(path)


@pytest.mark.parametrize(("articles", "side"), [(30, "article"), (3, "context")])
def test_no_context_is_in_two_splits(articles: int, side: str) -> None:
    questions = [
        Question(
            f"{n % articles}", f"context {n // articles % 20} of {n % articles}", "?", ("c",), 0
        )
        for n in range(1200)
    ]
    parts = divide_questions(questions)
    homes = [{getattr(question, side) for question in part} for part in parts.values()]
    assert len(set.union(*homes)) == sum(map(len, homes))
    assert sum(map(len, parts.values())) == 1200
    assert min(map(len, parts.values())) >= 120


def test_equal_contexts_are_of_one_article(tmp_path: Path) -> None:
    first, second = (
        article("a", "It was good.", "1", ("good", 7)),
        article("b", "It was good.", "2", ("It", 0)),
    )
    found = load_squad(write(tmp_path / "q.json", first, second))
    assert {question.article for question in found.questions} == {"0 a"}


def one_question(options: TaskOptions, question: Question) -> tasks.QaTask:
    return tasks.QaTask(options, {s: [question] for s in ("train", "dev", "test")}, "one")


def test_windows_cover_a_long_context(options: TaskOptions) -> None:
    words = [WORDS[i % 7] for i in range(60)]
    words[50:52] = ["good", "story"]
    context = " ".join(words)
    question = Question("a", context, "happy phone", ("good story",), context.find("good"))
    task = one_question(options, question)
    windows = task._split("test")
    assert len(windows) > 1 and max(len(window.ids) for window in windows) == 32
    covered = {offset for window in windows for offset in window.offsets if offset is not None}
    assert "".join(context[a:b] for a, b in sorted(covered)) == "".join(words)
    window, (first, last) = task._train[0]
    pieces = task.tokenizer.convert_ids_to_tokens(window.ids)
    assert pieces[first : last + 1] == ["good", "story"]
    assert pieces[:4] == ["[CLS]", "happy", "phone", "[SEP]"] and pieces[-1] == "[SEP]"
    assert window.types[:4] == [0] * 4 and set(window.types[4:]) == {1}


def test_the_best_span_of_all_windows_is_the_answer(options: TaskOptions) -> None:
    words = [WORDS[i % 7] for i in range(60)]
    words[50:52] = ["good", "story"]
    context = " ".join(words)
    question = Question("a", context, "happy phone", ("good story",), context.find("good"))
    task = one_question(options, question)
    known = task.tokenizer.get_vocab()

    class Oracle(torch.nn.Module):
        """Says that spans go from "good" to "story", and that the question is a good answer."""

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            class Out:
                start_logits = (input_ids == known["good"]) * 5.0 + (
                    input_ids == known["happy"]
                ) * 9
                end_logits = (input_ids == known["story"]) * 5.0 + (input_ids == known["phone"]) * 9

            return Out

    assert task.predict(Oracle(), "test") == ["good story"]
    assert task.evaluate(Oracle(), "test") == {"F1 (%)": 100.0, "exact match (%)": 100.0}


def test_long_questions_leave_room(options: TaskOptions) -> None:
    question = Question("a", "it was good", "very " * 100, ("good",), 7)
    (window,) = one_question(options, question)._split("test")
    assert [offset for offset in window.offsets if offset] == [(0, 2), (3, 6), (7, 11)]
    assert len(window.ids) == 32 // 3 + 3 + 3


def test_answers_begin_and_end_with_words(options: TaskOptions) -> None:
    task = one_question(options, Question("a", "it was good", "how", (" good",), 6))
    window, place = task._train[0]
    assert place == (5, 5) and window.offsets[5] == (7, 11)


def test_answers_that_fit_no_window_are_told(options: TaskOptions, squad_file: Path) -> None:
    told: list[str] = []
    known = load_squad(squad_file).questions[:20]
    context = "very " * 60
    long = Question("long", context, "how", (context.strip(),), 0)
    parts = {"train": [long, *known], "dev": known, "test": known}
    task = tasks.QaTask(replace(options, notify=told.append), parts, "both")
    assert told == ["no window holds the answers of 1 training questions, left out"]
    assert sum(task.size(step) for step in task.schedule(1, 8, 0)) == 20
    with pytest.raises(DistillError, match=r"^data must have training questions whose answers fit"):
        one_question(options, long)


def test_best_spans_by_hand() -> None:
    begin = torch.tensor([[9.0, 1.0, 5.0, 0.0, 9.0], [0.0, 0.0, 3.0, 1.0, 0.0]])
    end = torch.tensor([[9.0, 6.0, 2.0, 1.0, 9.0], [0.0, 9.0, 0.0, 2.0, 0.0]])
    context = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    # 5 + 6 would end before it begins; the 9s are no context.
    assert best_spans(begin, end, context) == [(7.0, 1, 1), (5.0, 2, 3)]
    far = torch.full((1, 64), -1.0)
    begin, end = far.clone(), far.clone()
    begin[0, 2], end[0, 40], end[0, 31] = 9.0, 9.0, 5.0
    ((score, first, last),) = best_spans(begin, end, torch.ones(1, 64, dtype=torch.bool))
    assert (score, first, last) == (14.0, 2, 31), "30 pieces at most"


def test_loss_is_the_mean_of_two_cross_entropies(options: TaskOptions, squad_file: Path) -> None:
    task = tasks.squad_task(replace(options, train=40), squad_file)
    model, step = task.new_model(0), task.schedule(1, 8, 0)[0]
    losses = []
    for row in step:
        window, places = task._train[row]
        ids, types = torch.tensor([window.ids]), torch.tensor([window.types])
        out = model(input_ids=ids, token_type_ids=types)
        for logits, place in zip((out.start_logits, out.end_logits), places, strict=True):
            losses.append(F.cross_entropy(logits, torch.tensor([place])))
    loss = task.loss(model, step)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_order_and_head_depend_on_the_seed_alone(options: TaskOptions, squad_file: Path) -> None:
    task = tasks.squad_task(options, squad_file)
    steps = task.schedule(2, 16, 1)
    assert steps == task.schedule(2, 16, 1) != task.schedule(2, 16, 2)
    heads = [task.new_model(seed).qa_outputs.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_task_learns_and_is_saved(options: TaskOptions, squad_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    task = tasks.squad_task(options, squad_file)
    assert task.source == "made-up.json: 210 train, 30 dev, 60 test questions"
    model = task.new_model(0)
    steps = task.schedule(15, 16, 0)
    loop = Loop[list[int]](
        lambda step: task.loss(model, step), lambda: 0.0, "none", task.size, lambda event: None
    )
    run(model, steps, loop, Recipe(15, 3e-3, 16, 0, evaluations=0))
    figures = task.evaluate(model, "test")
    assert list(figures) == ["F1 (%)", "exact match (%)"] and not model.training
    assert figures["exact match (%)"] > 80.0
    task.save(model, tmp_path)
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert task.evaluate(loaded, "test") == figures


def test_bad_options(options: TaskOptions, squad_file: Path) -> None:
    with pytest.raises(DistillError, match=r"^max-length must be at least 32 .*, got 31"):
        tasks.squad_task(replace(options, max_length=31), squad_file)
    with pytest.raises(DistillError, match=r"^domains must be of .*, got \['imdb'\]"):
        tasks.shifts_task(options, ["nyt", "imdb"])
    task = tasks.squad_task(replace(options, train=9, dev=9, test=9), squad_file)
    with pytest.raises(DistillError, match=r"^split must be one of .*, got 'train'"):
        task.evaluate(task.new_model(0), "train")


@pytest.mark.network
def test_published_squad_shifts(options: TaskOptions) -> None:
    """Downloads 358 MB, keeps 36; run with ``pytest tests/distill -m network -k shifts``."""
    folder = fetch.fetch_members(fetch.SQUAD_SHIFTS, lambda _: None)
    found = {}
    for name in fetch.SQUAD_SHIFTS.sha256:
        loaded = load_squad(folder / name)
        found[name] = (len(loaded.questions), loaded.dropped)
    assert found == {
        "squaddev_v1.1.json": (10562, 3),
        "new_wiki_v1.0.json": (7935, 1),
        "nyt_v1.0.json": (10055, 1),
        "reddit_v1.0.json": (9755, 12),
        "amazon_reviews_v1.0.json": (9521, 356),
    }
    few = replace(options, train=50, dev=50, test=50)
    task = tasks.shifts_task(few, ["nyt", "reddit"])
    assert task.source.endswith(": 50 train, 50 dev, 50 test, 50 nyt, 50 reddit questions")
    contexts = [{q.context for q in part} for part in task.questions.values()]
    assert len(set.union(*contexts)) == sum(map(len, contexts))
