"""Whether Triton kernels can run; ``device.py`` has functions of more than one op's kernels."""

from __future__ import annotations

import importlib.util
import os

import torch


def reason(device: str) -> str | None:
    """Why Triton kernels cannot run on this device type; ``None`` when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"triton has no {device} target (TRITON_INTERPRET=1 runs it interpreted)"


def device_guard(tensor: torch.Tensor) -> torch.cuda.device | torch.cuda._DeviceGuard:
    """Makes the tensor's GPU current for a launch; does nothing for a CPU tensor."""
    return torch.cuda._DeviceGuard(tensor.get_device())
