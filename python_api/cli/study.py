"""``kdkernels study``: compare label regularisers over tasks, students and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kdkernels.api.cli.runs import one_sentence

FAILURES = {"command": "study", "extras": "distill,study", "hint": "the same command continues"}


class RunByDefault(TyperGroup):
    """``study CONFIG.yaml`` is ``study run CONFIG.yaml``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts ``run`` in front where no command is named."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Whether label regularisers help, on tasks, students and seeds of a YAML file: "
    "`kdkernels study CONFIG.yaml`, then `kdkernels study report FOLDER`.",
)

Storage = Annotated[
    str | None,
    typer.Option(
        help="Database for many machines, postgresql+psycopg://USER@HOST/NAME: the same command on "
        "each of them takes trials from it [default: a SQLite file in the folder]."
    ),
]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The study, a YAML file.")],
    out: Annotated[
        Path | None, typer.Option(help="The study's folder [default: studies/NAME].")
    ] = None,
    storage: Storage = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Worker processes on this machine [default: one a core; 1 for a GPU]."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each [default: the cores, shared out].")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the trials and how long they will take.")
    ] = False,
) -> None:
    """Run the trials that have no result yet, then write the report.

    Stopped or killed, the same command continues. A study may grow: trials of an earlier
    configuration that are in the new one as well are not done again.
    """
    with one_sentence(**FAILURES):
        from rich.console import Console

        from kdkernels.api.study.runner import run_study

        run_study(config, out, storage, workers, threads, dry_run, Console())


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A study's folder.")], storage: Storage = None
) -> None:
    """Write the report of a study again, finished or not."""
    with one_sentence(**FAILURES):
        from rich.console import Console

        from kdkernels.api.study.runner import report_study

        report_study(folder, storage, Console())
