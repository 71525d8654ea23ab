"""Trials and results in a database, by Optuna: SQLite for one machine, PostgreSQL for many.

A trial of the grid is a trial of Optuna with its key among the user attributes. It is taken by one
worker at a time, and one result of it counts whatever happens: a worker that dies, or is taken for
dead, leaves a failed trial behind, and its key is enqueued again.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from kdkernels.api._files import locked, try_lock
from kdkernels.api.distill.errors import DistillError

FILE = "study.db"
KEY, WORKER, RESULT, ERROR, STOPPED = "key", "worker", "result", "error", "stopped"
LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
# Seconds between signs of life, and without one until a worker elsewhere is taken for dead.
HEARTBEAT, GRACE = 20, 120
# How often a key is tried again before a new start of the command, its workers having died.
ATTEMPTS = 3
SQLITE_TIMEOUT = 120
OPENINGS = 5


class Store:
    """The trials of one study.

    Args:
        url: A database of SQLAlchemy, such as ``postgresql+psycopg://user@host/name``; None for a
            SQLite file in the folder.
        name: Name of the study in it.
        folder: Local files: the SQLite database, locks of this machine's workers.

    Raises:
        DistillError: The database cannot be opened.
    """

    def __init__(self, url: str | None, name: str, folder: Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self._workers = folder / "workers"
        self._workers.mkdir(parents=True, exist_ok=True)
        self._local = url is None
        self._lock = folder / ".store.lock"
        try:
            with self._alone():
                self._storage = self._open(url or f"sqlite:///{folder / FILE}")
                self._study = optuna.create_study(
                    storage=self._storage,
                    study_name=name,
                    direction="maximize",
                    load_if_exists=True,
                    sampler=optuna.samplers.RandomSampler(),
                )
        except ModuleNotFoundError as error:
            if error.name in ("optuna", "sqlalchemy"):
                raise
            raise DistillError(
                f"storage must name a database whose driver is installed, got no {error.name}"
            ) from error
        except Exception as error:  # SQLAlchemy raises many kinds, Optuna some of its own
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise DistillError(f"storage must be a database to write to, got: {reason}") from error

    def _open(self, url: str) -> RDBStorage:
        """The database with its tables, which another machine may be making at this moment."""
        for attempt in range(OPENINGS):
            try:
                return RDBStorage(
                    url,
                    {"connect_args": {"timeout": SQLITE_TIMEOUT}} if self._local else {},
                    # On one machine locks tell who lives.
                    heartbeat_interval=None if self._local else HEARTBEAT,
                    grace_period=None if self._local else GRACE,
                )
            except (IntegrityError, ProgrammingError):
                if attempt == OPENINGS - 1:
                    raise
                time.sleep(0.2 * 2**attempt)
        raise AssertionError

    def _alone(self) -> AbstractContextManager[None]:
        """Keeps this machine's other processes out where the database has no row locks."""
        return locked(self._lock) if self._local else nullcontext()

    def enqueue(self, keys: Sequence[str]) -> int:
        """Adds a trial for every key that has none waiting, running or complete; says how many.

        Two machines that do so at a time may both add one: :meth:`take` uses the first.
        """
        with self._alone():
            live = {t.user_attrs.get(KEY) for t in self._trials() if t.state in LIVE}
            missing = [key for key in keys if key not in live]
            for key in missing:
                self._study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={KEY: key}))
        return len(missing)

    def take(self, worker: str, keys: Mapping[str, Any]) -> Taken | None:
        """Takes the first waiting trial of the keys; None where there is none.

        Args:
            worker: Who takes it, as :meth:`worker` names it.
            keys: The keys of this study's grid.
        """
        with self._alone():
            trials = self._trials()
            first: dict[str, int] = {}
            for trial in trials:
                if trial.state in LIVE:
                    first.setdefault(trial.user_attrs.get(KEY, ""), trial.number)
            for trial in trials:
                key = trial.user_attrs.get(KEY, "")
                if trial.state != TrialState.WAITING or key not in keys:
                    continue
                if not self._claim(trial):
                    continue
                if first[key] != trial.number:  # a second one of its key
                    self._end(trial, TrialState.PRUNED)
                    continue
                self.beat(trial)
                self._storage.set_trial_user_attr(trial._trial_id, WORKER, worker)
                return Taken(self, key, trial)
        return None

    def beat(self, trial: FrozenTrial) -> None:
        """A sign of life, for other machines."""
        if not self._local:
            self._storage.record_heartbeat(trial._trial_id)

    def _claim(self, trial: FrozenTrial) -> bool:
        """Whether this process is the one that runs a waiting trial."""
        try:
            return self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    def recover(self, keys: Mapping[str, Any]) -> int:
        """Fails the trials of dead workers and enqueues their keys again; says how many died."""
        before = sum(t.state == TrialState.FAIL for t in self._trials())
        if not self._local:
            fail_stale_trials(self._study)
        with self._alone():
            for trial in self._trials():
                if trial.state == TrialState.RUNNING and self._is_dead(trial):
                    self._end(trial, TrialState.FAIL)
            trials = self._trials()
        died = sum(t.state == TrialState.FAIL for t in trials) - before
        deaths: dict[str, int] = {}
        for trial in trials:
            if trial.state == TrialState.FAIL and STOPPED not in trial.user_attrs:
                key = trial.user_attrs.get(KEY, "")
                # An error would come again.
                deaths[key] = deaths.get(key, 0) + (ATTEMPTS if ERROR in trial.user_attrs else 1)
        self.enqueue([key for key in keys if deaths.get(key, 0) < ATTEMPTS])
        return died

    def _is_dead(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get(WORKER)
        if worker is None:  # it died between taking the trial and saying so, or is about to say so
            started = trial.datetime_start
            return started is not None and datetime.now() - started > timedelta(seconds=GRACE)
        path = self._workers / f"{worker}.lock"
        if not path.exists():
            return self._local  # else it is on another machine: its heartbeat tells
        lock = try_lock(path)
        if lock is not None:
            lock.close()
        return lock is not None

    @contextmanager
    def worker(self) -> Iterator[str]:
        """A name for this process, and the lock that says it lives."""
        name = uuid.uuid4().hex[:12]
        path = self._workers / f"{name}.lock"
        lock = try_lock(path)
        assert lock is not None
        with lock:
            yield name
        path.unlink(missing_ok=True)

    def _end(self, trial: FrozenTrial, state: TrialState) -> bool:
        """Ends a trial; False where another process did."""
        try:
            return self._storage.set_trial_state_values(trial._trial_id, state)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def results(self, keys: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The result of every key that has one: the first, should there be two."""
        found: dict[str, dict[str, Any]] = {}
        for trial in self._trials():
            key = trial.user_attrs.get(KEY, "")
            if trial.state == TrialState.COMPLETE and key in keys and key not in found:
                found[key] = json.loads(trial.user_attrs[RESULT])
        return found

    def errors(self, keys: Mapping[str, Any]) -> dict[str, str]:
        """What was raised by the trials of keys that have no live trial."""
        trials = self._trials()
        live = {t.user_attrs.get(KEY) for t in trials if t.state in LIVE}
        return {
            t.user_attrs[KEY]: t.user_attrs.get(ERROR, f"died {ATTEMPTS} times")
            for t in trials
            if t.state == TrialState.FAIL
            and STOPPED not in t.user_attrs
            and t.user_attrs.get(KEY) in keys
            and t.user_attrs.get(KEY) not in live
        }

    def unfinished(self, keys: Mapping[str, Any]) -> int:
        """How many trials of the keys wait or run."""
        states = (TrialState.WAITING, TrialState.RUNNING)
        return len({t.user_attrs.get(KEY) for t in self._trials() if t.state in states} & set(keys))


class Taken:
    """A trial that this process runs."""

    def __init__(self, store: Store, key: str, trial: FrozenTrial) -> None:
        self.key = key
        self._store, self._trial = store, trial
        self._done = threading.Event()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Gives signs of life for the duration of the block."""
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT):
            try:
                self._store.beat(self._trial)
            except optuna.exceptions.StorageInternalError:
                time.sleep(1.0)  # the database is busy or away; the next one may get through

    def finish(self, result: Mapping[str, Any], value: float) -> bool:
        """Keeps the result; False where another worker has this trial by now."""
        return self._close(RESULT, json.dumps(result), TrialState.COMPLETE, value)

    def fail(self, error: str) -> None:
        """Keeps what was raised."""
        self._close(ERROR, error, TrialState.FAIL)

    def stop(self) -> None:
        """Gives the trial back, not done."""
        self._close(STOPPED, "true", TrialState.FAIL)

    def _close(
        self, attribute: str, text: str, state: TrialState, value: float | None = None
    ) -> bool:
        storage, number = self._store._storage, self._trial._trial_id
        values = None if value is None else [value]
        try:
            with self._store._alone():
                storage.set_trial_user_attr(number, attribute, text)
                return storage.set_trial_state_values(number, state, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False  # taken for dead: the result of the other attempt counts


def store_error(error: Exception) -> DistillError | None:
    """The sentence for a database that went away; None when the error is another one."""
    if not isinstance(error, SQLAlchemyError | optuna.exceptions.StorageInternalError):
        return None
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return DistillError(
        f"storage must stay a database that answers, got: {reason}; the same command continues"
    )
