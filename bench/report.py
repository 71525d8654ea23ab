"""The table on the screen and the JSON lines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One variant at one shape, dtype and mode."""

    op: str
    variant: str
    ours: bool
    mode: str
    rows: int
    columns: int
    dtype: str
    device: str
    divergence: str
    temperature: float
    ms: float
    ms_20: float
    ms_80: float
    samples: int
    gb_per_s: float | None
    copy_gb_per_s: float | None  # measured in the same run
    # Least traffic at that bandwidth. A copy also reads the lines it overwrites, so what writes in
    # place may be faster.
    floor_ms: float | None
    fraction_of_floor: float | None
    ratio: dict[str, float]  # time of each rival over ours
    peak_mb_above_inputs: float | None
    gradient_error: float | None  # largest, over the largest gradient, against float64
    launch_bound: bool  # so small that the time is that of the host


def facts() -> dict[str, Any]:
    """What a figure needs to be believed: machine, versions, commit, command."""
    from kdkernels.api.cli.info import collect  # here: the command line imports this package

    found = collect()
    return {
        "machine": found["machine"],
        "versions": {**found["versions"], "native_build": found["native"]["build"]},
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """Of the source tree that the package runs from, marked where it was changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Appends one JSON object a line, each with the facts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = facts()
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**asdict(row), **common}) + "\n")


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table a shape, dtype and mode; times of launch-bound shapes in microseconds."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.rows, row.columns, row.dtype, row.divergence, row.mode)
        groups.setdefault(key, []).append(row)
    return [_table(group) for group in groups.values()]


def _table(rows: Sequence[Row]) -> Table:
    first = rows[0]
    rivals = list(dict.fromkeys(name for row in rows for name in row.ratio))
    unit = "us" if first.launch_bound else "ms"
    # Forward KL is what losses on logits are measured with unless told.
    kind = "" if first.divergence == "forward_kl" else f"{first.divergence} "
    title = f"{first.op} {kind}{first.mode}, {first.rows} x {first.columns} {first.dtype}"
    title += f", {first.device}"
    if not first.launch_bound:
        title += f"; copy {first.copy_gb_per_s:.1f} GB/s"
    if first.floor_ms is not None:
        title += f", floor {first.floor_ms:.3g} ms"
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    # Two words, two lines, so that a table fits a terminal of 80 columns.
    columns = [unit, "20-80 %"]
    if not first.launch_bound:
        columns += ["GB/s", "of\nfloor", "peak\nMB"]
    for column in (*columns, *(f"x\n{name}" for name in rivals), "gradient\nerror"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.variant, *_cells(row, rivals))
    return table


def _cells(row: Row, rivals: Sequence[str]) -> list[str]:
    factor = 1e3 if row.launch_bound else 1.0
    middle, low, high = (number(value * factor) for value in (row.ms, row.ms_20, row.ms_80))
    cells = [middle, f"{low}-{high}"]
    if not row.launch_bound:
        peak = row.peak_mb_above_inputs
        cells.append("" if row.gb_per_s is None else f"{row.gb_per_s:.1f}")
        cells.append("" if row.fraction_of_floor is None else f"{row.fraction_of_floor:.0%}")
        cells.append("" if peak is None else f"{peak:.0f}")
    cells += [_ratio(row.ratio[name]) if name in row.ratio else "" for name in rivals]
    return [*cells, "" if row.gradient_error is None else f"{row.gradient_error:.1e}"]


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value >= 3 else f"{value:.2f}"


def number(value: float) -> str:
    """Three digits, without an exponent where there are more before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
