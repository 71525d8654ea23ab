"""Loading, cutting and saving classifiers in the plain transformers format."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdkernels.api.distill.errors import DistillError, require


@dataclass
class Classifier:
    """A sequence classifier with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def parameters(self) -> int:
        """Number of parameters, frozen ones included."""
        return sum(p.numel() for p in self.model.parameters())

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer into an existing folder, as plain transformers files."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def check_model_folder(path: Path, argument: str) -> None:
    """Raises ``DistillError`` unless ``path`` looks like a saved transformers model."""
    contract = "be a folder written by save_pretrained (config.json, weights, tokenizer)"
    require(path.is_dir(), argument, contract, f"{path}, which is no folder")
    require((path / "config.json").is_file(), argument, contract, f"{path} without config.json")


def load_classifier(path: Path, label_names: Sequence[str], argument: str) -> Classifier:
    """Loads a classifier from a folder; an encoder without a head gets a fresh one.

    A fresh head is drawn from torch's global generator: seed it first.

    Args:
        path: Folder written by ``save_pretrained``.
        label_names: Names of the classes, in the order of their numbers.
        argument: Name of the argument, for error messages.

    Raises:
        DistillError: The folder holds no model that transformers can load as a classifier.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    check_model_folder(path, argument)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(
            path,
            local_files_only=True,
            num_labels=len(label_names),
            id2label=dict(enumerate(label_names)),
            label2id={name: i for i, name in enumerate(label_names)},
            dtype=torch.float32,
        )
    except Exception as error:  # transformers raises many kinds here; each means the same to a user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DistillError(
            f"{argument} must be a folder that transformers loads as a sequence classifier, "
            f"got {path}: {reason}"
        ) from error
    if tokenizer.pad_token_id is None:
        raise DistillError(f"{argument} must have a tokenizer with a padding token, got {path}")
    return Classifier(model, tokenizer)


def _layer_list(model: Any) -> tuple[nn.Module, str]:
    """Finds the transformer stack: the module holding the list of layers, and its name there."""
    depth = model.config.num_hidden_layers
    for module in model.base_model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return module, name
    raise DistillError(
        f"teacher must have one list of {depth} layers to cut a student from, "
        f"got {type(model).__name__}; name a ready student with --student"
    )


def cut_layers(classifier: Classifier, layers: Sequence[int]) -> Classifier:
    """Returns a smaller classifier made of the chosen layers; weights are copied, not shared.

    Args:
        classifier: The model to cut.
        layers: Layer numbers in the order in which the student stacks them.
    """
    model = copy.deepcopy(classifier.model)
    parent, name = _layer_list(model)
    stack = getattr(parent, name)
    highest = len(stack) - 1
    bad = [layer for layer in layers if not 0 <= layer <= highest]
    require(not bad, "student-layers", f"lie in 0..{highest} for this teacher", bad)
    setattr(parent, name, nn.ModuleList(stack[layer] for layer in layers))
    model.config.num_hidden_layers = len(layers)
    return Classifier(model, classifier.tokenizer)


def freeze_embeddings(model: Any) -> None:
    """Stops training the embeddings, half of a small model's weights and of a step's time."""
    embeddings = getattr(model.base_model, "embeddings", None)
    if embeddings is not None:
        embeddings.requires_grad_(False)
