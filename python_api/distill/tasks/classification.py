"""Text classification, from labels or from a teacher's logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.api.distill import fetch, train
from kdkernels.api.distill.data import Corpus, Labelled, Limits
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.models import Heading
from kdkernels.api.distill.sentiment import load_sentiment
from kdkernels.api.distill.task import SPLITS, TaskOptions
from kdkernels.api.distill.tasks.encoder import EncoderTask, first, held_out
from kdkernels.api.distill.text import collate, encode
from kdkernels.api.distill.topics import load_topics
from kdkernels.api.distill.train import EvalSet, Recipe, TrainSet
from kdkernels.api.methods.label_regularisation import LabelRegulariser

Step = tuple[TrainSet, list[int]]


class ClassificationTask(EncoderTask):
    """A corpus to classify; steps are the batches of ``kdkernels distill``.

    Attributes:
        corpus: The texts, as many as the options say.
    """

    metric = "accuracy (%)"
    higher_is_better = True

    def __init__(self, options: TaskOptions, corpus: Corpus, licences: Sequence[str] = ()) -> None:
        """Tokenises the texts.

        Args:
            options: Model and limits.
            corpus: The texts; the first ones of each split are used.
            licences: The licences of the texts, one line each.
        """
        heading = Heading(
            "AutoModelForSequenceClassification", "a sequence classifier", corpus.label_names
        )
        super().__init__(options, heading, licences)
        self.corpus = corpus
        wanted = {"train": options.train, "dev": options.dev, "test": options.test}
        self._texts = {
            split: _head(getattr(corpus, split), wanted[split], split) for split in wanted
        }
        self._ids = {split: self._encode(part.texts) for split, part in self._texts.items()}
        labels = {split: torch.tensor(part.labels) for split, part in self._texts.items()}
        self._train = TrainSet(self._ids["train"], labels=labels["train"])
        self._eval = {split: EvalSet(self._ids[split], labels[split]) for split in SPLITS}
        self._transfer: list[list[int]] | None = None
        self._recipe = Recipe(epochs=1, lr=0.0, batch_size=1, seed=0)
        self._regulariser: LabelRegulariser | None = None
        self.source = self._counted(f"{len(self._train.ids):,} training")

    def _counted(self, training: str) -> str:
        dev, test = (len(self._eval[split].ids) for split in SPLITS)
        return f"{self.corpus.source}: {training}, {dev:,} dev and {test:,} test texts"

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return encode(self.tokenizer, texts, self.options.max_length)

    @property
    def transfer_ids(self) -> list[list[int]]:
        """The tokenised transfer texts; the training texts where the corpus has none."""
        if self._transfer is None:
            texts = self.corpus.transfer
            self._transfer = self._encode(texts) if texts else self._ids["train"]
        return self._transfer

    def transfer_logits(self, model: Any) -> Tensor:
        """A teacher's fp32 logits of the transfer texts, ``[texts, classes]``.

        Args:
            model: A classifier of this task; left in evaluation mode.
        """
        return train.predict(
            model, self.transfer_ids, self.options.runtime, self.tokenizer.pad_token_id
        )

    def distilled(
        self, teacher_logits_transfer: Tensor, temperature: float, alpha: float
    ) -> ClassificationTask:
        """The same model and evaluation, learning from a teacher's logits.

        The loss is ``alpha * T^2 * KL(teacher || student)``; where the transfer texts are the
        training texts, their cross-entropy joins it with ``1 - alpha``.

        Args:
            teacher_logits_transfer: What :meth:`transfer_logits` gives, ``[texts, classes]``.
            temperature: Temperature of the divergence.
            alpha: Weight of the divergence.
        """
        ids, got = self.transfer_ids, tuple(teacher_logits_transfer.shape)
        shape = (len(ids), len(self.corpus.label_names))
        contract = f"have shape {shape}, transfer texts and classes"
        require(got == shape, "teacher_logits_transfer", contract, got)
        labels = None if self.corpus.transfer else self._train.labels
        other = copy.copy(self)
        other._train = TrainSet(ids, labels, teacher_logits_transfer.float().cpu())
        other._recipe = Recipe(
            epochs=1, lr=0.0, batch_size=1, seed=0, temperature=temperature, alpha=alpha
        )
        other.source = self._counted(f"{len(ids):,} transfer")
        return other

    def parts(self, share: float) -> tuple[ClassificationTask, ClassificationTask]:
        """The same task on the first training texts, and on the last ``share`` of them."""
        count = len(self._train.ids)
        first_part = count - held_out(count, share, "texts")
        return self._trained_on("train", 0, first_part), self._trained_on("train", first_part)

    def on_dev(self) -> ClassificationTask:
        """The same task with the dev texts as training texts."""
        return self._trained_on("dev")

    def _trained_on(self, split: str, start: int = 0, end: int | None = None) -> ClassificationTask:
        rows = slice(start, end)
        ids, labels = self._ids[split][rows], torch.tensor(self._texts[split].labels[rows])
        other = copy.copy(self)
        other._ids = {**self._ids, "train": ids}
        other._train = TrainSet(ids, labels=labels)
        other._transfer = self._transfer if self.corpus.transfer else None
        other.source = self._counted(f"{len(ids):,} training")
        return other

    def train_logits(self, model: Any) -> Tensor:
        """A teacher's fp32 logits of the training texts, ``[texts, classes]``.

        Args:
            model: A classifier of this task; left in evaluation mode.
        """
        return train.predict(
            model, self._train.ids, self.options.runtime, self.tokenizer.pad_token_id
        )

    def regularised(
        self, loss: LabelRegulariser, teacher_logits: Tensor | None = None
    ) -> ClassificationTask:
        """The same task, learning from labels by a regulariser.

        Args:
            loss: The regulariser.
            teacher_logits: What :meth:`train_logits` gives of a teacher, where it needs one.
        """
        if loss.needs_teacher:
            shape = (len(self._train.ids), len(self.corpus.label_names))
            got = None if teacher_logits is None else tuple(teacher_logits.shape)
            contract = f"have shape {shape}, training texts and classes"
            require(got == shape, "teacher_logits", contract, got)
        other = copy.copy(self)
        other._train = TrainSet(self._train.ids, self._train.labels, teacher_logits)
        other._regulariser = loss
        return other

    def used_tokens(self) -> Tensor:
        """The token ids that occur in the texts of any split, and the padding token; sorted."""
        ids = {token for part in self._ids.values() for row in part for token in row}
        return torch.tensor(sorted(ids | {self.tokenizer.pad_token_id}))

    def schedule(self, epochs: int, batch_size: int, seed: int) -> list[Step]:
        """All batches of all epochs; the order depends on the seed alone."""
        return train.schedule([self._train], Recipe(epochs, 0.0, batch_size, seed))

    def size(self, step: Step) -> int:
        """The number of texts."""
        return len(step[1])

    def tokens(self, step: Step) -> int:
        """The number of tokens, without padding."""
        return train.count_tokens(step)

    def pair(self, step: Step) -> tuple[dict[str, Tensor], None]:
        """What a model takes of a batch, and its labels; the batch is its own source."""
        part, rows = step
        assert part.labels is not None
        device = self.options.runtime.device
        batch = collate(part.ids, rows, self.tokenizer.pad_token_id, device)
        batch["labels"] = part.labels[rows].to(device)
        batch["lengths"] = torch.tensor([len(part.ids[row]) for row in rows])
        return batch, None

    def loss(self, model: Any, step: Step) -> Tensor:
        """The regulariser's loss of a batch; without one ``train.objective``."""
        runtime, pad_id = self.options.runtime, self.tokenizer.pad_token_id
        if self._regulariser is not None:
            logits, teacher, labels = train.batch_outputs(model, *step, runtime, pad_id)
            assert labels is not None
            loss: Tensor = self._regulariser(logits, labels, teacher)
            return loss
        return train.batch_loss(model, *step, self._recipe, runtime, pad_id)

    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        """The accuracy on ``dev`` or ``test``."""
        require(split in SPLITS, "split", f"be one of {SPLITS}", repr(split))
        part, pad_id = self._eval[split], self.tokenizer.pad_token_id
        logits = train.predict(model, part.ids, self.options.runtime, pad_id)
        return {self.metric: train.accuracy(logits, part.labels)}


def _head(part: Labelled, count: int | None, split: str) -> Labelled:
    rows = first(range(len(part)), count, split, "texts")
    return part.head(len(rows))


def sentiment_task(
    options: TaskOptions, labels: int | None = None, transfer: int | None = None
) -> ClassificationTask:
    """The demo's sentiment task, fetched once by checksum.

    Args:
        options: Model and limits.
        labels: Number of labelled training texts; None for all.
        transfer: Number of texts without labels, of those that are left; None for all.
    """
    archive = fetch.fetch(fetch.SENTIMENT, options.notify)
    corpus = load_sentiment(archive, Limits(labels, transfer))
    return ClassificationTask(options, corpus, [fetch.SENTIMENT.licence])


def topic_task(options: TaskOptions, name: str) -> ClassificationTask:
    """A published topic classification set, fetched once by checksum.

    Args:
        options: Model and limits.
        name: ``r8``, ``r52`` or ``20news``.
    """
    corpus = load_topics(fetch.fetch(fetch.TOPICS, options.notify), name)
    return ClassificationTask(options, corpus, [fetch.TOPICS.licence])
