"""The command line: ``kdkernels info | verify | bench | distill | finetune | study | cache``.

Every command lives in a file of its own that imports what it needs when it runs: ``kdkernels info``
loads no transformers and no Triton.
"""

from __future__ import annotations

import sys

import typer

from kdkernels.api.cli.cache import app as cache
from kdkernels.api.cli.distill import distill
from kdkernels.api.cli.finetune import finetune
from kdkernels.api.cli.info import info
from kdkernels.api.cli.study import app as study
from kdkernels.api.cli.verify import verify
from kdkernels.bench.run import bench

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",  # help texts hold [default: ...], which is a tag in "rich"
    pretty_exceptions_enable=False,
    help="Fused kernels for knowledge distillation of language models.",
)
for command in (info, verify, bench, distill, finetune):
    app.command()(command)
app.add_typer(study, name="study")
app.add_typer(cache, name="cache")


def main() -> None:
    """Runs a command; a failure is one line and exit code 1."""
    try:
        app(prog_name="kdkernels")
    except (
        ValueError,
        TypeError,
        NotImplementedError,
        ImportError,
        RuntimeError,
        OSError,
    ) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        typer.echo(f"kdkernels: {lines[0]}", err=True)
        sys.exit(1)
