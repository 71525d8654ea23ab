"""Lists of tensors in one launch: tables of addresses, and what kernels that go by them require."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from kdkernels import _native, _triton
from kdkernels._op import is_compiling

# The numbers are those of the kernels.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
# Elements that are one piece of work; as kTableChunk in multi_tensor.h.
CHUNK = 1 << 15

Key = TypeVar("Key", bound=Hashable)


class Table(NamedTuple):
    """Some of the tensors of the lists, as the kernels read them.

    ``rows`` is int64 on the device of the tensors, a row for each: its addresses in the lists (0:
    none), the number of elements, and of the chunks of all tensors up to and with this one.
    """

    rows: Tensor
    chunks: int  # of all tensors
    places: list[int]  # of the tensors in the lists


def tables(
    columns: Sequence[Sequence[int]],
    sizes: Sequence[int],
    keys: Sequence[Key | None],
    device: torch.device,
) -> dict[Key, Table]:
    """A table for each key (combination of dtypes); tensors of key ``None`` or size 0 are in none.

    Args:
        columns: addresses, a list for each column; an empty one is 0 everywhere.
        sizes: elements of each tensor.
        keys: of each tensor.
        device: where the tensors are.
    """
    found: dict[Key, list[int]] = {}
    for i, (size, key) in enumerate(zip(sizes, keys, strict=True)):
        if size > 0 and key is not None:
            found.setdefault(key, []).append(i)
    made = {}
    for key, places in found.items():
        rows, chunks = [], 0
        for i in places:
            chunks += -(-sizes[i] // CHUNK)
            rows.append([*(column[i] if column else 0 for column in columns), sizes[i], chunks])
        made[key] = Table(torch.tensor(rows, dtype=torch.int64).to(device), chunks, places)
    return made


def unsupported(
    backend: str, tensor: Tensor, *others: Tensor, device: str | None = None
) -> str | None:
    """Why a backend cannot work on lists of such tensors; ``None`` when it can.

    ``device`` asks about another device type than that of the tensors.
    """
    if backend == "reference":
        return None
    if tensor.dtype == torch.float64:
        return "the kernels take float32, bfloat16 and float16, not float64"
    if is_compiling():
        return "the kernels go by addresses, which torch.compile does not see"
    device = device or tensor.device.type
    if backend == "native":
        return _native.reason(device)
    return _triton.reason(device) if backend == "triton" else None


def check_dense(op: str, name: str, x: Tensor) -> None:
    """Whether the elements fill their memory without a gap, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected and x.numel() > 0:
            raise ValueError(
                f"{op}: {name} must be dense, got strides {list(x.stride())} for {list(x.shape)}"
            )
        expected *= size


def check_like(op: str, name: str, x: Tensor, what: str, other: Tensor) -> None:
    """``x`` has the device, shape and strides of ``other``, which is ``what``."""
    if x.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other.device}, got {x.device}")
    if x.shape != other.shape or _steps(x) != _steps(other):
        raise ValueError(
            f"{op}: {name} must have the shape and strides of its {what} {list(other.shape)} "
            f"{list(other.stride())}, got {list(x.shape)} {list(x.stride())}"
        )


def _steps(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
