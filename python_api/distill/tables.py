"""Tables for the screen and for Markdown, and the line that says what a run ran on."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version

import torch
from rich import box
from rich.table import Table

from kdkernels.api.distill.train import Runtime

PACKAGES = ("kdkernels", "torch", "transformers", "tokenizers", "safetensors", "matplotlib", "rich")


def rich_table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table for the screen; the first column is text, the others are figures."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same table as Markdown."""
    header = [column.replace("\n", " ") for column in columns]
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def versions(runtime: Runtime) -> str:
    """Versions, machine and precision, one line."""
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"Python {platform.python_version()}, {packages}. {_machine(runtime)}."


def _machine(runtime: Runtime) -> str:
    """The machine and precision, one line."""
    name = (
        torch.cuda.get_device_name(runtime.device)
        if runtime.device.type == "cuda"
        else f"{torch.cpu.get_capabilities().get('cpu_name', platform.machine())}, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    return f"{name}; {'bf16 autocast' if runtime.bf16 else 'fp32'}; {platform.system()}"
