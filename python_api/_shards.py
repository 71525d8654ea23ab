"""Which classes each process of a group has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.api._averaged import is_sharded


class Layout(NamedTuple):
    """The tensors' parts that are here, and the sizes of all processes' parts."""

    tensors: tuple[Any, ...]
    group: Any
    rank: int
    sizes: tuple[int, ...]

    def replicated(self, name: str, argument: str, x: Tensor | None) -> Tensor | None:
        """A tensor that every process has whole."""
        if x is None or not is_sharded(x):
            return x
        from torch.distributed.tensor import Replicate

        placements = x.placements  # type: ignore[attr-defined]
        if not all(isinstance(p, Replicate) for p in placements):
            raise ValueError(f"{name}: {argument} must be replicated, got {placements}")
        whole: Tensor = x.to_local(grad_placements=placements)  # type: ignore[attr-defined]
        return whole

    def check_agreement(self, name: str, device: torch.device, numbers: Sequence[int]) -> None:
        """Raises on every process where they do not agree on numbers, if looking is free."""
        if len(self.sizes) == 1 or device.type != "cpu" or torch.compiler.is_compiling():
            return
        own = torch.tensor(numbers)
        both = torch.stack([own, -own])
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=self.group)
        if not torch.equal(both[0], -both[1]):
            raise ValueError(
                f"{name}: group must have the same rows, labels, chunk_rows and shards on every "
                f"process, got {(-both[1]).tolist()} to {both[0].tolist()}"
            )


def layout_of(
    name: str,
    tensors: Mapping[str, tuple[Tensor | None, int]],
    group: Any,
    shards: Sequence[int] | None,
) -> Layout:
    """How tensors are divided by a dimension; all in the same way.

    Args:
        name: for messages.
        tensors: by argument, with the dimension of the classes.
        group: of processes, where no tensor is a DTensor.
        shards: sizes, where they are not equal; not with DTensors.
    """
    given = {argument: (x, dim) for argument, (x, dim) in tensors.items() if x is not None}
    sizes: tuple[int, ...] | None = None
    for argument, (x, dim) in given.items():
        if not is_sharded(x):
            continue
        if (group is not None and sizes is None) or shards is not None:
            raise ValueError(
                f"{name}: group and shards must be left out with a DTensor, which {argument} is"
            )
        of_mesh, its_sizes = _of_dtensor(name, argument, x, dim)
        if sizes not in (None, its_sizes):
            raise ValueError(
                f"{name}: {argument} must be divided as {next(iter(given))}, into "
                f"{list(sizes or ())}, got {list(its_sizes)}"
            )
        group, sizes = of_mesh, its_sizes
    world, rank = _place(name, group)
    first = next(iter(given))
    if sizes is None:
        x, dim = given[first]
        sizes = (x.shape[dim],) * world if shards is None else tuple(shards)
    if len(sizes) != world or any(type(n) is not int or n < 0 for n in sizes):
        raise ValueError(
            f"{name}: shards must be {world} sizes of 0 or more, one a process, got {shards}"
        )
    local = {argument: _local(x) for argument, (x, _) in given.items()}
    for argument, (_, dim) in given.items():
        if local[argument].shape[dim] != sizes[rank]:
            raise ValueError(
                f"{name}: {argument} must have the {sizes[rank]} classes of process {rank} of the "
                f"group, got {local[argument].shape[dim]}"
            )
    return Layout(tuple(local.get(argument) for argument in tensors), group, rank, sizes)


def _place(name: str, group: Any) -> tuple[int, int]:
    """Size of the group, and this process's place in it."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError(
            f"{name}: group must be a process group, got {group} without torch.distributed"
        )
    rank = distributed.get_rank(group)
    if rank < 0:
        raise ValueError(f"{name}: group must have this process in it, got another one")
    return distributed.get_world_size(group), rank


def _of_dtensor(name: str, argument: str, x: Any, dim: int) -> tuple[Any, tuple[int, ...]]:
    """The group over which a DTensor is divided, and the sizes of the parts."""
    from torch.distributed.tensor import Replicate, Shard

    dim %= x.dim()
    by = [i for i, p in enumerate(x.placements) if type(p) is Shard and p.dim % x.dim() == dim]
    rest = [p for i, p in enumerate(x.placements) if i not in by]
    if len(by) != 1 or not all(isinstance(p, Replicate) for p in rest):
        raise ValueError(
            f"{name}: {argument} must be sharded by dimension {dim} over one dimension of its "
            f"mesh and replicated over the others, got {x.placements}"
        )
    world, whole = x.device_mesh.size(by[0]), x.shape[dim]
    most = -(-whole // world)  # as torch.chunk
    sizes = tuple(max(0, min(whole - i * most, most)) for i in range(world))
    return x.device_mesh.get_group(by[0]), sizes


def _local(x: Tensor) -> Tensor:
    """The part that is here; its gradient is a part of the DTensor's."""
    if not is_sharded(x):
        return x
    local: Tensor = x.to_local(grad_placements=x.placements)  # type: ignore[attr-defined]
    return local
