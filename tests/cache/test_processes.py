"""Kills at any moment, and several processes at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import cached
from helpers.cached import assert_stored, example, writer

from kdkernels import TeacherCache

SCRIPT = Path(cached.__file__)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The writing script in a process of its own."""
    command = [sys.executable, *(str(item) for item in (SCRIPT, *arguments))]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def files(folder: Path) -> dict[str, bytes]:
    """Everything but locks."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".lock")}


def temporary(folder: Path) -> list[str]:
    return [name for name in files(folder) if name.startswith(".tmp-")]


def test_killed_writer_goes_on_where_it_was(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    done = run(killed, "--kill-in-shard", 2)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(temporary(killed)) == 1  # half a shard
    # What is there is readable, and nothing of the half shard is in it.
    assert len(TeacherCache(killed)) == 8
    done = run(killed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("computes ")[1].strip() == "8"  # the first that was lost
    assert temporary(killed) == []
    assert run(whole).returncode == 0
    assert files(killed) == files(whole)
    assert len(TeacherCache(killed)) == 18


@pytest.mark.distributed
def test_two_processes_write_one_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(tmp_path / "cache"), "--both"],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cache = TeacherCache(tmp_path / "cache")
    assert set(cache) == {example(number)[0] for number in range(18)}
    for number in range(18):
        assert_stored(cache, number)
    shards = sorted(path.name for path in (tmp_path / "cache").glob("*.safetensors"))
    assert {name[:9] for name in shards} == {"rank00000", "rank00001"}
    # Example 0 is in shards of both, from different teachers; that of rank 0 counts.
    assert cache.num_rows == 19 * cached.TOKENS
    assert not (example(0, seed=1)[2] == example(0)[2]).all()


def test_a_rank_is_of_one_process(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        with pytest.raises(ValueError, match="rank must be of one process at a time, got 0"):
            writer(tmp_path)
        with writer(tmp_path, rank=1) as other:
            other.add(*example(0))
        out.add(*example(1))
    writer(tmp_path).close()
    assert len(TeacherCache(tmp_path)) == 2


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    leftovers = [tmp_path / f".tmp-{name}" for name in ("rank00000-a", "rank00001-b", "manifest-c")]
    with writer(tmp_path, rank=1) as living:
        for path in leftovers:
            path.write_text("half")
        writer(tmp_path, rank=0).close()
        assert [path.exists() for path in leftovers] == [False, True, False]
        living.add(*example(0))
    writer(tmp_path, rank=0).close()
    assert not leftovers[1].exists()


def test_rank_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with writer(tmp_path) as out:
        out.add(*example(0))
    assert (tmp_path / "rank00003-000000.safetensors").exists()


def test_readers_of_several_processes(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        for number in range(8):
            out.add(*example(number))
    cache = TeacherCache(tmp_path)
    asked = [example(number)[:2] for number in range(8)]
    loader = torch.utils.data.DataLoader(
        range(8),
        batch_size=2,
        num_workers=2,
        collate_fn=lambda b: cache.rows([asked[i] for i in b]),
    )
    got = torch.cat([ids for ids, _ in loader])
    assert torch.equal(got, cache.rows(asked)[0])
