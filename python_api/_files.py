"""Files that are written whole or not at all, so a kill at any moment is survivable."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TEMPORARY_PREFIX = ".tmp-"


def write_file(path: Path, write: Callable[[Path], object], prefix: str = TEMPORARY_PREFIX) -> None:
    """Writes a file through a temporary name and renames it into place.

    Args:
        path: The file to make or replace.
        write: Called with the temporary path (same suffix) to fill it.
        prefix: Beginning of the temporary name, by which leftovers of a killed process are known.
    """
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        sync(temporary)
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sync(path: Path) -> None:
    """Brings a file or a folder's names to the disk: a rename must not outrun the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    """The process's umask; temporary files are private, finished ones are not."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Locks go with their process, however it ends.
def try_lock(path: Path) -> IO[str] | None:
    """Takes a lock until the returned file is closed; None where another process has it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for a lock and holds it for the duration of the block."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_folder(path: Path, write: Callable[[Path], object], *, overwrite: bool = False) -> None:
    """Fills a folder under a temporary name beside it and renames it into place.

    Args:
        path: The folder to make; its parents are made too. An empty one is replaced.
        write: Called with the temporary folder to fill it.
        overwrite: Whether one that holds something may be replaced. A process killed between the
            two renames leaves the old one under a temporary name.

    Raises:
        FileExistsError: It holds something and must not be replaced, or is no folder.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} must be a folder, got a file")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path} must be new or empty unless overwrite=True, got files in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{TEMPORARY_PREFIX}{path.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as name:
        fresh, old = Path(name) / "new", Path(name) / "old"
        fresh.mkdir()
        write(fresh)
        for file in [*fresh.rglob("*"), fresh]:
            sync(file)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(fresh, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        sync(path.parent)
