"""The backends a test runs over."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SLOW = ("triton", "emulated")


@dataclass(frozen=True)
class Backend:
    """A backend on a device type, with the reason why it cannot run at all, if any."""

    name: str
    device: str
    unavailable: str | None = None

    @property
    def interpreted(self) -> bool:
        """Whether it runs its kernels in an interpreter: tests then use small shapes."""
        return self.device == "cpu" and self.name in SLOW

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes it takes."""
        common = (torch.float32, torch.bfloat16, torch.float16)
        wide = self.name == "reference" or (self.name, self.device) == ("native", "cpu")
        return (*common, torch.float64) if wide else common

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"
