"""The tasks of GLUE: classes of texts and of pairs of texts, and the similarity of pairs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels
from kdkernels.api.distill import fetch, train
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.glue import FIGURES, TASKS, Example, Glue, GlueData, load_glue, load_sts
from kdkernels.api.distill.models import Heading, read_config
from kdkernels.api.distill.task import SPLITS, TaskOptions
from kdkernels.api.distill.tasks.encoder import EncoderTask, batches, first, held_out
from kdkernels.api.distill.text import collate
from kdkernels.api.methods.label_regularisation import LabelRegulariser

CLASSES = "single_label_classification"
SCORES = "regression"


@dataclass(frozen=True)
class _Encoded:
    """Examples as the model reads them.

    Attributes:
        ids: Word pieces of each example, special tokens included.
        types: Which of its two texts each piece is of; None where the model is not told.
        labels: int64 ``[examples]`` numbers of classes, or fp32 scores.
    """

    ids: list[list[int]]
    types: list[list[int]] | None
    labels: Tensor


class GlueTask(EncoderTask):
    """Texts or pairs of texts with a class or a score; a step is the rows of its examples.

    Attributes:
        glue: Which task it is.
        examples: Those of ``train``, ``dev`` and ``test``, or of the parts that are scored, as many
            as the options say.
    """

    higher_is_better = True

    def __init__(
        self, options: TaskOptions, glue: Glue, data: GlueData, licences: Sequence[str] = ()
    ) -> None:
        """Tokenises the examples.

        Args:
            options: Model and limits.
            glue: Which task it is.
            data: Its examples; the first of each split are used.
            licences: Their licences, one line each.
        """
        if glue.classes:
            names, kind, problem = list(glue.classes.values()), "a sequence classifier", CLASSES
        else:
            names, kind, problem = [glue.label], "a model with one output", SCORES
        heading = Heading("AutoModelForSequenceClassification", kind, names, problem)
        super().__init__(options, heading, licences)
        for file, count in data.broken.items():
            options.notify(f"{file}: {count} broken lines are left out")
        self.glue = glue
        self._regulariser: LabelRegulariser | None = None
        self._teacher_logits: Tensor | None = None
        self.metric = glue.heads(glue.parts[0])[0]
        self.examples = {
            "train": first(data.train, options.train, "train", "examples"),
            "dev": first(data.dev, options.dev, "dev", "examples"),
        }
        for part, found in data.tests.items():
            self.examples[part or "test"] = first(found, options.test, "test", "examples")
        self._encoded = {part: self._encode(found) for part, found in self.examples.items()}
        self._origin = data.source
        self.source = self._counted(data.source)

    def _counted(self, origin: str) -> str:
        counts = {part: f"{len(found):,}" for part, found in self.examples.items()}
        parts = self.glue.parts
        tests = " and ".join(f"{counts[part or 'test']} {part or 'test'}" for part in parts)
        return f"{origin}: {counts['train']} training, {counts['dev']} dev and {tests} examples"

    def _encode(self, examples: Sequence[Example]) -> _Encoded:
        config = read_config(self.options.model, "model")
        told = len(self.glue.texts) > 1 and getattr(config, "type_vocab_size", 0) > 1
        encoding = self.tokenizer(
            *(list(texts) for texts in zip(*(example.texts for example in examples), strict=True)),
            truncation=True,
            max_length=self.options.max_length,
            return_token_type_ids=told,
        )
        types = [list(row) for row in encoding["token_type_ids"]] if told else None
        kind = torch.int64 if self.glue.classes else torch.float32
        labels = torch.tensor([example.label for example in examples], dtype=kind)
        return _Encoded([list(ids) for ids in encoding["input_ids"]], types, labels)

    def schedule(self, epochs: int, batch_size: int, seed: int) -> list[list[int]]:
        """Rows of examples of all steps of all epochs; the order depends on the seed alone."""
        lengths = [len(ids) for ids in self._encoded["train"].ids]
        return batches(lengths, epochs, batch_size, seed)

    def size(self, step: list[int]) -> int:
        """The number of examples."""
        return len(step)

    def tokens(self, step: list[int]) -> int:
        """The number of tokens, without padding."""
        return sum(len(self._encoded["train"].ids[row]) for row in step)

    def parts(self, share: float) -> tuple[GlueTask, GlueTask]:
        """The same task on the first training examples, and on the last ``share`` of them."""
        count = len(self.examples["train"])
        first_part = count - held_out(count, share, "examples")
        return self._trained_on("train", 0, first_part), self._trained_on("train", first_part)

    def on_dev(self) -> GlueTask:
        """The same task with the dev examples as training examples."""
        return self._trained_on("dev")

    def _trained_on(self, split: str, start: int = 0, end: int | None = None) -> GlueTask:
        rows, part = slice(start, end), self._encoded[split]
        types = None if part.types is None else part.types[rows]
        other = copy.copy(self)
        other.examples = {**self.examples, "train": self.examples[split][rows]}
        encoded = _Encoded(part.ids[rows], types, part.labels[rows])
        other._encoded = {**self._encoded, "train": encoded}
        other.source = other._counted(self._origin)
        return other

    def train_logits(self, model: Any) -> Tensor:
        """A teacher's fp32 outputs for the training examples, ``[examples, outputs]``."""
        return self.predict(model, "train")

    def transfer_logits(self, model: Any) -> Tensor:
        """The same: there are no examples without labels to transfer on."""
        return self.train_logits(model)

    def distilled(
        self, teacher_logits_transfer: Tensor, temperature: float, alpha: float
    ) -> GlueTask:
        """The same task, learning from a teacher's logits and the labels.

        Args:
            teacher_logits_transfer: What :meth:`transfer_logits` gives, ``[examples, outputs]``.
            temperature: Temperature of the divergence; scores have none.
            alpha: Weight of the teacher; the labels have the rest.
        """
        loss = LabelRegulariser("kd", alpha=alpha, temperature=temperature)
        return self._learning(loss, teacher_logits_transfer)

    def regularised(self, loss: LabelRegulariser, teacher_logits: Tensor | None = None) -> GlueTask:
        """The same task, learning from labels by a regulariser.

        Args:
            loss: The regulariser.
            teacher_logits: What :meth:`train_logits` gives of a teacher, where it needs one.
        """
        require(bool(self.glue.classes), "task", "have classes to regularise", "scores")
        return self._learning(loss, teacher_logits)

    def _learning(self, loss: LabelRegulariser, teacher_logits: Tensor | None) -> GlueTask:
        if loss.needs_teacher:
            shape = (len(self.examples["train"]), len(self.glue.classes) or 1)
            got = None if teacher_logits is None else tuple(teacher_logits.shape)
            contract = f"have shape {shape}, training examples and outputs"
            require(got == shape, "teacher_logits", contract, got)
        other = copy.copy(self)
        other._regulariser, other._teacher_logits = loss, teacher_logits
        return other

    def used_tokens(self) -> Tensor:
        """The token ids that occur in any example, and the padding token; sorted."""
        ids = {token for part in self._encoded.values() for row in part.ids for token in row}
        return torch.tensor(sorted(ids | {self.tokenizer.pad_token_id}))

    def pair(self, step: list[int]) -> tuple[dict[str, Tensor], None]:
        """What a model takes of a batch, and its labels; the batch is its own source."""
        device, part = self.options.runtime.device, self._encoded["train"]
        batch = collate(part.ids, step, self.tokenizer.pad_token_id, device, part.types)
        batch["labels"] = part.labels[step].to(device)
        batch["lengths"] = torch.tensor([len(part.ids[row]) for row in step])
        return batch, None

    def loss(self, model: Any, step: list[int]) -> Tensor:
        """The mean cross-entropy of a batch; of scores the mean squared error."""
        runtime, part = self.options.runtime, self._encoded["train"]
        pad_id = self.tokenizer.pad_token_id
        batch = collate(part.ids, step, pad_id, runtime.device, part.types)
        labels = part.labels[step].to(runtime.device)
        with runtime.autocast(), runtime.training_attention():
            logits = model(**batch).logits
        if self._regulariser is not None:
            taught = self._teacher_logits
            given = None if taught is None else taught[step].to(runtime.device)
            regularised: Tensor = self._regulariser(logits.float(), labels, given)
            return regularised
        if not self.glue.classes:
            return F.mse_loss(logits.float().squeeze(-1), labels)
        loss: Tensor = kdkernels.kd_loss(logits.float(), None, labels)
        return loss

    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        """The task's figures; on ``test`` those of all its scored files."""
        require(split in SPLITS, "split", f"be one of {SPLITS}", repr(split))
        if split == "dev":
            return self._figures(model, "dev", self.glue.parts[0])
        found: dict[str, float] = {}
        for part in self.glue.parts:
            found |= self._figures(model, part or "test", part)
        return found

    def _figures(self, model: Any, part: str, called: str) -> dict[str, float]:
        outputs, labels = self.predict(model, part), self._encoded[part].labels
        said = outputs.argmax(-1) if self.glue.classes else outputs[:, 0]
        return {
            head: FIGURES[figure](said, labels)
            for head, figure in zip(self.glue.heads(called), self.glue.figures, strict=True)
        }

    def predict(self, model: Any, part: str) -> Tensor:
        """The model's fp32 outputs for a part's examples, ``[examples, outputs]``.

        Args:
            model: A model of this task; left in evaluation mode.
            part: One of ``examples``.
        """
        data, pad_id = self._encoded[part], self.tokenizer.pad_token_id
        return train.predict(model, data.ids, self.options.runtime, pad_id, types=data.types)


def glue_task(options: TaskOptions, name: str, folder: Path | None = None) -> GlueTask:
    """A task of GLUE from its published files.

    Args:
        options: Model and limits.
        name: ``cola``, ``sst-2``, ``mrpc``, ``qqp``, ``sts-b``, ``mnli``, ``qnli``, ``rte`` or
            ``wnli``.
        folder: As :func:`kdkernels.api.distill.glue.find_files` takes it; None for ``sts-b``, which
            is then fetched once by checksum, with its published test pairs.
    """
    require(name in TASKS, "task", f"be one of {', '.join(TASKS)}", repr(name))
    if folder is not None:
        return GlueTask(options, TASKS[name], load_glue(name, folder))
    require(name == "sts-b", "data", f"name the folder of GLUE's files for {name}", "none")
    data = load_sts(fetch.fetch(fetch.STS, options.notify))
    return GlueTask(options, TASKS[name], data, [fetch.STS.licence])
