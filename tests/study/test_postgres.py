"""Several machines with one store: a PostgreSQL server of the test's own, on the loopback."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from helpers.studied import PROGRAM, results

from kdkernels.api.study import store as stores
from kdkernels.api.study.config import make_config
from kdkernels.api.study.store import WORKER, Store
from kdkernels.api.study.worker import keyed

pytestmark = pytest.mark.postgres


def binary(name: str) -> Path | None:
    """A program of the server: on the path, or where Debian has it."""
    found = [*Path("/usr/lib/postgresql").glob(f"*/bin/{name}")]
    on_path = shutil.which(name)
    return Path(on_path) if on_path else max(found, default=None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server that ends with the tests."""
    initdb, postgres = binary("initdb"), binary("postgres")
    if initdb is None or postgres is None:
        pytest.skip("no PostgreSQL server is installed (apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    # It refuses to run as root; Debian's package brings a user for it.
    root = os.geteuid() == 0
    user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []}
    user = user if root else {}
    folder = Path(tempfile.mkdtemp(prefix="kdkernels-postgres-"))
    if root:
        who = pwd.getpwnam("postgres")
        os.chown(folder, who.pw_uid, who.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, run = folder / "data", {"cwd": folder, "stdout": subprocess.DEVNULL, **user}
    subprocess.run([initdb, "-D", data, "-U", "tester", "-A", "trust", "-N"], check=True, **run)
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"]
    with subprocess.Popen(
        [postgres, "-D", data, *options], stderr=subprocess.DEVNULL, **run
    ) as process:
        try:
            _wait(port, process)
            yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait(timeout=30)
            shutil.rmtree(folder)


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            psycopg.connect(f"host=127.0.0.1 port={port} user=tester dbname=postgres").close()
            return
        except psycopg.OperationalError:
            time.sleep(0.1)


def test_two_machines_share_one_study(
    server: str, finished: tuple[Path, Result], write_study: Any, tmp_path: Path, values: Any
) -> None:
    """Two commands with a folder each, as on two machines; one is killed and started again."""
    config = write_study(tmp_path)

    def start(name: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", PROGRAM, str(config), "--out", str(tmp_path / name)]
        arguments += ["--storage", server, "--workers", "1", "--threads", "1"]
        return subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    keys = keyed(make_config(values))
    with start("one") as one, start("two") as two:
        store = Store(server, "small", tmp_path / "watch")
        deadline = time.monotonic() + 240
        while len(store.results(keys)) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        two.kill()
        with start("two") as again:
            output = {name: p.communicate(timeout=240)[0] for name, p in
                      (("one", one), ("again", again))}  # fmt: skip
    assert one.returncode == again.returncode == 0, output
    trials = [trial for trial in store._trials() if trial.state.name == "COMPLETE"]
    assert sorted(trial.user_attrs["key"] for trial in trials) == sorted(keys)
    assert len({trial.user_attrs[WORKER] for trial in trials}) >= 2
    for name in ("one", "two"):
        assert results(tmp_path / name) == results(finished[0])


def test_silence_is_death(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a worker on another machine nothing is known but its signs of life."""
    monkeypatch.setattr(stores, "HEARTBEAT", 1)
    monkeypatch.setattr(stores, "GRACE", 3)
    here, there = (Store(server, "silence", tmp_path / name) for name in ("here", "there"))
    here.enqueue(["quiet", "alive"])
    keys: dict[str, None] = {"quiet": None, "alive": None}
    with there.worker() as name:
        quiet, alive = there.take(name, keys), there.take(name, keys)
        assert quiet is not None and alive is not None
        with alive.alive():
            deadline = time.monotonic() + 30
            while not here.recover(keys):
                assert time.monotonic() < deadline
                time.sleep(0.2)
            again = here.take("other", keys)
            assert again is not None and again.key == "quiet"
            assert again.finish({"by": "here"}, 0.0)
            assert not quiet.finish({"by": "there"}, 0.0)
        assert alive.finish({"by": "there"}, 0.0)
    assert here.results(keys) == {"quiet": {"by": "here"}, "alive": {"by": "there"}}


def make_store(url: str, folder: Path) -> None:
    """Opens a store; what a process of the test does."""
    Store(url, "race", folder).enqueue(["key"])


def test_several_make_the_tables_at_a_time(server: str, tmp_path: Path) -> None:
    import psycopg

    address = server.partition("//")[2].partition("/")[0]
    host, _, port = address.partition("@")[2].partition(":")
    with psycopg.connect(host=host, port=int(port), user="tester", dbname="postgres") as connection:
        connection.autocommit = True
        connection.execute("CREATE DATABASE race")
    context = multiprocessing.get_context("spawn")
    url = server.removesuffix("/postgres") + "/race"
    processes = [
        context.Process(target=make_store, args=(url, tmp_path / str(i))) for i in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
