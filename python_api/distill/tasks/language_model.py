"""Language modelling: the next token, by a model of some layers of a pretrained one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kdkernels.api.distill import fetch, lm_models, lm_train, models
from kdkernels.api.distill.errors import require
from kdkernels.api.distill.lm_data import WIKITEXT2_NAME, Block, lm_blocks, spread
from kdkernels.api.distill.lm_train import LmLoss, Source
from kdkernels.api.distill.task import SPLITS, TaskOptions
from kdkernels.api.distill.tasks.encoder import model_licences

# Our names of the splits that evaluate, and the text's.
TEXT_SPLIT = {"train": "train", "dev": "valid", "test": "test"}


class LanguageModelTask:
    """A text as blocks of ``options.max_length`` tokens; a step is a batch of blocks.

    Attributes:
        blocks: The blocks of each split, spread evenly over the text.
    """

    metric = "perplexity"
    higher_is_better = False

    def __init__(
        self,
        options: TaskOptions,
        text: str = WIKITEXT2_NAME,
        tokens: int | None = None,
        dev_tokens: int | None = None,
        test_tokens: int | None = None,
    ) -> None:
        """Loads the model and tokenises the text.

        Args:
            options: Model, its layers and the length of blocks; the numbers of examples are
                numbers of blocks.
            text: ``wikitext-2``, fetched once by checksum, or a UTF-8 text file.
            tokens: Number of training tokens instead of ``options.train``; None for all.
            dev_tokens: The same for ``options.dev``.
            test_tokens: The same for ``options.test``.
        """
        whole, self.tokenizer = lm_models.load_causal_lm(str(options.model), options.notify)
        longest = getattr(whole.config, "max_position_embeddings", options.max_length)
        contract = f"be at most {longest} for {options.model}"
        require(options.max_length <= longest, "max-length", contract, options.max_length)
        lm_models.check_head(whole, "model")
        if options.layers is not None:
            require(len(options.layers) > 0, "layers", "name at least one layer", "none")
            models.check_layers(whole.config, options.layers, "layers", "model")
            whole = models.cut_model(whole, options.layers)
        models.disable_dropout(whole)
        self._start = whole
        self.options = options
        texts = [fetch.WIKITEXT2.licence] if text == WIKITEXT2_NAME else []
        self.licences: Sequence[str] = [*model_licences(options.model), *texts]
        self.blocks = {
            "train": self._blocks(text, "train", options.train, tokens),
            "dev": self._blocks(text, "dev", options.dev, dev_tokens),
            "test": self._blocks(text, "test", options.test, test_tokens),
        }
        counts = {name: len(part) * options.max_length for name, part in self.blocks.items()}
        self.source = (
            f"{'WikiText-2 (raw)' if text == WIKITEXT2_NAME else Path(text).name}: "
            f"{counts['train']:,} training, {counts['dev']:,} dev and {counts['test']:,} test "
            f"tokens in blocks of {options.max_length}"
        )
        self._loss = LmLoss(Source(), "hidden", 1.0, 0.0, options.runtime)

    def _blocks(self, text: str, split: str, count: int | None, tokens: int | None) -> list[Block]:
        options, length = self.options, self.options.max_length
        if tokens is not None:
            require(count is None, split, "be left out where a number of tokens is given", count)
            count = tokens // length
        every = lm_blocks(text, self.tokenizer, TEXT_SPLIT[split], length, notify=options.notify)
        if count is None:
            return every
        contract = f"lie in 1..{len(every)} blocks of {length} tokens for {split}"
        require(1 <= count <= len(every), split, contract, count)
        return spread(every, count)

    def new_model(self, seed: int) -> Any:
        """The pretrained model's layers; nothing in it is new, so every seed gives the same."""
        model = copy.deepcopy(self._start).requires_grad_(True)
        if not self.options.train_embeddings:
            lm_models.freeze_embeddings(model)
        return model.to(self.options.runtime.device)

    def schedule(self, epochs: int, batch_size: int, seed: int) -> list[list[Block]]:
        """All batches of all epochs; the order depends on the seed alone."""
        return lm_train.schedule(self.blocks["train"], batch_size, epochs, seed)

    def size(self, step: list[Block]) -> int:
        """The number of blocks."""
        return len(step)

    def tokens(self, step: list[Block]) -> int:
        """The number of tokens."""
        return sum(len(tokens) for _, tokens in step)

    def loss(self, model: Any, step: list[Block]) -> Tensor:
        """The mean cross-entropy of the tokens after the first of each block."""
        return self._loss(model, step)

    def evaluate(self, model: Any, split: str) -> dict[str, float]:
        """The perplexity on ``dev`` or ``test``."""
        require(split in SPLITS, "split", f"be one of {SPLITS}", repr(split))
        return {self.metric: lm_train.perplexity(model, self.blocks[split], self.options.runtime)}

    def save(self, model: Any, folder: Path) -> None:
        """Writes model and tokenizer, as plain transformers files, into an existing folder."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
