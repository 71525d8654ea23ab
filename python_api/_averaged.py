"""What of a model is averaged: each tensor once, under the name it has without wrappers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# The child by which a wrapper of any kind holds its module; "module" may be a child of anything.
_CHILDREN = ("_orig_mod", "_checkpoint_wrapped_module")


def _is(x: object, module: str, name: str) -> bool:
    """``isinstance``, without importing the class: that takes seconds, and where nobody has done it
    there are no instances.
    """
    return isinstance(x, getattr(sys.modules.get(f"torch.distributed.{module}"), name, ()))


def is_sharded(tensor: Tensor) -> bool:
    return _is(tensor, "tensor", "DTensor")


class Entry(NamedTuple):
    """A parameter or buffer, by its place: ``load_state_dict(assign=True)`` puts others there."""

    name: str
    module: nn.Module
    key: str
    buffer: bool = False

    def tensor(self) -> Tensor:
        """What is there now."""
        places = self.module._buffers if self.buffer else self.module._parameters
        return places[self.key]  # type: ignore[return-value]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that users wrote, without DistributedDataParallel, torch.compile and the like."""
    while True:
        if isinstance(module, DistributedDataParallel | nn.DataParallel):
            module = module.module
            continue
        name = next((name for name in _CHILDREN if name in module._modules), None)
        if name is None:
            return module
        module = getattr(module, name)


def entries(model: nn.Module, *, unique: bool = True) -> Iterator[Entry]:
    """Parameters and buffers, without empty places; of tied ones the first."""
    seen: set[Any] = set()
    for name, module in _modules(model, "", {} if unique else None):
        kinds = (module._parameters, False), (module._buffers, True)
        for places, buffer in kinds:
            for key, tensor in places.items():
                if tensor is None or (unique and _same(tensor) in seen):
                    continue
                seen.add(_same(tensor))
                yield Entry(f"{name}{key}", module, key, buffer)


def _same(tensor: Tensor) -> Any:
    """Equal for tied tensors, also those of ``a.data = b.data``."""
    storage = local(tensor)
    if storage.numel() == 0 or storage.device.type == "meta":
        return id(tensor)
    return storage.device, storage.data_ptr(), storage.dtype, storage.shape, storage.stride()


def _modules(
    module: nn.Module, prefix: str, seen: dict[nn.Module, None] | None
) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if seen is not None:
        if module in seen:
            return
        seen[module] = None
    if _is(module, "fsdp", "FullyShardedDataParallel"):
        raise TypeError(
            "WeightAverager: model must be sharded by fully_shard (FSDP2), got "
            f"FullyShardedDataParallel at {prefix.rstrip('.') or 'its root'}"
        )
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{prefix}{name}.", seen)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here; any other as it is."""
    # First what thousands of tensors are asked for at every update.
    if type(tensor) is not nn.Parameter and is_sharded(tensor):
        with torch.no_grad():
            found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return found
    return tensor


def like(shard: Tensor, whole: Tensor) -> Tensor:
    """A part as the sharded tensor that it belongs to; any other as it is."""
    if not is_sharded(whole):
        return shard
    from torch.distributed.tensor import DTensor

    assert isinstance(whole, DTensor)
    return DTensor.from_local(
        shard, whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride()
    )


def weight(kind: str, count: Tensor, decay: float, warmup: bool) -> Tensor:
    """Of the next model in an average of ``count``, ``[]`` float32; see WeightAverager."""
    count = count.double()
    if kind == "swa":
        return (1.0 / (count + 1.0)).float()
    found = torch.full_like(count, 1.0 - decay)
    if warmup:
        found = torch.maximum(found, 9.0 / (10.0 + count))
    return torch.where(count == 0, 1.0, found).float()


def version(x: Tensor) -> int:
    """A number that changes when it is written to; inference tensors have none."""
    return 0 if x.is_inference() else x._version


def overlapping(tensor: Tensor) -> bool:
    """Whether elements share memory (``expand``): a constant, which cannot be written to."""
    pairs = zip(tensor.size(), tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in pairs)


def sharded(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on."""
    return [module for module in model.modules() if _is(module, "fsdp", "FSDPModule")]


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """What ``save_pretrained`` must be given; ``None`` where the model's own state will do.

    A collective call for a sharded model: only the process of rank 0 keeps what it gathers.
    """
    model = unwrapped(model)
    if not sharded(model):
        state = model.state_dict()
        named = {name.replace("._orig_mod", ""): tensor for name, tensor in state.items()}
        return named if named.keys() != state.keys() else None
    keep = first_process()
    state, gathered = {}, {}
    for entry in entries(model, unique=False):
        if entry.buffer and entry.key in entry.module._non_persistent_buffers_set:
            continue
        tensor = entry.tensor()
        same = _same(tensor)
        if same not in gathered:
            tensor = tensor.detach()
            whole = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
            gathered[same] = whole.cpu() if keep else torch.empty(0)
        state[entry.name] = gathered[same]
    return state


def first_process() -> bool:
    """Whether this is the only process, or the one of rank 0."""
    distributed = torch.distributed
    alone = not distributed.is_available() or not distributed.is_initialized()
    return alone or distributed.get_rank() == 0


def check_tensors(what: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Tensors of a state, against those that they will be copied to."""
    for name in own:
        if name not in given:
            raise ValueError(f"WeightAverager: {what} of the state must have {name}, got none")
    for name, tensor in given.items():
        if name not in own:
            raise ValueError(
                f"WeightAverager: {what} of the state must be of this model, got {name}"
            )
        wanted = [(*x.shape, x.dtype, type(x), local(x).shape) for x in (own[name], tensor)]
        if wanted[0] != wanted[1]:
            raise ValueError(
                f"WeightAverager: {name} of the state must be {_described(own[name])}, got "
                f"{_described(tensor)}"
            )


def _described(x: Tensor) -> str:
    shard = "" if local(x) is x else f", {list(local(x).shape)} of it here"
    return f"{type(x).__name__} {x.dtype} {list(x.shape)}{shard}"
