"""``kdkernels bench``: ops against their rivals, after checking them against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdkernels.api.cli import complete

Words = list[str] | None
Op = Annotated[
    Words,
    typer.Option(help="Ops to measure [default: kd_loss].", autocompletion=complete.op_names),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu or cuda [default: cuda if there is one].",
        autocompletion=complete.words("cpu", "cuda"),
    ),
]
Backend = Annotated[
    Words,
    typer.Option(
        help="Backends of ours [default: every compiled one].",
        autocompletion=complete.words(*complete.BACKENDS),
    ),
]
Against = Annotated[
    Words,
    typer.Option(
        help="eager, compile, ... or all [default: the op's first two].",
        autocompletion=complete.words("eager", "compile", "all"),
    ),
]
Shape = Annotated[Words, typer.Option(help="ROWSxVOCAB [default: real models', by device].")]
Dtype = Annotated[
    Words,
    typer.Option(
        help="float32, bfloat16, float16 [default: first two].",
        autocompletion=complete.words(*complete.DTYPES),
    ),
]
Divergence = Annotated[
    Words,
    typer.Option(
        "--divergence", "--kind", help="forward_kl, reverse_kl, ..., mse, ... [default: the op's]."
    ),
]
Temperature = Annotated[float, typer.Option(help="Temperature of the divergence.")]
Mode = Annotated[
    Words,
    typer.Option(
        help="forward, backward, full [default: full].",
        autocompletion=complete.words(*complete.MODES),
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Append JSON lines to this file.")]
Quick = Annotated[bool, typer.Option("--quick", help="One small shape, a second a table.")]
Seconds = Annotated[float, typer.Option(help="About how long to measure each table.")]


def bench(
    op: Op = None,
    device: Device = None,
    backend: Backend = None,
    against: Against = None,
    shape: Shape = None,
    dtype: Dtype = None,
    divergence: Divergence = None,
    temperature: Temperature = 2.0,
    mode: Mode = None,
    json_path: Json = None,
    quick: Quick = False,
    seconds: Seconds = 10.0,
) -> None:
    """Measure ops against their rivals, after checking them against float64.

    An option that takes several values may be repeated, or list them with commas.
    """
    options = dict(locals())
    from kdkernels.bench.run import bench as measure

    if not measure(**options):
        raise typer.Exit(1)
