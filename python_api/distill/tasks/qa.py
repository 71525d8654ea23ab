"""Extractive question answering: the span of a context that answers a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.api.distill import fetch, squad
from kdkernels.api.distill.data import divide
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.models import Heading
from kdkernels.api.distill.squad import DOMAINS, SQUAD_DEV, Question, load_squad
from kdkernels.api.distill.task import TaskOptions
from kdkernels.api.distill.tasks.encoder import EncoderTask, batches, first, pad
from kdkernels.api.distill.text import inference_batches
from kdkernels.api.distill.train import INFERENCE_BATCH

SHORTEST_INPUT = 32
# Shares of the longest input: what a question may take, and what two windows have in common.
QUESTION_SHARE = 3
OVERLAP_SHARE = 4
# Longest answer, in word pieces.
ANSWER_TOKENS = 30


@dataclass(frozen=True)
class Window:
    """A question and a part of its context as the model reads them.

    Attributes:
        row: Number of the question.
        ids: Word pieces, special tokens included.
        types: Segment of each piece; empty where the tokenizer has none.
        offsets: Place in the context of each piece of it, None for every other piece.
    """

    row: int
    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int] | None]

    def find(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and last piece of a part of the context; None if it is not all here."""
        inside = [
            place
            for place, offset in enumerate(self.offsets)
            if offset is not None and offset[1] > start and offset[0] < end
        ]
        if not inside:
            return None
        begin, stop = self.offsets[inside[0]], self.offsets[inside[-1]]
        assert begin is not None and stop is not None
        whole = begin[0] <= start and stop[1] >= end
        return (inside[0], inside[-1]) if whole else None


class QaTask(EncoderTask):
    """Questions about contexts; a step is rows of training questions.

    A training question is its first window that holds the answer; a test question is all of its
    windows, of which the best span is the answer.

    Attributes:
        questions: The questions of each split, as many as the options say.
    """

    metric = "F1 (%)"
    higher_is_better = True

    def __init__(
        self,
        options: TaskOptions,
        questions: Mapping[str, Sequence[Question]],
        source: str,
        licences: Sequence[str] = (),
    ) -> None:
        """Tokenises the questions.

        Args:
            options: Model and limits; 192 is a good longest input, where most contexts fit.
            questions: Those of ``train``, ``dev``, ``test`` and of any further test sets, which
                are limited as ``test`` is; the first of each are used.
            source: Where they come from.
            licences: Their licences, one line each.
        """
        contract = f"be at least {SHORTEST_INPUT} for questions with contexts"
        require(options.max_length >= SHORTEST_INPUT, "max-length", contract, options.max_length)
        super().__init__(
            options, Heading("AutoModelForQuestionAnswering", "a span picker"), licences
        )
        contract = "have a fast tokenizer, which says where in a text a piece is"
        require(self.tokenizer.is_fast, "model", contract, options.model)
        wanted = {"train": options.train, "dev": options.dev}
        self.questions = {
            split: first(part, wanted.get(split, options.test), split, "questions")
            for split, part in questions.items()
        }
        self._windows: dict[str, list[Window]] = {}
        self._train = self._training()
        counts = {name: len(part) for name, part in self.questions.items()}
        lost = counts["train"] - len(self._train)
        if lost:
            options.notify(f"no window holds the answers of {lost} training questions, left out")
        counted = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        self.source = f"{source}: {counted} questions"

    def _training(self) -> list[tuple[Window, tuple[int, int]]]:
        """The first window with the answer of each training question, and where that is."""
        found: dict[int, tuple[Window, tuple[int, int]]] = {}
        for window in self._split("train"):
            question = self.questions["train"][window.row]
            answer = question.answers[0]
            start = question.start + len(answer) - len(answer.lstrip())
            place = window.find(start, start + len(answer.strip()))
            if place is not None:
                found.setdefault(window.row, (window, place))
        contract = "have training questions whose answers fit into a window"
        require(len(found) > 0, "data", contract, f"none of {len(self.questions['train'])}")
        return [found[row] for row in sorted(found)]

    def _split(self, split: str) -> list[Window]:
        """The windows of a split, made once."""
        if split not in self._windows:
            self._windows[split] = self._encode(self.questions[split])
        return self._windows[split]

    def _encode(self, questions: Sequence[Question]) -> list[Window]:
        longest = self.options.max_length
        encoding = self.tokenizer(
            self._shortened([question.text for question in questions]),
            [question.context for question in questions],
            truncation="only_second",
            max_length=longest,
            stride=longest // OVERLAP_SHARE,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        types = encoding.get("token_type_ids")
        windows = []
        for number, row in enumerate(encoding["overflow_to_sample_mapping"]):
            offsets = zip(
                encoding.sequence_ids(number), encoding["offset_mapping"][number], strict=True
            )
            windows.append(
                Window(
                    row=row,
                    ids=list(encoding["input_ids"][number]),
                    types=[] if types is None else list(types[number]),
                    offsets=[(o[0], o[1]) if part == 1 else None for part, o in offsets],
                )
            )
        return windows

    def _shortened(self, texts: list[str]) -> list[str]:
        """Questions cut so that there is always room for a context."""
        limit = self.options.max_length // QUESTION_SHARE
        encoding = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return [
            text if len(places) <= limit else text[: places[limit - 1][1]]
            for text, places in zip(texts, encoding["offset_mapping"], strict=True)
        ]

    def schedule(self, epochs: int, batch_size: int, seed: int) -> list[list[int]]:
        """Rows of questions of all steps of all epochs; the order depends on the seed alone."""
        lengths = [len(window.ids) for window, _ in self._train]
        return batches(lengths, epochs, batch_size, seed)

    def size(self, step: list[int]) -> int:
        """The number of questions."""
        return len(step)

    def tokens(self, step: list[int]) -> int:
        """The number of tokens, without padding."""
        return sum(len(self._train[row][0].ids) for row in step)

    def loss(self, model: Any, step: list[int]) -> Tensor:
        """The mean of the cross-entropies of first and last piece over the pieces of a batch."""
        runtime = self.options.runtime
        windows = [self._train[row][0] for row in step]
        places = torch.tensor([self._train[row][1] for row in step], device=runtime.device)
        with runtime.training_attention():
            begin, end = self._logits(model, windows)
        losses = [
            kdkernels.kd_loss(logits, None, labels)
            for logits, labels in ((begin, places[:, 0]), (end, places[:, 1]))
        ]
        return (losses[0] + losses[1]) / 2.0

    def _logits(self, model: Any, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """fp32 logits of first and last pieces, ``[windows, longest]``; -inf at padding."""
        runtime, pad_id = self.options.runtime, self.tokenizer.pad_token_id
        batch = {
            "input_ids": pad([window.ids for window in windows], pad_id, runtime.device),
            "attention_mask": pad([[1] * len(w.ids) for w in windows], 0, runtime.device),
        }
        if windows[0].types:
            batch["token_type_ids"] = pad([window.types for window in windows], 0, runtime.device)
        with runtime.autocast():
            out = model(**batch)
        padding = batch["attention_mask"] == 0
        begin, end = (
            logits.float().masked_fill(padding, -torch.inf)
            for logits in (out.start_logits, out.end_logits)
        )
        return begin, end

    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        """F1 and exact match, as SQuAD's official script computes them.

        Args:
            model: A model of this task; left in evaluation mode.
            split: ``dev``, ``test`` or the name of a further test set.
        """
        known = [name for name in self.questions if name != "train"]
        require(split in known, "split", f"be one of {known}", repr(split))
        pairs = list(zip(self.predict(model, split), self.questions[split], strict=True))
        f1 = [squad.f1(said, question.answers) for said, question in pairs]
        exact = [squad.exact_match(said, question.answers) for said, question in pairs]
        return {
            self.metric: 100.0 * sum(f1) / len(pairs),
            "exact match (%)": 100.0 * sum(exact) / len(pairs),
        }

    @torch.inference_mode()
    def predict(self, model: Any, split: str) -> list[str]:
        """The model's answer to every question; the model is left in eval mode."""
        model.to(self.options.runtime.device).eval()
        questions, windows = self.questions[split], self._split(split)
        answers, scores = [""] * len(questions), [-torch.inf] * len(questions)
        for rows in inference_batches([len(window.ids) for window in windows], INFERENCE_BATCH):
            chosen = [windows[row] for row in rows]
            inside = [[int(offset is not None) for offset in w.offsets] for w in chosen]
            begin, end = self._logits(model, chosen)
            context = pad(inside, 0, begin.device) == 1
            for window, (score, first_piece, last_piece) in zip(
                chosen, best_spans(begin, end, context), strict=True
            ):
                if score > scores[window.row]:
                    scores[window.row] = score
                    start, stop = window.offsets[first_piece], window.offsets[last_piece]
                    assert start is not None and stop is not None
                    answers[window.row] = questions[window.row].context[start[0] : stop[1]]
        return answers


def best_spans(begin: Tensor, end: Tensor, context: Tensor) -> list[tuple[float, int, int]]:
    """The likeliest span of every window: the sum of its two logits, its first and last piece.

    Args:
        begin: Logits of first pieces, ``[windows, pieces]``.
        end: Logits of last pieces.
        context: bool; where answers may be.
    """
    begin, end = (logits.masked_fill(~context, -torch.inf) for logits in (begin, end))
    pieces = begin.shape[1]
    allowed = torch.ones(pieces, pieces, dtype=torch.bool, device=begin.device)
    allowed = allowed.triu().tril(ANSWER_TOKENS - 1)
    sums = (begin[:, :, None] + end[:, None, :]).masked_fill(~allowed, -torch.inf).flatten(1)
    scores, places = sums.max(-1)
    return [
        (score, place // pieces, place % pieces)
        for score, place in zip(scores.tolist(), places.tolist(), strict=True)
    ]


def shifts_task(options: TaskOptions, domains: Sequence[str] = ()) -> QaTask:
    """SQuAD v1.1's dev questions, split by article; fetched once by checksum.

    The archive has 358 MB, of which 36 MB are kept. There is no training part of SQuAD in it.

    Args:
        options: Model and limits.
        domains: Further test sets, of SQuADShifts: ``new_wiki``, ``nyt``, ``reddit``, ``amazon``.
    """
    unknown = [name for name in domains if name not in DOMAINS]
    require(not unknown, "domains", f"be of {tuple(DOMAINS)}", unknown)
    folder = fetch.fetch_members(fetch.SQUAD_SHIFTS, options.notify)
    parts = squad.divide_questions(_load(folder / SQUAD_DEV, options))
    for name in domains:
        # In a random order, as the other parts are.
        (parts[name],) = divide(_load(folder / DOMAINS[name], options), _context, [])
    source = "SQuAD v1.1 dev, split by article" + (", and SQuADShifts" if domains else "")
    return QaTask(options, parts, source, [fetch.SQUAD_SHIFTS.archive.licence])


def squad_task(options: TaskOptions, path: Path) -> QaTask:
    """Questions of a file, split at random by article, or by context where articles are few.

    Args:
        options: Model and limits.
        path: As :func:`kdkernels.api.distill.squad.load_squad` reads it.
    """
    return QaTask(options, squad.divide_questions(_load(path, options)), path.name)


def _load(path: Path, options: TaskOptions) -> list[Question]:
    """The questions of a file; tells of those that are left out."""
    found = load_squad(path)
    if found.dropped:
        options.notify(
            f"{path.name}: {found.dropped} answers are not in their contexts at their offsets, "
            "these questions are left out"
        )
    return found.questions


def _context(question: Question) -> str:
    return question.context
