"""Masked language modelling: an encoder that finds hidden tokens of lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.api import _sites
from kdkernels.api.distill import fetch
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.lm_data import WIKITEXT2_NAME
from kdkernels.api.distill.lm_train import head_precision
from kdkernels.api.distill.mlm_data import EVALUATION_SEED, hide, mlm_sequences, partners
from kdkernels.api.distill.models import Heading
from kdkernels.api.distill.task import SPLITS, TaskOptions
from kdkernels.api.distill.tasks.encoder import EncoderTask, batches, first, pad
from kdkernels.api.distill.text import collate, inference_batches
from kdkernels.api.distill.train import INFERENCE_BATCH

# Our names of the splits, and the text's.
TEXT_SPLIT = {"train": "train", "dev": "valid", "test": "test"}
PROBABILITY = 0.15
IGNORED = -100


@dataclass(frozen=True)
class MlmStep:
    """Sequences of a step.

    Attributes:
        rows: Their numbers.
        seed: Of the tokens that are hidden.
    """

    rows: list[int]
    seed: int


class MaskedLmTask(EncoderTask):
    """Lines of a text with hidden tokens; the sequences of a split are drawn at random from it.

    Attributes:
        sequences: Token ids of the sequences of each split.
    """

    metric = "masked perplexity"
    higher_is_better = False

    def __init__(self, options: TaskOptions, text: str = WIKITEXT2_NAME) -> None:
        """Tokenises the text.

        Args:
            options: Model and limits; the numbers of examples are numbers of sequences.
            text: As :func:`kdkernels.api.distill.mlm_data.mlm_sequences` takes it.
        """
        licences = [fetch.WIKITEXT2.licence] if text == WIKITEXT2_NAME else []
        heading = Heading("AutoModelForMaskedLM", "a masked language model")
        super().__init__(options, heading, licences)
        contract = "have a tokenizer with a mask token"
        require(self.tokenizer.mask_token_id is not None, "model", contract, options.model)
        wanted = {"train": options.train, "dev": options.dev, "test": options.test}
        self.sequences = {
            split: self._sequences(text, split, count) for split, count in wanted.items()
        }
        self._partners = partners(len(self.sequences["train"]), EVALUATION_SEED)
        self._hidden = {
            split: hide(
                self.sequences[split],
                self.tokenizer,
                PROBABILITY,
                torch.Generator().manual_seed(EVALUATION_SEED),
            )
            for split in SPLITS
        }
        counts = {split: f"{len(part):,}" for split, part in self.sequences.items()}
        tokens = sum(map(len, self.sequences["train"]))
        self.source = (
            f"{'WikiText-2 (raw)' if text == WIKITEXT2_NAME else Path(text).name}: "
            f"{counts['train']} training, {counts['dev']} dev and {counts['test']} test sequences "
            f"of up to {options.max_length} tokens, {tokens:,} tokens to train on"
        )

    def _sequences(self, text: str, split: str, count: int | None) -> list[list[int]]:
        options = self.options
        name = TEXT_SPLIT[split]
        every = mlm_sequences(text, self.tokenizer, name, options.max_length, options.notify)
        order = torch.randperm(
            len(every), generator=torch.Generator().manual_seed(EVALUATION_SEED)
        ).tolist()
        return first([every[row] for row in order], count, split, "sequences")

    def schedule(self, epochs: int, batch_size: int, seed: int) -> list[MlmStep]:
        """All steps of all epochs; order and hidden tokens depend on the seed alone."""
        lengths = [len(ids) for ids in self.sequences["train"]]
        steps = batches(lengths, epochs, batch_size, seed)
        # Another seed for every step of every training.
        return [MlmStep(rows, seed * len(steps) + place) for place, rows in enumerate(steps)]

    def size(self, step: MlmStep) -> int:
        """The number of sequences."""
        return len(step.rows)

    def tokens(self, step: MlmStep) -> int:
        """The number of tokens, without padding."""
        return sum(len(self.sequences["train"][row]) for row in step.rows)

    def pair(self, step: MlmStep) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The base of a step with its labels, and the source: each sequence's fixed partner.

        The partner is cut to the longest sequence of the base; both have tokens hidden.
        """
        generator = torch.Generator().manual_seed(step.seed)
        ids = self.sequences["train"]
        longest = max(len(ids[row]) for row in step.rows)
        others = [ids[partner][:longest] for partner in self._partners[step.rows].tolist()]
        base = self._batch([ids[row] for row in step.rows], generator)
        source = self._batch(others, generator)
        del source["labels"]
        return base, source

    def _batch(
        self, rows: Sequence[Sequence[int]], generator: torch.Generator
    ) -> dict[str, Tensor]:
        inputs, labels = hide(rows, self.tokenizer, PROBABILITY, generator)
        return self._padded(inputs, labels, range(len(rows)))

    def _padded(
        self, inputs: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> dict[str, Tensor]:
        device = self.options.runtime.device
        batch = collate(inputs, rows, self.tokenizer.pad_token_id, device)
        batch["labels"] = pad([labels[row] for row in rows], IGNORED, device)
        batch["lengths"] = torch.tensor([len(inputs[row]) for row in rows])
        return batch

    def loss(self, model: Any, step: MlmStep) -> Tensor:
        """The mean cross-entropy of the hidden tokens."""
        generator = torch.Generator().manual_seed(step.seed)
        batch = self._batch([self.sequences["train"][row] for row in step.rows], generator)
        return self._cross_entropy(model, batch, "mean")

    def _cross_entropy(self, model: Any, batch: dict[str, Tensor], reduction: str) -> Tensor:
        """Of the hidden tokens."""
        runtime = self.options.runtime
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        head = model.get_output_embeddings()
        # The head hands on what it gets; its products are of the hidden tokens alone.
        passing = _sites.replaced("MaskedLmTask", head, lambda original: lambda states: states)
        with passing, runtime.autocast(), runtime.training_attention():
            states = model(**given).logits
        if runtime.device.type == "cpu":
            states = states.float()
        with head_precision(runtime):
            loss: Tensor = kdkernels.linear_kd_loss(
                states,
                head.weight,
                None,
                None,
                batch["labels"],
                student_bias=head.bias,
                ignore_index=IGNORED,
                reduction=reduction,
            )
        return loss

    @torch.inference_mode()
    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        """The perplexity of hidden tokens, the same ones for every model."""
        require(split in SPLITS, "split", f"be one of {SPLITS}", repr(split))
        model.to(self.options.runtime.device).eval()
        inputs, labels = self._hidden[split]
        total, count = 0.0, 0
        for rows in inference_batches([len(ids) for ids in inputs], INFERENCE_BATCH):
            batch = self._padded(inputs, labels, rows)
            total += self._cross_entropy(model, batch, "sum").item()
            count += int((batch["labels"] != IGNORED).sum())
        mean = torch.tensor(total / count, dtype=torch.float64)
        return {self.metric: float(mean.exp())}
