"""Loading, cutting and saving classifiers in the plain transformers format."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
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


def check_model_folder(path: Path, argument: str, max_length: int) -> None:
    """Raises ``DistillError`` unless ``path`` holds a model that reads texts of that length."""
    contract = "be a folder written by save_pretrained (config.json, weights, tokenizer)"
    require((path / "config.json").is_file(), argument, contract, f"{path} without config.json")
    longest = getattr(read_config(path, argument), "max_position_embeddings", max_length)
    require(max_length <= longest, "max-length", f"be at most {longest} for {path}", max_length)


def check_student_layers(teacher: Path, layers: Sequence[int]) -> None:
    """Raises ``DistillError`` unless the teacher in a folder has the layers to cut out."""
    check_layers(read_config(teacher, "teacher"), layers, "student-layers", "teacher")


def check_layers(config: Any, layers: Sequence[int], argument: str, model: str) -> None:
    """Raises ``DistillError`` unless a model of that configuration has the layers to cut out."""
    depth = config.num_hidden_layers
    bad = [layer for layer in layers if not 0 <= layer < depth]
    require(not bad, argument, f"lie in 0..{depth - 1} for this {model}", bad)


def trained_label_names(teacher: Path) -> list[str] | None:
    """The class names of a saved classifier in order; None when it only has numbers for them.

    Raises:
        DistillError: The folder holds no trained classifier.
    """
    config = read_config(teacher, "teacher")
    kinds = config.architectures or []
    trained = any(kind.endswith("ForSequenceClassification") for kind in kinds)
    require(trained, "teacher", "be a saved sequence classifier if teacher-epochs is 0", kinds)
    names = [config.id2label[i] for i in range(config.num_labels)]
    return None if names[0] == "LABEL_0" else names


def read_config(path: Path, argument: str) -> Any:
    """The transformers configuration in a folder."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _not_loadable(path, argument, error) from error


def _not_loadable(
    path: Path, argument: str, error: Exception, kind: str = "a sequence classifier"
) -> DistillError:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return DistillError(
        f"{argument} must be a folder that transformers loads as {kind}, got {path}: {reason}"
    )


def load_classifier(path: Path, label_names: Sequence[str], argument: str, seed: int) -> Classifier:
    """Loads a classifier from a folder; an encoder without a head gets a fresh one.

    Args:
        path: Folder written by ``save_pretrained``.
        label_names: Names of the classes, in the order of their numbers.
        argument: Name of the argument, for error messages.
        seed: Seed of a fresh head.

    Raises:
        DistillError: The folder holds no model that transformers can load as a classifier.
    """
    tokenizer = load_tokenizer(path, argument)
    heading = Heading("AutoModelForSequenceClassification", "a sequence classifier", label_names)
    return Classifier(load_headed(path, heading, argument, seed), tokenizer)


@dataclass(frozen=True)
class Heading:
    """What a model has on top of its encoder.

    Attributes:
        auto: Name of the transformers class that loads such models.
        kind: What they are called in messages, with an article.
        label_names: Names of the classes, in the order of their numbers; empty where the head has
            none to name. The one name of a score, where there are no classes.
        problem: transformers' name of what a sequence classifier learns, ``regression`` for scores;
            None: it goes by the labels.
    """

    auto: str
    kind: str
    label_names: Sequence[str] = ()
    problem: str | None = None


def load_tokenizer(
    path: Path, argument: str, kind: str = "a sequence classifier", pad_with_end: bool = False
) -> Any:
    """Loads the tokenizer in a folder.

    Args:
        path: Folder written by ``save_pretrained``.
        argument: Name of the argument, for error messages.
        kind: What the model is to be, with an article, for error messages.
        pad_with_end: Whether the token that ends a text pads too where there is no other, as GPT's
            has none.

    Raises:
        DistillError: The folder holds none, or one without a padding token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; each means the same to a user
        raise _not_loadable(path, argument, error, kind) from error
    if tokenizer.pad_token_id is None and pad_with_end:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise DistillError(f"{argument} must have a tokenizer with a padding token, got {path}")
    return tokenizer


def load_headed(
    path: Path, heading: Heading, argument: str, seed: int, other_classes: bool = False
) -> Any:
    """Loads a model from a folder; an encoder without the head gets a fresh one.

    Args:
        path: Folder written by ``save_pretrained``.
        heading: The head.
        argument: Name of the argument, for error messages.
        seed: Seed of a fresh head.
        other_classes: Whether a head for another number of classes is replaced, too.

    Raises:
        DistillError: The folder holds no model that transformers can load so.
    """
    import transformers

    names: dict[str, Any] = {}
    if heading.label_names:
        names = {
            "num_labels": len(heading.label_names),
            "id2label": dict(enumerate(heading.label_names)),
            "label2id": {name: i for i, name in enumerate(heading.label_names)},
            "problem_type": heading.problem,
        }
    try:
        model, loaded = getattr(transformers, heading.auto).from_pretrained(
            path,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=other_classes,
            dtype=torch.float32,
            **names,
        )
        other = _other_head(model, loaded["mismatched_keys"])
    except Exception as error:  # as in load_tokenizer
        raise _not_loadable(path, argument, error, heading.kind) from error
    _draw(model, [*loaded["missing_keys"], *other], seed)
    copy_weights(model)
    return model


def _other_head(model: Any, mismatched: Iterable[Any]) -> list[str]:
    """Names of a head's parameters that a folder held in other sizes.

    Raises:
        ValueError: Other parameters, too, are not of the size that the configuration says.
    """
    names = sorted(mismatch[0] for mismatch in mismatched)
    for name in names:
        if name.startswith(f"{model.base_model_prefix}."):
            raise ValueError(f"the weights of {name} do not have the size of its config.json")
    return names


def _draw(model: Any, names: Iterable[str], seed: int) -> None:
    """Draws the weight matrices a folder did not hold, from a generator of their own.

    transformers drew them from the global one, whose state depends on what else was loaded.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = getattr(model.config, "initializer_range", 0.02)
    for name in sorted(names):
        parameter = model.get_parameter(name)
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=scale, generator=generator)


def copy_weights(model: Any) -> None:
    """Moves loaded weights to memory of their own.

    They lie where the file put them, and matrix products round by alignment: copies make a resumed
    run repeat an unbroken one to the last bit.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


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


def layer_paths(model: Any, argument: str) -> list[str]:
    """Names of the modules whose outputs are the hidden states: the embedding, then each layer.

    Raises:
        DistillError: The model is built in another way.
    """
    depth = model.config.num_hidden_layers
    embedding = f"{model.base_model_prefix}.embeddings"
    names = dict(model.named_modules())
    lists = [
        name
        for name, module in names.items()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    good = embedding in names and len(lists) == 1
    contract = f"have a module {embedding} and one list of {depth} layers to match hidden states"
    require(good, argument, contract, type(model).__name__)
    return [embedding, *(f"{lists[0]}.{layer}" for layer in range(depth))]


def vocabulary(path: Path) -> dict[str, int]:
    """The tokens of the tokenizer in a folder, by text."""
    from transformers import AutoTokenizer

    vocab: dict[str, int] = AutoTokenizer.from_pretrained(path, local_files_only=True).get_vocab()
    return vocab


def empty_classifier(path: Path, argument: str, layers: int | None = None) -> Any:
    """The model in a folder without weights, to look at; with so many layers if given."""
    from transformers import AutoModelForSequenceClassification

    config = read_config(path, argument)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:layers]
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)
    except Exception as error:  # as in load_classifier
        raise _not_loadable(path, argument, error) from error


def cut_layers(classifier: Classifier, layers: Sequence[int]) -> Classifier:
    """Returns a smaller classifier made of the chosen layers; weights are copied, not shared.

    Args:
        classifier: The model to cut.
        layers: Layer numbers in the order in which the student stacks them.
    """
    return Classifier(cut_model(classifier.model, layers), classifier.tokenizer)


def cut_model(model: Any, layers: Sequence[int]) -> Any:
    """Returns a copy of a transformers model that has only the chosen layers."""
    cut = copy.deepcopy(model)
    parent, name = _layer_list(cut)
    stack = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(stack[layer] for layer in layers))
    for number, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():  # by which decoders find their keys and values
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = number
    cut.config.num_hidden_layers = len(layers)
    kinds = getattr(cut.config, "layer_types", None)
    if kinds is not None:
        cut.config.layer_types = [kinds[layer] for layer in layers]
    return cut


def disable_dropout(model: Any) -> None:
    """Switches dropout off, in this object only: the saved configuration keeps its rates.

    One trial on the demo (seed 0, dev accuracy): distilled students 77.3 % without dropout and
    76.4 % with it, labels-only students 75.8 % and 75.6 %. Drawing the masks took a sixth of a
    training step on a CPU.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def freeze_embeddings(model: Any) -> None:
    """Stops training the embeddings, most of a small model's weights."""
    embeddings = getattr(model.base_model, "embeddings", None)
    if embeddings is not None:
        embeddings.requires_grad_(False)
