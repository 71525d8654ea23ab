"""Submodules of a model found by path, and functions put in the place of their ``forward``."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

# The child by which a wrapper holds the module it wraps: DistributedDataParallel, torch.compile,
# FullyShardedDataParallel, CheckpointWrapper.
WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Forward = Callable[..., Any]
# What transformers' layers checkpoint themselves with.
CHECKPOINT = "_gradient_checkpointing_func"


@contextmanager
def replaced(name: str, module: nn.Module, make: Callable[[Forward], Forward]) -> Iterator[None]:
    """Gives the module another ``forward`` in the block, made from the one it has.

    A forward hook would be simpler, but a model that torch.compile has compiled without one does
    not look for it again; it does look for a ``forward`` of the module's own.

    Args:
        name: Who asks, for error messages.
        module: The module.
        make: Returns the new ``forward``, given the old one.
    """
    # Layers of transformers before 5.23 checkpoint their whole __call__, with the forward in it.
    outside = checkpointed(module) and type(module).__call__ is not nn.Module.__call__
    place = CHECKPOINT if outside else "forward"
    own, original = vars(module).get(place), getattr(module, place)
    function = partial(_checkpointing, make, original) if outside else make(original)
    # Past __setattr__: the wrapper of torch.compile has its own.
    vars(module)[place] = function
    try:
        yield
    finally:
        if vars(module).get(place) is not function:
            raise RuntimeError(
                f"{name}: blocks that watch one module must be left in reverse order of entry, got "
                f"a later change of the forward of a {type(module).__name__}"
            )
        if own is None:
            del vars(module)[place]
        else:
            vars(module)[place] = own


def checkpointed(module: nn.Module) -> bool:
    """Whether it is a layer of transformers that checkpoints itself now."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return (
        "GradientCheckpointingLayer" in kinds
        and module.training
        and bool(getattr(module, "gradient_checkpointing", False))
    )


def in_reentrant() -> bool:
    """Whether the forward pass of a reentrant checkpoint runs, which builds no graph."""
    frame = None if torch.is_grad_enabled() else sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def _checkpointing(
    make: Callable[[Forward], Forward], checkpoint: Forward, call: partial[Any], *args: Any
) -> Any:
    """A layer's function that checkpoints its call, with another forward around both."""

    def original(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(call.func, **kwargs), *args)

    return make(original)(*args, **call.keywords)


def first_tensor(name: str, path: str, output: Any) -> Tensor:
    """What a module returns; of a tuple or mapping the first element."""
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, tuple | list) and output:
        first = output[0]
    if not isinstance(first, Tensor):
        raise TypeError(
            f"{name}: output of {path} must be a tensor, or a tuple or mapping that begins with "
            f"one, got {type(output).__name__}"
        )
    return first


def with_first(output: Any, tensor: Tensor) -> Any:
    """The same output with another first tensor; what was given is left as it is."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, Mapping):
        key = next(iter(output))
        return type(output)(**{**output, key: tensor})
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: tensor})
    return type(output)((tensor, *output[1:]))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, torch.compile and their like."""
    while True:
        inner = next((model._modules[w] for w in WRAPPED if w in model._modules), None)
        if inner is None:
            return model
        model = inner


def check_model(name: str, model: object) -> None:
    """Raises unless the modules of a model can be watched."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        # Its copies of the modules would call the forward of the first one.
        raise TypeError(f"{name}: model must not be DataParallel, use DistributedDataParallel")


def check_paths(name: str, argument: str, paths: object) -> tuple[str, ...]:
    """Raises unless these are names, all different and at least one."""
    if isinstance(paths, str) or not isinstance(paths, Sequence):
        raise TypeError(f"{name}: {argument} must be a list of names, got {type(paths).__name__}")
    for path in paths:
        if not isinstance(path, str):
            raise TypeError(f"{name}: {argument} must be names, got {type(path).__name__}")
    if not paths:
        raise ValueError(f"{name}: {argument} must name at least one submodule, got none")
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{name}: {argument} must differ, got {path!r} twice")
    return tuple(paths)


def submodule(name: str, argument: str, model: nn.Module, path: str) -> nn.Module:
    """Walks a path as in the model without wrappers; wrappers may also be named."""
    return walk(name, argument, model, path)[-1]


def walk(name: str, argument: str, model: nn.Module, path: str) -> list[nn.Module]:
    """All modules on the way to a path, wrappers as well, from the model to what it names."""
    passed = [model]
    for part in path.split("."):
        while passed[-1]._modules.get(part) is None:
            wrapped = next((w for w in WRAPPED if w in passed[-1]._modules), None)
            if wrapped is None:
                raise ValueError(
                    f"{name}: {argument} must name submodules of {type(model).__name__}, got "
                    f"{path!r}; nearest: {', '.join(_nearest(model, path)) or 'none'}"
                )
            passed.append(passed[-1].get_submodule(wrapped))
        passed.append(passed[-1].get_submodule(part))
    return passed


def _nearest(model: nn.Module, path: str) -> list[str]:
    parts = (name.split(".") for name, _ in model.named_modules() if name)
    names = [".".join(part for part in name if part not in WRAPPED) for name in parts]
    # First those below a prefix, as the encoder of a model with a head.
    below = [name for name in names if name.endswith(f".{path}")]
    close = difflib.get_close_matches(path, names)
    return list(dict.fromkeys([*below, *close]))[:3]


def layers_of(name: str, argument: str, model: nn.Module) -> list[str]:
    """Paths of the layers of a model of transformers: its one list of ``num_hidden_layers``."""
    inner = unwrapped(model)
    depth = getattr(getattr(inner, "config", None), "num_hidden_layers", None)
    found = [
        path
        for path, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(found) != 1:
        raise ValueError(
            f"{name}: {argument} must have one list of config.num_hidden_layers layers, got "
            f"{len(found)} in a {type(inner).__name__}"
        )
    return [f"{found[0]}.{layer}" for layer in inner.get_submodule(found[0])._modules]
