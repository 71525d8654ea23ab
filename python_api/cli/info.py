"""``kdkernels info``: what is installed here, how it was built, and what can run."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

PACKAGES = ("kdkernels", "torch", "triton", "numpy")
OPTIONAL = ("transformers", "accelerate", "datasets", "safetensors", "liger-kernel", "trl")
NO_GPU = "torch sees no CUDA device"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def collect() -> dict[str, Any]:
    """Everything that is shown, as plain data; never raises for what is missing."""
    from kdkernels import _native, ops

    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "integrations": {package: _version(package) for package in OPTIONAL},
        "machine": machine(),
        "native": {
            "build": _host("build_info"),
            "libraries": {device: _native.reason(device) or "loaded" for device in ("cpu", "cuda")},
        },
        "backends": {op: {d: _backends(op, d) for d in ("cpu", "cuda")} for op in ops.__all__},
    }


def machine() -> dict[str, Any]:
    """CPU, GPU and driver."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": found.name,
                    "capability": f"{found.major}.{found.minor}",
                    "memory_gib": round(found.total_memory / 2**30, 1),
                }
            )
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_features": _host("cpu_features"),
        "cuda_of_torch": torch.version.cuda,
        "driver": _driver(),
        "gpus": gpus,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _host(function: str) -> dict[str, Any] | None:
    """What the compiled host helpers say, if they were built."""
    from kdkernels import _native

    module = _native.host()
    return None if module is None else dict(getattr(module, function)())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def _backends(op: str, device: str) -> dict[str, str | None]:
    """Backend -> why it cannot run, ``None`` where it can."""
    import torch

    from kdkernels._backend import BACKENDS

    module = importlib.import_module(f"kdkernels.ops.{op}")
    probe = torch.empty(0, 1, device="meta")
    absent = NO_GPU if device == "cuda" and not torch.cuda.is_available() else None
    return {name: module.unsupported(name, probe, device=device) or absent for name in BACKENDS}


def info(as_json: AsJson = False) -> None:
    """Show versions, hardware, how the native libraries were built, and what can run."""
    found = collect()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console

    # Reasons are sentences: a narrow terminal wraps them, a pipe gets whole lines.
    console = Console(highlight=False, soft_wrap=False)
    for table in _tables(found):
        console.print(table)


def _tables(found: dict[str, Any]) -> list[Any]:
    from rich import box
    from rich.table import Table

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in _facts(found):
        facts.add_row(name, value)
    support = Table(box=box.SIMPLE_HEAD)
    for column in ("op", "device", "backend", ""):
        support.add_column(column)
    for op, devices in found["backends"].items():
        for device, backends in devices.items():
            for backend, reason in backends.items():
                support.add_row(op, device, backend, reason or "[green]available")
    return [facts, support]


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    hardware, native = found["machine"], found["native"]
    features, build = hardware["cpu_features"], native["build"]
    gpus = [
        f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        for gpu in hardware["gpus"]
    ]
    threads = f"{hardware['cores']} cores, {hardware['threads']} threads in torch"
    return [
        *((name, value or "not installed") for name, value in found["versions"].items()),
        *((name, value or "not installed") for name, value in found["integrations"].items()),
        ("system", hardware["system"]),
        ("CPU", f"{hardware['cpu']}, {threads}"),
        ("CPU features", _pairs(features) if features else "unknown (no native build)"),
        ("GPU", "; ".join(gpus) or "none"),
        ("CUDA of torch", hardware["cuda_of_torch"] or "none (a CPU build of torch)"),
        ("NVIDIA driver", hardware["driver"] or "not found"),
        ("native build", _pairs(build) if build else "none (KDKERNELS_NATIVE=off)"),
        *((f"native {device}", state) for device, state in native["libraries"].items()),
    ]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {'yes' if value is True else 'no' if value is False else value}"
        for key, value in values.items()
    )
