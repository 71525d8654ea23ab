"""Tagging of words, such as named entities: one label for the first piece of each word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.api.distill import fetch
from kdkernels.api.distill.conll import (
    OUTSIDE,
    Sentence,
    load_conll,
    load_conll2003,
    span_f1,
    tag_names,
)
from kdkernels.api.distill.data import divide
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.models import Heading
from kdkernels.api.distill.task import SPLITS, TaskOptions
from kdkernels.api.distill.tasks.encoder import EncoderTask, batches, first, pad
from kdkernels.api.distill.text import collate, inference_batches
from kdkernels.api.distill.train import INFERENCE_BATCH

# Of a single file.
TEST_SHARE = 0.20
DEV_SHARE = 0.10
# What kd_loss leaves out.
IGNORED = -100


@dataclass(frozen=True)
class _Encoded:
    """Sentences as the model reads them.

    Attributes:
        ids: Word pieces of each sentence, special tokens included.
        labels: As many labels; ``IGNORED`` for all but the first pieces of words.
        firsts: The place of the first piece of each word that was not cut off, by word.
    """

    ids: list[list[int]]
    labels: list[list[int]]
    firsts: list[dict[int, int]]


class TaggingTask(EncoderTask):
    """Sentences whose words have tags; a step is the rows of its sentences.

    Attributes:
        tags: Names of the tags by number.
        sentences: The sentences of each split, as many as the options say.
    """

    metric = "span F1 (%)"
    higher_is_better = True

    def __init__(
        self,
        options: TaskOptions,
        sentences: Mapping[str, Sequence[Sentence]],
        source: str,
        licences: Sequence[str] = (),
    ) -> None:
        """Tokenises the sentences.

        Args:
            options: Model and limits.
            sentences: Those of ``train``, ``dev`` and ``test``; the first of each are used.
            source: Where they come from.
            licences: Their licences, one line each.
        """
        wanted = {"train": options.train, "dev": options.dev, "test": options.test}
        self.sentences = {
            split: first(sentences[split], count, split, "sentences")
            for split, count in wanted.items()
        }
        self.tags = tag_names([sentence for part in sentences.values() for sentence in part])
        heading = Heading("AutoModelForTokenClassification", "a token classifier", self.tags)
        super().__init__(options, heading, licences)
        contract = "have a fast tokenizer, which says what word a piece is of"
        require(self.tokenizer.is_fast, "model", contract, options.model)
        self._encoded = {split: self._encode(part) for split, part in self.sentences.items()}
        counts = {split: f"{len(part):,}" for split, part in self.sentences.items()}
        self.source = (
            f"{source}: {counts['train']} training, {counts['dev']} dev and {counts['test']} test "
            f"sentences with {len(self.tags)} tags"
        )

    def _encode(self, sentences: Sequence[Sentence]) -> _Encoded:
        """Word pieces and their labels; sentences are cut to the longest input."""
        numbers = {tag: number for number, tag in enumerate(self.tags)}
        encoding = self.tokenizer(
            [list(sentence.words) for sentence in sentences],
            is_split_into_words=True,
            truncation=True,
            max_length=self.options.max_length,
        )
        labels, firsts = [], []
        for row, sentence in enumerate(sentences):
            places: dict[int, int] = {}
            for place, word in enumerate(encoding.word_ids(row)):
                if word is not None:
                    places.setdefault(word, place)
            line = [IGNORED] * len(encoding["input_ids"][row])
            for word, place in places.items():
                line[place] = numbers[sentence.tags[word]]
            labels.append(line)
            firsts.append(places)
        return _Encoded([list(ids) for ids in encoding["input_ids"]], labels, firsts)

    def schedule(self, epochs: int, batch_size: int, seed: int) -> list[list[int]]:
        """Rows of sentences of all steps of all epochs; the order depends on the seed alone."""
        lengths = [len(ids) for ids in self._encoded["train"].ids]
        return batches(lengths, epochs, batch_size, seed)

    def size(self, step: list[int]) -> int:
        """The number of sentences."""
        return len(step)

    def tokens(self, step: list[int]) -> int:
        """The number of tokens, without padding."""
        return sum(len(self._encoded["train"].ids[row]) for row in step)

    def loss(self, model: Any, step: list[int]) -> Tensor:
        """The mean cross-entropy over the words of a batch."""
        runtime, part = self.options.runtime, self._encoded["train"]
        batch = collate(part.ids, step, self.tokenizer.pad_token_id, runtime.device)
        labels = pad([part.labels[row] for row in step], IGNORED, runtime.device)
        with runtime.autocast(), runtime.training_attention():
            logits = model(**batch).logits
        loss: Tensor = kdkernels.kd_loss(logits.float(), None, labels, ignore_index=IGNORED)
        return loss

    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        """Span F1 as ``conlleval`` computes it, and the accuracy of the words' tags.

        Words that were cut off, or that the tokenizer has no piece for, are taken for ``O``.
        """
        require(split in SPLITS, "split", f"be one of {SPLITS}", repr(split))
        gold = [sentence.tags for sentence in self.sentences[split]]
        predicted = self.predict(model, split)
        pairs = [
            pair
            for tags, guess in zip(gold, predicted, strict=True)
            for pair in zip(tags, guess, strict=True)
        ]
        right = sum(tag == guess for tag, guess in pairs)
        accuracy = 100.0 * right / len(pairs)
        return {self.metric: span_f1(gold, predicted), "token accuracy (%)": accuracy}

    @torch.inference_mode()
    def predict(self, model: Any, split: str) -> list[list[str]]:
        """The model's tag for every word of a split; the model is left in eval mode."""
        runtime, part, sentences = self.options.runtime, self._encoded[split], self.sentences[split]
        model.to(runtime.device).eval()
        found = [[OUTSIDE] * len(sentence.words) for sentence in sentences]
        for rows in inference_batches([len(ids) for ids in part.ids], INFERENCE_BATCH):
            batch = collate(part.ids, rows, self.tokenizer.pad_token_id, runtime.device)
            with runtime.autocast():
                logits = model(**batch).logits
            best = logits.float().argmax(-1).tolist()
            for row, numbers in zip(rows, best, strict=True):
                for word, place in part.firsts[row].items():
                    found[row][word] = self.tags[numbers[place]]
        return found


def conll2003_task(options: TaskOptions) -> TaggingTask:
    """CoNLL-2003 English named entities, fetched once by checksum.

    The text is for research only, so nothing but asking for this task fetches it. The published
    splits, each in a random order: its sentences are sorted by documents.

    Args:
        options: Model and limits.
    """
    archive = fetch.fetch(fetch.CONLL2003, options.notify)
    published = load_conll2003(archive)
    parts = {split: divide(part, _text, [])[0] for split, part in published.items()}
    source = "CoNLL-2003 English, named entities in Reuters news (research use only)"
    return TaggingTask(options, parts, source, [fetch.CONLL2003.licence])


def conll_task(options: TaskOptions, path: Path) -> TaggingTask:
    """Sentences of a file of columns, split at random; equal sentences stay on one side.

    Args:
        options: Model and limits.
        path: As :func:`kdkernels.api.distill.conll.load_conll` reads it.
    """
    train, test, dev = divide(load_conll(path), _text, [TEST_SHARE, DEV_SHARE])
    return TaggingTask(options, {"train": train, "dev": dev, "test": test}, path.name)


def _text(sentence: Sentence) -> str:
    return " ".join(sentence.words)
