"""What the commands have in common: how they fail, and options that are lists."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
# How the project says what it was given and what it takes.
CONTRACT = re.compile(r"\S must .*, got ", re.DOTALL)


class Debugging:
    """Whether failures are shown with their traceback, which ``--debug`` asks for."""

    on = False


def sentence(error: BaseException) -> str:
    """The line that a failure is shown as: a contract as it is, anything else with its type."""
    lines = str(error).splitlines() or [""]
    if CONTRACT.search(lines[0]):
        return lines[0]
    name = type(error).__name__
    text = f"{name}: {lines[0]}" if lines[0] else name
    return f"{text} (kdkernels --debug ... shows where)"


@contextmanager
def one_sentence(
    command: str,
    extras: str = "distill",
    hint: str = "there is nothing to resume yet",
) -> Iterator[None]:
    """Makes a failure that the user can act on one sentence and an exit code.

    Args:
        command: Name of the command, which the sentence begins with.
        extras: What to install where a package is missing.
        hint: How to go on after an interruption that does not know better itself.
    """
    from kdkernels.api.distill.errors import DistillError

    try:
        yield
    except DistillError as error:
        _fail(f"{command}: {error}", error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        _fail(
            f"{command}: the package {package} must be installed, got none; "
            f"run `pip install 'kdkernels[{extras}]'`",
            error,
        )
    except KeyboardInterrupt as error:
        typer.echo(f"{command}: stopped; {getattr(error, 'hint', hint)}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error


def _fail(line: str, error: Exception) -> NoReturn:
    if Debugging.on:
        raise error
    typer.echo(line, err=True)
    raise typer.Exit(EXIT_FAILED) from error


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
