"""``python bench/run.py --op kd_loss`` or ``kdkernels bench``: accuracy first, then time."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kdkernels._backend import BACKENDS, check_name
from kdkernels.api.backends import available_backends
from kdkernels.bench import cases
from kdkernels.bench.cases import Case, Setting
from kdkernels.bench.measure import Measured, Plan, dtype_name, measure
from kdkernels.bench.report import number, tables, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEFAULT_RIVALS = ("eager", "compile")
QUICK_SHAPE, QUICK_SECONDS = (64, 8192), 1.0
LM_SHAPES = ((512, 32000), (256, 128256))

Words = Sequence[str] | None


def bench(
    op: Words = None,
    device: str | None = None,
    backend: Words = None,
    against: Words = None,
    shape: Words = None,
    dtype: Words = None,
    divergence: Words = None,
    temperature: float = 2.0,
    mode: Words = None,
    json_path: Path | None = None,
    quick: bool = False,
    seconds: float = 10.0,
) -> bool:
    """Measures ops and prints tables; the arguments are the options of ``kdkernels bench``.

    Returns:
        Whether every variant was right, so that it was timed.
    """
    present = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    device = _one_of("device", device or present[-1], present)
    sizes = [_shape(text) for text in _words(shape)]
    dtypes = _several("dtype", dtype, tuple(DTYPES)) or ("float32", "bfloat16")
    plans = []
    for name in _words(op) or ["kd_loss"]:  # all of them before the first is measured
        case = cases.load(name)
        plan = Plan(
            op=name,
            backends=_backends(getattr(case, "op", name), device, _words(backend)),
            against=_rivals(case, against),
            modes=_several("mode", mode, case.modes) or case.modes[-1:],
            seconds=min(seconds, QUICK_SECONDS) if quick else seconds,
            memory=not quick,
        )
        what = _several("divergence", divergence, case.divergences)
        short = getattr(case, "quick_shape", QUICK_SHAPE)
        shapes = sizes or ([short] if quick else case.shapes(device))
        plans.append((plan, what or case.default_divergences, shapes))
    console = Console(highlight=False)
    failed = False
    for plan, what, shapes in plans:
        for size, kind, dtype_ in itertools.product(shapes, what, dtypes):
            setting = Setting(device, DTYPES[dtype_], kind, temperature)
            measured = measure(plan, setting, size)
            _show(console, measured)
            if json_path is not None:  # at once: a run that is cut keeps its tables
                write_json(json_path, measured.rows)
            failed = failed or bool(measured.refused)
    return not failed


def _rivals(case: Case, names: Words) -> tuple[str, ...]:
    """Those asked for; ``all``; or the first two."""
    if _words(names) == ["all"]:
        return case.rivals
    return _several("against", names, case.rivals) or case.rivals[:2]


def _show(console: Console, measured: Measured) -> None:
    for name, reason in measured.missing.items():
        console.print(f"{name} is left out: {reason}", markup=False)
    for refusal in measured.refused:
        console.print(f"refused to time {refusal}", style="red", markup=False)
    for table in tables(measured.rows):
        console.print(table)


def throughput_table(
    shapes: Sequence[tuple[int, int]] = LM_SHAPES,
    seconds: float = 60.0,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> list[dict[str, Any]]:
    """``kd_loss`` with its gradient against eager PyTorch and ``torch.compile``.

    Args:
        shapes: ``(rows, vocabulary)`` of language models.
        seconds: about how long it takes in all, on a machine where the compiler is warm.
        dtypes: of the logits.

    Returns:
        One row a shape and dtype, from column titles to values, in the order to show them. A rival
        that cannot run here has no column.
    """
    device = _default_device()
    backend = available_backends("kd_loss", device)[0]
    # Checking, warming up and compiling take about half of the time.
    share = 0.5 * seconds / (len(shapes) * len(dtypes))
    plan = Plan("kd_loss", (backend,), DEFAULT_RIVALS, ("full",), seconds=share, memory=False)
    short = {name: alias for alias, name in ALIASES.items()}
    table = []
    for shape in shapes:
        for dtype in dtypes:
            measured = measure(plan, Setting(device, dtype), shape)
            if measured.refused:
                raise RuntimeError(f"kd_loss is wrong here: {measured.refused[0]}")
            ours, *others = measured.rows
            # Titles of two lines and short names: the table has to fit a terminal of 80 columns.
            table.append(
                {
                    "rows x vocab": f"{shape[0]} x {shape[1]}",
                    "dtype": short[dtype_name(dtype)],
                    "kd_loss,\nms": ours.ms,
                    **{f"{row.variant},\nms": row.ms for row in others},
                    **{f"{name} /\nkd_loss": ratio for name, ratio in ours.ratio.items()},
                    "of copy\nspeed": f"{ours.fraction_of_floor or 0:.0%}",
                }
            )
    return table


def print_throughput(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Prints what :func:`throughput_table` gave."""
    table = Table(
        title="kd_loss and its gradient",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    titles = list(dict.fromkeys(title for row in rows for title in row))
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        values = (row.get(title, "") for title in titles)
        table.add_row(*(number(v) if isinstance(v, float) else str(v) for v in values))
    (console or Console()).print(table)


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _backends(op: str, device: str, given: Sequence[str]) -> tuple[str, ...]:
    """What was asked for, or every backend that runs compiled here."""
    for name in given:
        check_name("bench", name)
    if given:
        return tuple(given)
    available = available_backends(op, device)
    slow = {"reference"} if device == "cuda" else {"reference", "triton"}  # triton: interpreted
    chosen = tuple(name for name in BACKENDS if name in available and name not in slow)
    if not chosen:
        raise ValueError(f"bench: backend must be one that is built for {device}, got none")
    return chosen


def _words(values: Sequence[str] | None) -> list[str]:
    return [word for value in values or () for word in value.replace(",", " ").split()]


def _one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"bench: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _several(name: str, values: Sequence[str] | None, choices: Sequence[str]) -> tuple[str, ...]:
    return tuple(_one_of(name, ALIASES.get(word, word), choices) for word in _words(values))


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise ValueError(f"bench: shape must be ROWSxVOCAB, got {text!r}")
    return int(rows), int(columns)


def main() -> None:
    """Runs as a script; a failure is one line."""
    from kdkernels.api.cli.bench import bench as command

    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )
    app.command()(command)
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, RuntimeError, OSError) as error:
        typer.echo(f"{str(error).splitlines()[0]}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    # As a script this file is no part of its package: run the module that is.
    from kdkernels.bench import run

    run.main()
