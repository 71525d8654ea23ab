"""The store: every trial once, whatever dies in between."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from kdkernels.api.distill.errors import DistillError
from kdkernels.api.study import store as stores
from kdkernels.api.study.store import Store

KEYS = dict.fromkeys([f"key-{i}" for i in range(12)])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(None, "study", tmp_path)


def states(store: Store) -> list[str]:
    return [trial.state.name for trial in store._trials()]


def take_all(folder: Path, out: Any) -> None:
    """Takes trials until there are none; what a worker process of the test does."""
    store = Store(None, "study", folder)
    with store.worker() as name:
        while (taken := store.take(name, KEYS)) is not None:
            out.put((taken.key, name))
            taken.finish({"by": name}, 1.0)


def test_enqueued_once(store: Store) -> None:
    assert store.enqueue(list(KEYS)) == 12
    assert store.enqueue(list(KEYS)) == 0
    assert store.enqueue([*KEYS, "more"]) == 1
    assert store.unfinished(KEYS) == 12


def test_results_of_other_studies_are_left_alone(store: Store) -> None:
    store.enqueue(["other", "key-0"])
    with store.worker() as name:
        taken = store.take(name, KEYS)
        assert taken is not None and taken.key == "key-0"
        assert taken.finish({"x": [1.5, None]}, 1.0)
        assert store.take(name, KEYS) is None
    assert store.results(KEYS) == {"key-0": {"x": [1.5, None]}}
    assert store.unfinished(KEYS) == 0 and states(store) == ["WAITING", "COMPLETE"]


def test_processes_share_the_trials(store: Store, tmp_path: Path) -> None:
    store.enqueue(list(KEYS))
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    workers = [context.Process(target=take_all, args=(tmp_path, out)) for _ in range(3)]
    for worker in workers:
        worker.start()
    taken = [out.get(timeout=120) for _ in KEYS]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert sorted(key for key, _ in taken) == sorted(KEYS)
    assert {key: r["by"] for key, r in store.results(KEYS).items()} == dict(taken)


@pytest.fixture
def dead(store: Store, tmp_path: Path) -> Iterator[Store]:
    """A store in which a process has taken the first trial and was killed."""
    store.enqueue(list(KEYS))
    program = (
        "import sys, time; from pathlib import Path; from kdkernels.api.study.store import Store\n"
        f"store = Store(None, 'study', Path({str(tmp_path)!r}))\n"
        "with store.worker() as name:\n"
        f"    store.take(name, {KEYS!r})\n"
        "    print('taken', flush=True)\n"
        "    time.sleep(600)\n"
    )
    arguments = [sys.executable, "-c", program]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "taken\n"
        assert store.recover(KEYS) == 0  # it lives
        process.send_signal(signal.SIGKILL)
    yield store


def test_a_killed_trial_is_tried_again(dead: Store) -> None:
    assert states(dead)[0] == "RUNNING"
    assert dead.recover(KEYS) == 1
    assert states(dead)[0] == "FAIL" and dead.unfinished(KEYS) == 12
    with dead.worker() as name:
        for _ in KEYS:
            taken = dead.take(name, KEYS)
            assert taken is not None and taken.finish({"key": taken.key}, 0.0)
        assert dead.take(name, KEYS) is None
    assert dead.results(KEYS) == {key: {"key": key} for key in KEYS}
    assert dead.errors(KEYS) == {}


def test_one_taken_for_dead_does_not_count_twice(store: Store) -> None:
    store.enqueue(["key-0"])
    with store.worker() as slow, store.worker() as quick:
        first = store.take(slow, KEYS)
        assert first is not None
        store._end(first._trial, TrialState.FAIL)
        store.recover(KEYS)
        second = store.take(quick, KEYS)
        assert second is not None and second.finish({"by": "second"}, 0.0)
        assert not first.finish({"by": "first"}, 0.0)
    assert store.results(KEYS) == {"key-0": {"by": "second"}}


def test_a_key_that_two_machines_enqueued_runs_once(store: Store) -> None:
    for _ in range(2):
        store._study.add_trial(
            optuna.trial.create_trial(state=TrialState.WAITING, user_attrs={"key": "key-0"})
        )
    with store.worker() as name:
        assert store.take(name, KEYS) is not None
        assert store.take(name, KEYS) is None
    assert states(store) == ["RUNNING", "PRUNED"]


def test_errors_are_not_tried_again_before_a_new_start(store: Store) -> None:
    store.enqueue(["key-0"])
    with store.worker() as name:
        taken = store.take(name, KEYS)
        assert taken is not None
        taken.fail("ValueError: no")
        store.recover({"key-0": None})
        assert store.take(name, KEYS) is None
        assert store.errors(KEYS) == {"key-0": "ValueError: no"}
        assert store.enqueue(["key-0"]) == 1  # a new start
        assert store.errors(KEYS) == {}


def test_what_kills_its_workers_is_given_up(store: Store) -> None:
    store.enqueue(["key-0"])
    for attempt in range(stores.ATTEMPTS):
        with store.worker() as name:
            assert store.take(name, KEYS) is not None, attempt
        # The worker's lock is gone, and on one machine that is its death.
        assert store.recover({"key-0": None}) == 1
    with store.worker() as name:
        assert store.take(name, KEYS) is None
    assert store.errors(KEYS) == {"key-0": "died 3 times"}


def test_stopping_is_no_failure(store: Store) -> None:
    store.enqueue(["key-0"])
    for _ in range(stores.ATTEMPTS + 1):
        with store.worker() as name:
            taken = store.take(name, KEYS)
            assert taken is not None
            taken.stop()
        store.recover({"key-0": None})
    assert store.unfinished(KEYS) == 1 and store.errors(KEYS) == {}


def test_one_that_died_before_its_name_was_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.enqueue(["key-0"])
    assert store._claim(store._trials()[0])
    assert store.recover({"key-0": None}) == 0
    monkeypatch.setattr(stores, "GRACE", 0)
    time.sleep(0.01)
    assert store.recover({"key-0": None}) == 1
    assert store.unfinished(KEYS) == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing", "storage must be a database to write to, got: "),
        ("postgresql+nodriver://x/y", "storage must "),
        ("sqlite:////nowhere/at/all.db", "storage must be a database to write to, got: "),
    ],
)
def test_no_database(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        Store(url, "study", tmp_path)


def test_locks_of_the_dead_can_be_taken(tmp_path: Path) -> None:
    store = Store(None, "study", tmp_path)
    with store.worker() as name:
        assert (tmp_path / "workers" / f"{name}.lock").exists()
        assert os.listdir(tmp_path / "workers") == [f"{name}.lock"]
    assert os.listdir(tmp_path / "workers") == []


def test_a_database_that_goes_away_is_one_sentence() -> None:
    gone = OperationalError("SELECT 1", {}, Exception("server closed the connection"))
    sentence = str(stores.store_error(gone))
    assert sentence.startswith("storage must stay a database that answers, got: ")
    assert "server closed" in sentence and sentence.endswith("the same command continues")
    assert stores.store_error(ValueError("x")) is None
