"""What the tasks over encoders share: model, tokenizer, and how much of the data is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from kdkernels.api.distill import fetch, lm_models, models
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.models import Heading
from kdkernels.api.distill.task import TaskOptions
from kdkernels.api.distill.text import training_batches

Item = TypeVar("Item")


class EncoderTask:
    """A pretrained encoder with a head; what is learnt from is up to the tasks."""

    def __init__(self, options: TaskOptions, heading: Heading, licences: Sequence[str]) -> None:
        models.check_model_folder(options.model, "model", options.max_length)
        if options.layers is not None:
            require(len(options.layers) > 0, "layers", "name at least one layer", "none")
            config = models.read_config(options.model, "model")
            models.check_layers(config, options.layers, "layers", "model")
        self.options = options
        self.heading = heading
        self.licences: Sequence[str] = [*model_licences(options.model), *licences]
        self.tokenizer = models.load_tokenizer(
            options.model, "model", heading.kind, pad_with_end=True
        )

    def new_model(self, seed: int) -> Any:
        """The pretrained model before training; its head depends on the seed alone."""
        options = self.options
        model = models.load_headed(options.model, self.heading, "model", seed, other_classes=True)
        if options.layers is not None:
            model = models.cut_model(model, options.layers)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return self.ready(model)

    def ready(self, model: Any) -> Any:
        """A model as it is trained: without dropout, its embeddings frozen unless they are not."""
        models.disable_dropout(model)
        if not self.options.train_embeddings:
            models.freeze_embeddings(model)
        return model.to(self.options.runtime.device)

    def save(self, model: Any, folder: Path) -> None:
        """Writes model and tokenizer, as plain transformers files, into an existing folder."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def model_licences(folder: Path) -> list[str]:
    """The licence of a model out of the download cache; nothing is known of others."""
    known = {fetch.teacher_path(): fetch.TEACHER, lm_models.smollm2_path(): fetch.SMOLLM2}
    found = [archive for path, archive in known.items() if path.resolve() == folder.resolve()]
    return [archive.licence for archive in found]


def first(items: Sequence[Item], count: int | None, argument: str, what: str) -> list[Item]:
    """The first ``count`` examples, all for None.

    Raises:
        DistillError: There are none, or not so many.
    """
    require(len(items) > 0, "data", f"have {argument} {what}", "none")
    if count is not None:
        contract = f"lie in 1..{len(items)}, the {argument} {what} there are"
        require(1 <= count <= len(items), argument, contract, count)
    return list(items[:count])


def held_out(count: int, share: float, what: str) -> int:
    """How many of ``count`` training examples a share of them is.

    Raises:
        DistillError: That is none, or all.
    """
    found = round(share * count)
    contract = f"leave out some of {count} training {what}, and not all"
    require(0 < found < count, "held-out", contract, f"{found} of them")
    return found


def batches(lengths: Sequence[int], epochs: int, batch_size: int, seed: int) -> list[list[int]]:
    """Rows of similar length for all steps of all epochs; the order depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[int]] = []
    for _ in range(epochs):
        steps += training_batches(lengths, batch_size, generator)
    return steps


def pad(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> torch.Tensor:
    """Pads rows of numbers to the longest of them, int64 ``[rows, longest]``."""
    longest = max(len(row) for row in rows)
    padded = [[*row, *[value] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, device=device)
