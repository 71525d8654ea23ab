"""What the commands that make runs have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


@contextmanager
def one_sentence(command: str) -> Iterator[None]:
    """Makes a failure in the block one sentence and an exit code.

    Args:
        command: Name of the command, which the sentence begins with.
    """
    from kdkernels.api.distill.errors import DistillError

    try:
        yield
    except DistillError as error:
        typer.echo(f"{command}: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from error
    except ModuleNotFoundError as error:
        typer.echo(
            f"{command}: the package {error.name} must be installed, got none; "
            "run `pip install 'kdkernels[distill]'`",
            err=True,
        )
        raise typer.Exit(EXIT_FAILED) from error
    except KeyboardInterrupt as error:
        typer.echo(f"{command}: stopped; the same command with --resume continues", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error


def parse_lists(given: dict[str, Any], kinds: Mapping[str, Callable[[str], Any]]) -> None:
    """Turns the options that are lists, such as ``0,1,2``, into tuples.

    Args:
        given: The options that were given, by key.
        kinds: Type of the items of each list.

    Raises:
        DistillError: An item is not of that type.
    """
    from kdkernels.api.distill.errors import DistillError

    for key, kind in kinds.items():
        if key not in given:
            continue
        try:
            given[key] = tuple(kind(item) for item in given[key].split(","))
        except ValueError as error:
            option, words = key.replace("_", "-"), "integers" if kind is int else "numbers"
            raise DistillError(
                f"{option} must be {words} separated by commas, got {given[key]!r}"
            ) from error
