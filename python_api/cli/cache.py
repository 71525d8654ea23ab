"""``kdkernels cache``: what a teacher cache holds, whether it is whole, and making one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from kdkernels.api.cli import complete
from kdkernels.api.cli.runs import EXIT_FAILED, one_sentence

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Top-k teacher outputs on disk."
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the cache.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[
    str, typer.Option(help="The teacher: a transformers folder, or smollm2-135m (downloaded).")
]
Data = Annotated[str, typer.Option(help="The text: a UTF-8 file, or wikitext-2 (downloaded).")]
Out = Annotated[str, typer.Option(help="Folder of the cache; what is there is kept.")]
K = Annotated[int, typer.Option("--k", help="Entries a row.")]
Temperature = Annotated[float, typer.Option(help="Temperature of the stored distribution.")]
Bits = Annotated[int, typer.Option(help="Bits of a log-probability, 4 to 16.")]
Split = Annotated[
    str,
    typer.Option(
        help="train, valid or test.", autocompletion=complete.words("train", "valid", "test")
    ),
]
SeqLen = Annotated[int, typer.Option(help="Tokens of an example.")]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens to use [default: all].")]
BatchSize = Annotated[int, typer.Option(help="Examples at a time.")]
ShardRows = Annotated[int, typer.Option(help="Rows of a shard; a kill loses at most one.")]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda or auto.", autocompletion=complete.words(*complete.DEVICES)),
]


@app.command()
def info(folder: Folder, as_json: AsJson = False) -> None:
    """Show what a cache holds and how much of the disk it takes."""
    from kdkernels.api.cache.reader import TeacherCache
    from kdkernels.api.cache.shards import shard_files

    cache = TeacherCache(folder)
    sizes = [path.stat().st_size for path in shard_files(folder)]
    entries = cache.num_rows * cache.manifest.k
    found = {
        **dataclasses.asdict(cache.manifest),
        "examples": len(cache),
        "rows": cache.num_rows,
        "shards": len(sizes),
        "bytes": sum(sizes),
        "bytes_an_entry": round(sum(sizes) / entries, 3) if entries else None,
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        typer.echo(f"{name.replace('_', ' '):<16}{'not recorded' if value is None else shown}")


@app.command()
def verify(folder: Folder) -> None:
    """Compare the checksums of every shard; exit code 1 when one is damaged."""
    from kdkernels.api.cache.codec import TopKCodec
    from kdkernels.api.cache.manifest import read_manifest
    from kdkernels.api.cache.shards import shard_files, verify_shard

    manifest = read_manifest("TeacherCache", folder)
    width = TopKCodec(manifest.k, manifest.vocab_size, manifest.bits).row_bytes
    files = shard_files(folder)
    failures = 0
    for path in files:
        try:
            verify_shard(path, manifest.fingerprint, width)
        except ValueError as error:
            failures += 1
            typer.echo(str(error), err=True)
    if failures:
        typer.echo(f"cache verify: {failures} of {len(files)} shards are damaged", err=True)
        raise typer.Exit(EXIT_FAILED)
    typer.echo(f"{len(files)} shards are whole")


@app.command()
def build(
    model: Model,
    data: Data,
    out: Out,
    k: K = 64,
    temperature: Temperature = 1.0,
    bits: Bits = 8,
    split: Split = "train",
    seq_len: SeqLen = 256,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 4,
    shard_rows: ShardRows = 65536,
    device: Device = "auto",
) -> None:
    """Run a causal language model over a text and store the top k of each position.

    A stopped run continues with the same command. Under torchrun each process takes its share:
    `torchrun --nproc-per-node 2 -m kdkernels cache build ...`.
    """
    options = dict(locals())
    with one_sentence("cache build", "cache,distill", "the same command continues"):
        from rich.console import Console

        from kdkernels.api.cache.build import BuildOptions
        from kdkernels.api.cache.build import build as run

        run(BuildOptions(**options), Console())
