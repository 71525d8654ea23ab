"""Files of a run: each is written whole or not at all, so a kill at any moment is survivable."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kdkernels.api._files import TEMPORARY_PREFIX, sync, umask, write_file, write_text
from kdkernels.api.distill.errors import DistillError

LOG_NAME = "log.jsonl"

__all__ = ["LOG_NAME", "RunFolder", "disk_error", "write_file", "write_folder", "write_text"]


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a folder of files through a temporary name and renames it into place.

    Args:
        path: The folder to make or replace.
        write: Called with the temporary folder to fill it.
    """
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
    try:
        write(temporary)
        for file in temporary.rglob("*"):
            sync(file)
            os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~umask())
        os.chmod(temporary, 0o777 & ~umask())
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def disk_error(error: Exception, folder: Path) -> DistillError | None:
    """The sentence for a failed write below ``folder``; None when the error is another one."""
    full = "No space left on device" in str(error) or "Disk quota exceeded" in str(error)
    if full or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return DistillError(
            f"the disk must have room for the run, got no space left for {folder}; "
            "free some and continue with --resume"
        )
    if isinstance(error, PermissionError):
        return DistillError(f"out must be a folder that can be written, got {folder}: {error}")
    return None


class RunFolder:
    """The files of one run.

    ``state/<unit>.json`` says that a unit of work (the teacher, one arm with one seed) is complete.
    It is written last, after everything the unit leaves behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state"
        self._log: IO[str] | None = None

    def create(self, config_text: str) -> None:
        """Makes the folder and, last, its configuration."""
        self.state.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, config_text)

    @property
    def config_file(self) -> Path:
        """The configuration; a folder without it is a run that has not begun."""
        return self.path / "config.yaml"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for this process; the lock goes with the process, however it ends."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DistillError(
                    f"the run must not be in use, got {self.path}, held by another process"
                ) from error
            self._clean()
            with (self.path / LOG_NAME).open("a", encoding="utf-8") as self._log:
                yield
            self._log = None

    def _clean(self) -> None:
        """Drops what a killed process left: temporary files, log lines of unfinished units."""
        for folder in (self.path, self.state):
            for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
        log = self.path / LOG_NAME
        if log.exists():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(log, "".join(line for line in lines if self._belongs(line)))

    def _belongs(self, line: str) -> bool:
        """Whether a log line is whole and of a completed unit."""
        try:
            unit = json.loads(line)["unit"]
        except (ValueError, KeyError):
            return False
        return line.endswith("\n") and self.result(unit) is not None

    def log(self, unit: str, **values: Any) -> None:
        """Appends one line to the run's log."""
        assert self._log is not None, "log() needs locked()"
        self._log.write(json.dumps({"unit": unit, **values}) + "\n")
        self._log.flush()

    def result(self, unit: str) -> dict[str, Any] | None:
        """The result of a completed unit, or None."""
        path = self.state / f"{unit}.json"
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    def complete(self, unit: str, result: dict[str, Any]) -> None:
        """Marks a unit as completed."""
        write_text(self.state / f"{unit}.json", json.dumps(result, indent=1) + "\n")
