"""Reads the variables of a TensorFlow checkpoint (tensor bundle) without TensorFlow.

The index is a LevelDB table of protocol buffers, one for each variable: where its values lie in the
one data file. Nothing but little-endian float32 is read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

FOOTER = 48
MAGIC = 0xDB4775248B80FB57
SNAPPY = 1
FLOAT = 1  # tensorflow::DataType
# Fields of a BundleEntryProto.
DTYPE, SHAPE, OFFSET, SIZE = 1, 2, 4, 5


def read_bundle(index: Path, data: Path) -> dict[str, Tensor]:
    """All float32 variables by name, in memory of their own.

    Args:
        index: ``variables.index``.
        data: ``variables.data-00000-of-00001``, the only one.

    Raises:
        ValueError: The index is no such table, or a variable reaches beyond the data.
    """
    values, found = data.read_bytes(), {}
    for key, entry in _table(index.read_bytes()):
        if not key:  # the header
            continue
        fields = dict(_fields(entry))
        if fields.get(DTYPE) != FLOAT:
            continue
        shape = [
            _number(dict(_fields(_bytes(size))).get(1, 0))
            for number, size in _fields(_bytes(fields.get(SHAPE, b"")))
            if number == 2
        ]
        begin, length = _number(fields.get(OFFSET, 0)), _number(fields.get(SIZE, 0))
        count = math.prod(shape)
        if length != 4 * count or begin + length > len(values):
            raise ValueError(f"{key.decode()} must have {count} numbers in {data}, got fewer")
        flat = torch.frombuffer(bytearray(values[begin : begin + length]), dtype=torch.float32)
        found[key.decode()] = flat.view(shape)
    return found


def _table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a LevelDB table."""
    footer = content[-FOOTER:]
    if len(footer) < FOOTER or struct.unpack("<Q", footer[-8:])[0] != MAGIC:
        raise ValueError("index must be a LevelDB table, got another ending")
    place = _varint(footer, _varint(footer, 0)[1])[1]  # past the handle of the meta index
    for _, handle in _block(content, *_handle(footer, place)):
        yield from _block(content, *_handle(handle, 0))


def _handle(source: bytes, place: int) -> tuple[int, int]:
    begin, place = _varint(source, place)
    return begin, _varint(source, place)[0]


def _block(content: bytes, begin: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The entries of one block, whose keys share beginnings."""
    block = content[begin : begin + size]
    if content[begin + size] == SNAPPY:
        block = unsnappy(block)
    restarts = struct.unpack("<I", block[-4:])[0]
    end, place, key = len(block) - 4 - 4 * restarts, 0, b""
    while place < end:
        shared, place = _varint(block, place)
        fresh, place = _varint(block, place)
        length, place = _varint(block, place)
        key = key[:shared] + block[place : place + fresh]
        place += fresh
        yield key, block[place : place + length]
        place += length


def unsnappy(source: bytes) -> bytes:
    """Decompresses a raw Snappy block.

    Raises:
        ValueError: The block is damaged.
    """
    size, place = _varint(source, 0)
    out = bytearray()
    while place < len(source):
        tag = source[place]
        place += 1
        if tag & 3 == 0:
            length = tag >> 2
            if length >= 60:
                width = length - 59
                length = int.from_bytes(source[place : place + width], "little")
                place += width
            out += source[place : place + length + 1]
            place += length + 1
            continue
        if tag & 3 == 1:
            length, back = 4 + (tag >> 2 & 7), (tag >> 5) << 8 | source[place]
            place += 1
        else:
            width = 2 if tag & 3 == 2 else 4
            length, back = 1 + (tag >> 2), int.from_bytes(source[place : place + width], "little")
            place += width
        if not 0 < back <= len(out):
            raise ValueError("the block must be Snappy's, got a copy from before its beginning")
        for _ in range(length):  # a copy may overlap what it writes
            out.append(out[-back])
    if len(out) != size:
        raise ValueError(f"the block must have {size} bytes, got {len(out)}")
    return bytes(out)


def _varint(source: bytes, place: int) -> tuple[int, int]:
    """A number in groups of seven bits, and where it ends."""
    value = shift = 0
    while True:
        byte = source[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _fields(source: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: numbers, and bytes of what has a length."""
    place = 0
    while place < len(source):
        tag, place = _varint(source, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(source, place)
            yield tag >> 3, value
        elif kind == 2:
            length, place = _varint(source, place)
            yield tag >> 3, source[place : place + length]
            place += length
        else:
            width = 4 if kind == 5 else 8
            yield tag >> 3, int.from_bytes(source[place : place + width], "little")
            place += width


def _number(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value
