"""What an ``interchange`` does where it does something."""

from __future__ import annotations

from enum import IntEnum


class Mode(IntEnum):
    """What becomes of a position that has a source. The numbers are those of the kernels."""

    SWAP = 0
    ADD = 1
    SUBTRACT = 2
