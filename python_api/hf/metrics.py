"""Parts of the loss, summed where they are computed and read when something is logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PartSums:
    """Sums by name, on the device: nothing is synchronised until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, name: str, value: Tensor) -> None:
        """One more value, ``[]``."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self, accelerator: Any) -> dict[str, float]:
        """The sums over all processes, each of which must call; they begin again at none."""
        found, self._sums = self._sums, {}
        if not found:
            return {}
        names = sorted(found)
        here = torch.stack([found[name] for name in names])[None]
        whole = accelerator.gather(here).sum(0) if accelerator.num_processes > 1 else here[0]
        return dict(zip(names, whole.tolist(), strict=True))
