"""Sparse teachers: heads and neurons that neither the teacher nor its student need are cut out."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.api import _sites
from kdkernels.api._files import write_folder
from kdkernels.api._spec import number
from kdkernels.api.methods.structure import KINDS, Layer, layers_of
from kdkernels.api.methods.teacher_scores import TeacherScores, score

__all__ = ["SparseTeacher"]

NAME = "SparseTeacher"
WIDTHS, WEIGHTS = "sparse_teacher.json", "sparse_teacher.safetensors"
# Widths of feed-forward layers are multiples of it.
MULTIPLE = 8
# What configurations call the number of neurons.
NEURONS = ("intermediate_size", "hidden_dim", "n_inner")


class SparseTeacher:
    r"""A teacher whose heads and feed-forward neurons are cut out by score, at any level.

    All heads of all layers are ranked together, and all neurons; at a level ``s`` the lowest
    ``round(s * total)`` of either go. The number of neurons of a layer is then rounded to a
    multiple of 8. What is left is smaller linear layers, their units in descending order of score:
    a higher level is the beginning of a lower one. A sublayer without units is skipped, with the
    output projection's bias, so that only its residual connection and norm stay. Embeddings, norms,
    pooler and classifier are as they were.

    Args:
        model: a model of transformers, changed in place: BERT, RoBERTa, DistilBERT, GPT-2, Llama,
            and others whose layers have the same names (ELECTRA, Mistral, Qwen). Where queries
            share keys and values in groups, the unit is a group: query heads and their one head of
            keys and values. Attention may be of any implementation.
        scores: of :meth:`score`; another model's or a file's where shapes are the same. None for
            a model that is not to be cut further.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: layers of an unknown kind; scores of other numbers of units.

    Note:
        Until :meth:`densify` the full layers are kept beside the cut ones, not as a part of the
        model: move or cast it at level 0 or after ``densify``. Weights trained at a level above 0
        are lost with the next change of level. ``output_attentions`` leaves out layers without
        heads.

        Full layers come back as they were, in their old order, so level 0 gives the same bits as
        the model did. Other levels equal the full model with gates of 0 on what was cut (and no
        output bias where nothing is left), up to the order of sums.

    References:
        Yang et al., Sparse Teachers Can Be Dense with Knowledge, EMNLP 2022, arXiv 2210.03923.

    Example:
        >>> import kdkernels, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(vocab_size=99, hidden_size=16, num_attention_heads=2, intermediate_size=32)
        >>> teacher = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes)).eval()
        >>> student = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **sizes))
        >>> ids = torch.randint(99, (4, 6))
        >>> batches = [{"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}]
        >>> scores = kdkernels.SparseTeacher.score(teacher, batches, student=student)
        >>> sparse = kdkernels.SparseTeacher(teacher, scores)
        >>> sparse.sparsify(0.5)
        >>> sum(heads for heads, _ in sparse.widths), {neurons % 8 for _, neurons in sparse.widths}
        (2, {0})
        >>> logits = teacher(ids).logits  # the model itself is smaller now
        >>> sparse.densify()  # for good
    """

    def __init__(self, model: nn.Module, scores: TeacherScores | None = None) -> None:
        _sites.check_model(NAME, model)
        if scores is not None and not isinstance(scores, TeacherScores):
            raise TypeError(f"{NAME}: scores must be TeacherScores, got {type(scores).__name__}")
        self.model = model
        self._layers = layers_of(NAME, model)
        self._scores = None if scores is None else scores.combined
        for index, kind in enumerate(KINDS if scores is not None else ()):
            found = [len(s) for s in self._scores[kind]]  # type: ignore[index]
            if found != [layer.units[index] for layer in self._layers]:
                raise ValueError(
                    f"{NAME}: scores must have the model's numbers of {kind} "
                    f"{[layer.units[index] for layer in self._layers]}, got {found}"
                )
        self._level, self._dense = 0.0, False

    @staticmethod
    def score(
        model: nn.Module,
        loader: Iterable[Mapping[str, Any]],
        *,
        student: nn.Module | None = None,
        per: str = "batch",
        lam: float = 0.5,
        temperature: float = 2.0,
    ) -> TeacherScores:
        r"""How much two losses depend on each head and each neuron of a classifier or regressor.

        With gates ``xi`` of 1 on the heads' contexts and on the neurons, summed over batches::

            E = | d CE(teacher, labels) / d xi |
            F = | d KD(student, teacher) / d xi |,   KD = T^2 / 2 * soft CE at temperature T
            score = lam * E / (|E| + 1e-7) + (1 - lam) * F / (|F| + 1e-7)

        the norms being those of a layer's heads, or neurons. The student is fixed: F is how much
        what it is taught depends on a unit, with no regard to the sign. One output: squared errors
        in place of both, and ``KD = (student - teacher)^2 / 2``. Both models run in eval mode and
        keep their modes and what requires a gradient.

        Args:
            model: the teacher, as for the class.
            loader: batches, mappings with ``labels`` and the arguments of both models. Held out of
                training, and other than what the level is chosen on.
            student: a trial student of the same classes; None for E alone, with ``lam=1``.
            per: ``batch``: absolute values of a batch's mean gradient, as the released code has
                it, which depend on how examples are put together; ``example``: the sum of those of
                single examples.
            lam: share of expressiveness; ``1`` is pruning by the teacher's own loss. Another one
                costs no further pass: ``scores.at(lam)``.
            temperature: T.

        Returns:
            :class:`TeacherScores`, which can be saved.

        Raises:
            TypeError: arguments of a wrong type.
            ValueError: values out of their ranges, batches without labels, logits that are not
                ``[batch, classes]`` or not the student's.

        Note:
            No gate is in the model: an activation and the gradient at it are enough
            (:func:`~kdkernels.gate_scores`). Weights are frozen, so a batch costs one pass forward,
            two back without the weights' products, three forward passes in all, or two with one or
            two classes, where one pass back gives both gradients.

            Rows of padding, by ``attention_mask``, are left out. In the models named, the gradient
            is zero there in any case, as padding is no key of attention and no logit is read at
            it; a model that pools over padding has a gradient there, which is then not counted.

        References:
            Yang et al., arXiv 2210.03923; Michel et al., arXiv 1905.10650.
        """
        return score(model, loader, student=student, per=per, lam=lam, temperature=temperature)

    @property
    def level(self) -> float:
        """The level that the model has now."""
        return self._level

    @property
    def widths(self) -> list[tuple[int, int]]:
        """Heads (groups of them where queries are grouped) and neurons of each layer now."""
        return [layer.kept for layer in self._layers]

    @property
    def plain(self) -> bool:
        """Whether transformers alone can load what :meth:`save_pretrained` writes now."""
        return _plain_config(self.model, self._layers) is not None

    @torch.no_grad()
    def sparsify(self, level: float) -> None:
        """Gives the model another level, from the full one: levels may go up and down.

        Args:
            level: share of heads and of neurons to cut, in [0, 1]; 0 is the full model, to the bit.

        Raises:
            ValueError: a level out of its range; no scores.
            RuntimeError: after :meth:`densify`.
        """
        number(NAME, "level", level, 0.0, 1.0)
        if self._dense:
            raise RuntimeError(f"{NAME}: sparsify must be called before densify, got a later call")
        if level > 0 and self._scores is None:
            raise ValueError(f"{NAME}: scores must be given to sparsify, got None")
        kept = {kind: _kept(self._scores[kind], level) for kind in KINDS} if self._scores else {}
        for index, layer in enumerate(self._layers):
            chosen: dict[str, Tensor] = {}
            for which, kind in enumerate(KINDS if kept else ()):
                full, count = layer.units[which], kept[kind][index]
                if kind == "neurons" and count < full:
                    count = min(MULTIPLE * round(count / MULTIPLE), full)
                if level > 0:
                    order = self._scores[kind][index]  # type: ignore[index]
                    chosen[kind] = order.argsort(descending=True, stable=True)[:count]
            layer.narrow(**chosen)
        self._level = float(level)

    def densify(self) -> None:
        """Makes the level permanent: what has been cut away is let go of, and its memory."""
        for layer in self._layers:
            layer.forget()
        self._scores, self._dense = None, True

    def save_pretrained(self, directory: Path | str, *, overwrite: bool = False) -> None:
        """Writes the model as it is now, whole or not at all; the tokenizer is the caller's.

        Where all layers have the same widths and the configuration has a word for them
        (:attr:`plain`), that is an ordinary folder, which transformers alone can load. BERT,
        RoBERTa, DistilBERT and GPT-2 have none for heads (the size of a head follows from their
        number), and no architecture has one for widths that differ, as they do after a ranking of
        all layers: then the weights are in ``sparse_teacher.safetensors``, with the widths in
        ``sparse_teacher.json``, and only :meth:`from_pretrained` can load them; transformers says
        that it finds no weights.

        Args:
            directory: the folder, new or empty.
            overwrite: whether one that is not may be replaced.

        Raises:
            FileExistsError: files are there and may not be replaced.
            ValueError: a class of model that transformers does not have.
        """
        import transformers

        model: Any = _sites.unwrapped(self.model)
        kind = type(model).__name__
        if getattr(transformers, kind, None) is not type(model):
            raise ValueError(f"{NAME}: model must be of a class of transformers, got {kind}")
        config = _plain_config(model, self._layers)
        about = {
            "model": kind,
            "plain": config is not None,
            "level": self._level,
            "widths": [dict(zip(KINDS, kept, strict=True)) for kept in self.widths],
        }

        def write(folder: Path) -> None:
            (folder / WIDTHS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            if config is None:
                from safetensors.torch import save_model

                model.config.save_pretrained(folder)
                save_model(model, str(folder / WEIGHTS))
                return
            own, model.config = model.config, config
            try:
                model.save_pretrained(folder)
            finally:
                model.config = own

        write_folder(Path(directory), write, overwrite=overwrite)

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> SparseTeacher:
        """Loads what :meth:`save_pretrained` wrote, in eval mode; its level is permanent.

        Args:
            directory: the folder.

        Raises:
            ValueError: no folder of this kind, or weights that do not fit its widths.
        """
        import transformers

        folder = Path(directory)
        try:
            about = json.loads((folder / WIDTHS).read_text(encoding="utf-8"))
            kind = getattr(transformers, about["model"])
            widths = [tuple(entry[kind] for kind in KINDS) for entry in about["widths"]]
            plain, level = about["plain"], float(about["level"])
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{NAME}: directory must hold {WIDTHS} of save_pretrained, got {folder}: {error}; "
                "transformers loads other models"
            ) from error
        if plain:
            teacher = cls(kind.from_pretrained(folder))
        else:
            teacher = cls(kind(transformers.AutoConfig.from_pretrained(folder)).eval())
            if len(widths) != len(teacher._layers):
                raise ValueError(
                    f"{NAME}: widths must be those of {len(teacher._layers)} layers, got "
                    f"{len(widths)}"
                )
            for layer, width in zip(teacher._layers, widths, strict=True):
                layer.narrow(*(torch.arange(count) for count in width))
            _load(teacher.model, folder)
        teacher._level = level
        teacher.densify()
        return teacher


def _kept(scores: Sequence[Tensor], level: float) -> list[int]:
    """How many units of each layer are left when the lowest of all go."""
    sizes = [len(each) for each in scores]
    left = torch.ones(sum(sizes), dtype=torch.bool)
    left[torch.cat(list(scores)).argsort(stable=True)[: round(level * sum(sizes))]] = False
    return [int(part.sum()) for part in left.split(sizes)]


def _plain_config(model: Any, layers: Sequence[Layer]) -> Any:
    """The configuration of the model at its widths, or None where there is none."""
    widths = {layer.kept for layer in layers}
    if len(widths) > 1 or 0 in layers[0].kept:
        return None
    heads, neurons = layers[0].kept
    config: Any = copy.deepcopy(_sites.unwrapped(model).config)
    shared: Any = getattr(config, "num_key_value_heads", None)
    units = shared or config.num_attention_heads
    if heads != units:
        if getattr(config, "head_dim", None) is None:
            return None
        config.num_attention_heads = config.num_attention_heads // units * heads
        if shared:
            config.num_key_value_heads = heads
    key = next((key for key in NEURONS if hasattr(config, key)), None)
    if key is None:
        return None
    setattr(config, key, neurons)
    return config


def _load(model: Any, folder: Path) -> None:
    """Weights of their own dtypes into a model of the right widths; tied ones are stored once."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / WEIGHTS)
        names = dict(model.named_parameters(remove_duplicate=False))
        stored = {id(names[key]): x for key, x in state.items() if key in names}
        state |= {key: stored[id(p)] for key, p in names.items() if id(p) in stored}
        model.load_state_dict(state, assign=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{NAME}: {WEIGHTS} must hold weights of the widths in {WIDTHS}, got {folder}: {error}"
        ) from error
    if hasattr(model, "tie_weights"):
        model.tie_weights()
