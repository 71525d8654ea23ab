"""The command line: ``kdkernels info``, ``verify``, ``bench``, ``distill`` and so on.

Every command lives in a file of its own that imports what it needs when it runs: ``kdkernels info``
loads no transformers and no Triton, and a shell that completes a command no torch.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kdkernels.api.cli import runs
from kdkernels.api.cli.bench import bench
from kdkernels.api.cli.cache import app as cache
from kdkernels.api.cli.distill import distill
from kdkernels.api.cli.finetune import finetune
from kdkernels.api.cli.info import info
from kdkernels.api.cli.plot import plot
from kdkernels.api.cli.study import app as study
from kdkernels.api.cli.verify import verify

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",  # help texts hold [default: ...], which is a tag in "rich"
    pretty_exceptions_enable=False,
)
for command in (info, verify, bench, distill, finetune, plot):
    app.command()(command)
app.add_typer(study, name="study")
app.add_typer(cache, name="cache")

Debug = Annotated[
    bool,
    typer.Option("--debug", envvar="KDKERNELS_DEBUG", help="Show failures with their traceback."),
]


@app.callback()
def options(debug: Debug = False) -> None:
    """Fused kernels for knowledge distillation of language models."""
    runs.Debugging.on = debug


def main() -> None:
    """Runs a command; a failure is one line and exit code 1."""
    try:
        app(prog_name="kdkernels")
    except Exception as error:
        if runs.Debugging.on:
            raise
        typer.echo(f"kdkernels: {runs.sentence(error)}", err=True)
        sys.exit(runs.EXIT_FAILED)
