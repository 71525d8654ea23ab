"""What a student learns from: a model on this or another device, or what one said before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.api import _sites
from kdkernels.api.cache import TeacherCache
from kdkernels.api.capture import Capture
from kdkernels.api.hf import head as heads
from kdkernels.api.hf.head import Head

__all__ = ["CachedTeacher", "Signals", "Teacher", "prepare_teacher"]

NAME = "prepare_teacher"
# What a model may call its logits, and the labels of each.
LOGITS = {"logits": "labels", "start_logits": "start_positions", "end_logits": "end_positions"}
LABELS = {*LOGITS.values(), "shift_labels", "num_items_in_batch"}


class Signals(NamedTuple):
    """What a teacher says about a batch; the tensors are on its device and need no gradient."""

    hidden: Tensor | None = None  # [batch, tokens, width], what its head gets
    head: Head | None = None
    logits: Mapping[str, Tensor] | None = None  # by the names they have in the model's output
    topk: tuple[Tensor, Tensor] | None = None  # ids and log-probabilities, [batch, tokens, k]
    layers: tuple[Tensor, ...] = ()  # [batch, tokens, width] each


class Teacher:
    """A frozen model that answers with what a loss needs of it; see :func:`prepare_teacher`.

    Args:
        model: in evaluation mode, its parameters without gradients.

    Attributes:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        _sites.check_model(NAME, model)
        self.model = model
        parameters = inspect.signature(heads.core(model).forward).parameters
        self._any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._names = set(parameters)
        self._checked = False
        self._copy: tuple[Any, Head] | None = None

    @property
    def device(self) -> torch.device:
        """Where its inputs must be."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def __call__(
        self, inputs: Mapping[str, Any], *, route: str = "hidden", layers: Sequence[str] = ()
    ) -> Signals:
        """Runs the model on a batch as it was given to the student.

        Args:
            inputs: arguments of the student's forward pass: padding, packing and positions are so
                the same. Labels, and what this model does not know, are left out.
            route: ``hidden``: what the head gets, and the head; logits are not computed.
                ``logits``: logits.
            layers: paths of modules whose outputs are wanted as well.

        Returns:
            :class:`Signals`, without ``topk``.

        Raises:
            ValueError: a head that cannot be read, or logits that are more than its output.
            RuntimeError: the head did not run.
        """
        given = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
            if name not in LABELS and (self._any or name in self._names)
        }
        if "use_cache" in self._names:
            given["use_cache"] = False
        recorded: list[Tensor] = []
        head = self._head(given) if route == "hidden" else None
        with ExitStack() as stack:
            seen = stack.enter_context(Capture(self.model, layers)) if layers else None
            if head is not None:
                record = partial(_record, recorded)
                stack.enter_context(heads.answering(head, record, "teacher"))
            outputs = self.model(**given)
        found = () if seen is None else tuple(x.detach() for x in seen.values())
        if route == "hidden":
            return Signals(recorded[0], self._whole_head(), layers=found)
        return Signals(logits=logits_of(outputs), layers=found)

    def _head(self, given: Mapping[str, Any]) -> nn.Module:
        """The head, which must answer for the model."""
        head = heads.find_head(self.model, "teacher")
        if not self._checked:
            heads.check_logits(self.model, head, given, "teacher")
            self._checked = True
        return head

    def _whole_head(self) -> Head:
        head: Any = heads.find_head(self.model, "teacher")
        with heads.whole([head.weight, getattr(head, "bias", None)]) as (weight, bias):
            assert weight is not None
            detached = None if bias is None else bias.detach()
            return Head(weight.detach(), detached, *heads.logit_options(self.model))

    def head_on(self, device: torch.device, head: Head) -> Head:
        """A head where the student is; of a teacher elsewhere it is copied once."""
        if head.weight.device == device:
            return head
        now = (device, head.weight.data_ptr(), head.weight._version)
        if self._copy is None or self._copy[0] != now:
            weight, bias = (
                None if x is None else x.to(device, non_blocking=True)
                for x in (head.weight, head.bias)
            )
            assert weight is not None
            self._copy = now, head._replace(weight=weight, bias=bias)
        return self._copy[1]


def prepare_teacher(
    model: nn.Module,
    accelerator: Any = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    shard: bool = False,
) -> Teacher:
    """Freezes a model and puts it where a student can learn from it.

    Evaluation mode, no gradients, and no DistributedDataParallel: there is nothing to be
    synchronised. The trainer does this by itself for a bare model; call it for another device, for
    16 bits or to shard it.

    Args:
        model: of transformers, changed in place. Quantised ones, and those that were placed by a
            ``device_map``, stay where they are; their head must not be quantised.
        accelerator: of ``accelerate``: the model goes to its device.
        device: where it goes instead, e.g. another GPU. Hidden states are then copied to the
            student's device while both work, its head is copied once.
        dtype: cast its floats, e.g. to ``torch.bfloat16``.
        shard: shard the layers and the rest over all processes by ``fully_shard`` (FSDP2). Its head
            is gathered once a step. A model that is sharded already, also by DeepSpeed's ZeRO-3, is
            taken as it is.

    Returns:
        The :class:`Teacher`, for ``DistillTrainer(teacher=...)`` or a loop of one's own.

    Raises:
        TypeError: no module.
        ValueError: a quantised model that is to be cast or sharded.

    Example:
        >>> import torch, transformers
        >>> from kdkernels.api.hf import prepare_teacher
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        >>> config = transformers.LlamaConfig(vocab_size=9, num_hidden_layers=1, **sizes)
        >>> teacher = prepare_teacher(transformers.LlamaForCausalLM(config), dtype=torch.bfloat16)
        >>> signals = teacher({"input_ids": torch.arange(8).view(2, 4)})
        >>> signals.hidden.shape, signals.head.weight.shape
        (torch.Size([2, 4, 8]), torch.Size([9, 8]))
    """
    _sites.check_model(NAME, model)
    fixed = bool(getattr(model, "is_quantized", False))
    for argument, value in (("dtype", dtype), ("shard", shard or None)):
        if fixed and value is not None:
            raise ValueError(f"{NAME}: {argument} must not be given for a quantised model")
    model.requires_grad_(False)
    model.eval()
    if dtype is not None:
        model.to(dtype)
    if device is None and accelerator is not None:
        device = accelerator.device
    placed = fixed or getattr(model, "hf_device_map", None) is not None or _sharded(model)
    if device is not None and not placed:
        model.to(device)
    if shard and not _sharded(model):
        _shard(model)
    return Teacher(model)


def _sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "ds_id") or heads.is_sharded(p) for p in model.parameters())


def _shard(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = next(model.parameters()).device.type
    mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
    for path in _sites.layers_of(NAME, "model", model):
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)


def _record(recorded: list[Tensor], original: Callable[..., Any], hidden: Tensor) -> Tensor:
    recorded.append(hidden.detach())
    return heads.one_column(hidden.new_zeros(()), hidden)


def logits_of(outputs: Any) -> dict[str, Tensor]:
    """The logits among a model's outputs."""
    found = {name: outputs[name].detach() for name in LOGITS if outputs.get(name) is not None}
    if not found:
        raise ValueError(
            f"DistillMixin: teacher must give {', '.join(LOGITS)}, got only {', '.join(outputs)}"
        )
    return found


class CachedTeacher:
    """What a teacher said, looked up in a cache by the tokens of each example, or its id.

    Args:
        cache: of a causal language model: row t is the prediction of token t + 1.
        temperature: of the distillation; the cache's must be the same.

    Raises:
        ValueError: a cache of another temperature or kind.
    """

    # Name of the batch's entry of example ids; without it examples are found by their tokens.
    IDS = "example_id"

    def __init__(self, cache: TeacherCache, temperature: float) -> None:
        wanted = {"temperature": float(temperature), "shift": 1}
        cache.manifest.require("DistillMixin", cache.path, wanted)
        self.cache = cache

    def __call__(self, inputs: Mapping[str, Any]) -> Signals:
        """Finds each example of a batch, padded at either side or packed.

        Args:
            inputs: ``input_ids`` ``[batch, tokens]``; ``attention_mask``, if there is padding;
                ``position_ids``, if rows hold several examples, each of which begins with 0;
                ``example_id``, an id for each example in this order, if ids are to be used.

        Returns:
            :class:`Signals` with ``topk`` only, on the device of the tokens.

        Raises:
            MissingExampleError: an example is not in the cache.
            ValueError: it was stored with other tokens.
        """
        tokens: Tensor = inputs["input_ids"]
        names: Any = inputs.get(self.IDS)
        ids = iter(names.tolist() if isinstance(names, Tensor) else names or ())
        mask, positions = (
            None if inputs.get(name) is None else inputs[name].expand(tokens.shape).cpu()
            for name in ("attention_mask", "position_ids")
        )
        k = self.cache.manifest.k
        found = torch.full((*tokens.shape, k), -1, dtype=torch.int64)
        logprobs = torch.full((*tokens.shape, k), -torch.inf)
        for row, sequence in enumerate(tokens.cpu()):
            places = torch.arange(len(sequence))
            if mask is not None:
                places = places[mask[row] != 0]
            starts = torch.zeros(1, dtype=torch.int64)
            if positions is not None:
                starts = (positions[row][places] == 0).nonzero().flatten()
            for part in places.tensor_split(starts[1:]):
                example = sequence[part]
                key = self.cache.find(example) if names is None else next(ids)
                found[row, part], logprobs[row, part] = self.cache.get(key, example)
        device = tokens.device
        return Signals(
            topk=(found.to(device, non_blocking=True), logprobs.to(device, non_blocking=True))
        )
