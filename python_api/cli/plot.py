"""``kdkernels plot``: the curves of runs, from their logs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdkernels.api.cli import complete
from kdkernels.api.cli.runs import one_sentence

Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN...",
        help="Folders of runs, finished or not.",
        autocompletion=complete.run_folders,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="The PNG file [default: log.png in the run; of several: plot.png here]."),
]


def plot(runs: Runs, out: Out = None) -> None:
    """Draw losses, their parts, dev figures and tokens a second of runs into one picture."""
    with one_sentence("plot", hint="nothing was written"):
        from kdkernels.api.distill.log_plot import save

        path = out or (runs[0] / "log.png" if len(runs) == 1 else Path("plot.png"))
        save(path, runs)
        typer.echo(path)
