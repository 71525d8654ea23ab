"""Files of a run: whole or not at all, and nothing of a killed process counts."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.store import (
    RunFolder,
    disk_error,
    write_file,
    write_folder,
    write_text,
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create("name: run\n")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_folder(path, lambda temporary: (temporary / "a").write_text("old"))

    def fail(temporary: Path) -> None:
        (temporary / "a").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_folder(path, fail)
    assert (path / "a").read_text() == "old"
    write_folder(path, lambda temporary: (temporary / "b").write_text("new"))
    assert names(path) == ["b"]
    assert names(tmp_path) == ["model"]


def test_finished_files_are_readable_by_others(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    assert (tmp_path / "file").stat().st_mode & 0o400
    assert not (tmp_path / "file").stat().st_mode & 0o111


def test_leftovers_and_unfinished_units_are_dropped(run: RunFolder) -> None:
    with run.locked():
        run.log("teacher", step=1)
        run.log("labels-seed0", step=1)
        run.complete("teacher", {"seconds": 1.0})
    (run.path / ".tmp-model").mkdir()
    (run.path / ".tmp-model" / "weights").write_text("half")
    (run.state / ".tmp-x.json").write_text("{")
    with (run.path / "log.jsonl").open("a") as log:
        log.write('{"unit": "teacher", "st')  # torn by a kill in the middle of a line
    with run.locked():
        pass
    assert not (run.path / ".tmp-model").exists()
    assert names(run.state) == ["teacher.json"]
    lines = (run.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"unit": "teacher", "step": 1}]


def test_two_processes_cannot_share_a_run(run: RunFolder) -> None:
    with (
        run.locked(),
        pytest.raises(DistillError, match="must not be in use"),
        RunFolder(run.path).locked(),
    ):
        pass
    with run.locked():
        pass


def test_disk_errors_become_sentences(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "continue with --resume" in str(disk_error(full, tmp_path))
    wrapped = RuntimeError("Error while serializing: I/O error: No space left on device")
    assert "no space left" in str(disk_error(wrapped, tmp_path))
    assert "out must be" in str(disk_error(PermissionError(13, "denied"), tmp_path))
    assert disk_error(ValueError("a defect"), tmp_path) is None
