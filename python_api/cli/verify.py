"""``kdkernels verify``: every backend that runs here against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kdkernels.api.cli import complete

if TYPE_CHECKING:
    from kdkernels.bench.accuracy import Check

SEED = 1
Op = Annotated[
    list[str] | None,
    typer.Option(help="Op to verify [default: all].", autocompletion=complete.op_names),
]
Device = Annotated[
    list[str] | None,
    typer.Option(
        help="cpu or cuda [default: cpu, and cuda if there is one].",
        autocompletion=complete.words("cpu", "cuda"),
    ),
]
Backend = Annotated[
    list[str] | None,
    typer.Option(
        help="Backend [default: all that run here].",
        autocompletion=complete.words(*complete.BACKENDS),
    ),
]


@dataclass(frozen=True)
class Outcome:
    """All checks of one op on one device by one backend."""

    op: str
    device: str
    backend: str
    count: int
    worst: float  # largest error over its budget
    failures: list[str]


def verify(op: Op = None, device: Device = None, backend: Backend = None) -> None:
    """Check every kernel that runs here against float64; exit code 1 when one is wrong.

    Divergences, dtypes and edge cases: ignored rows of NaN, masked classes, padded vocabularies,
    one class, no rows, equal models, large offsets. The budget of an error is twice what PyTorch
    in the same dtype errs, plus the rounding of the result.
    """
    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from kdkernels._backend import check_name
    from kdkernels.api.backends import available_backends
    from kdkernels.bench import cases

    for name in backend or ():
        check_name("verify", name)
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    devices = device or present
    for place in devices:
        if place not in present:
            raise ValueError(f"verify: device must be one of {', '.join(present)}, got {place!r}")
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("op", "device", "backend", "checks", "worst error / budget", ""):
        table.add_column(column, justify="right" if "/" in column else "left")
    failures = []
    for name in op or cases.names():
        for place in devices:
            for chosen in backend or available_backends(name, place):
                outcome = run(name, place, chosen)
                result = "[red]FAILED" if outcome.failures else "[green]ok"
                table.add_row(
                    name, place, chosen, str(outcome.count), f"{outcome.worst:.2f}", result
                )
                failures += [f"{name} {place} {chosen}: {text}" for text in outcome.failures]
    console = Console(highlight=False)
    console.print(table)
    for failure in failures:
        console.print(failure, style="red", markup=False)
    if failures:
        raise typer.Exit(1)


def run(op: str, device: str, backend: str) -> Outcome:
    """Runs the checks of an op; one that raises counts as failed."""
    import torch

    from kdkernels.bench import cases

    checks: list[Check] = []
    failures: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        try:
            for name, found in cases.load(op).checks(device, backend):
                checks += found
                failures += [f"{name}: {one}" for one in found if not one.passed]
        except Exception as error:  # whatever a broken kernel raises is a finding
            lines = str(error).splitlines() or [""]
            failures.append(f"raised {type(error).__name__}: {lines[0]}")
    worst = max((one.error / one.budget for one in checks if one.budget), default=0.0)
    return Outcome(op, device, backend, len(checks), worst, failures)
