"""A process that takes trials of a study until none is left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.runner import quiet_transformers
from kdkernels.api.distill.train import Runtime
from kdkernels.api.study.config import StudyConfig
from kdkernels.api.study.grid import Trial, trials_of
from kdkernels.api.study.store import Store, Taken
from kdkernels.api.study.train import Trainer

TEACHERS = "teachers"
# Seconds between looks at a store in which others run the last trials.
POLL = 1.0


class Orphaned(Exception):
    """The process that started this one is gone."""


class Worker:
    """Runs trials in this process.

    Args:
        config: The study.
        store: Where its trials are.
        folder: The study's folder.
        runtime: Device and precision.
        notify: Receives one line per thing worth telling.
        parent: The process without which this one must not go on; None: it is on its own.
    """

    def __init__(
        self,
        config: StudyConfig,
        store: Store,
        folder: Path,
        runtime: Runtime,
        notify: Callable[[str], None],
        parent: int | None = None,
    ) -> None:
        self._store = store
        self._trials = keyed(config)
        self_taught = any(trial.loss.teacher == "self" for trial in self._trials.values())
        self._trainer = Trainer(folder / TEACHERS, runtime, self_taught, notify)
        self._parent = parent

    def run(
        self,
        on_trial: Callable[[Trial], None] = lambda trial: None,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes trials until every one is complete, failed or given up.

        Args:
            on_trial: Called with a trial that begins.
            on_event: Called after every step, as in ``distill.train.fit``.
            after: Called after every trial, and while there is nothing to do but wait.
        """

        def listen(event: dict[str, Any]) -> None:
            # One whose parent was killed has another one.
            if self._parent is not None and os.getppid() != self._parent:
                raise Orphaned
            on_event(event)

        with self._store.worker() as name:
            while True:
                taken = self._store.take(name, self._trials)
                if taken is not None:
                    trial = self._trials[taken.key]
                    on_trial(trial)
                    self._do(taken, trial, listen)
                    after()
                    continue
                self._store.recover(self._trials)
                after()
                if not self._store.unfinished(self._trials):
                    return
                time.sleep(POLL)

    def _do(self, taken: Taken, trial: Trial, listen: Callable[[dict[str, Any]], None]) -> None:
        """Runs one trial; what it raises ends the trial, not the worker."""
        try:
            with taken.alive():
                result = self._trainer.run(trial, listen)
            sign = 1.0 if result["higher_is_better"] else -1.0
            taken.finish(result, sign * result["figures"]["dev"][result["metric"]])
        except (KeyboardInterrupt, Orphaned):
            taken.stop()
            raise
        except DistillError as error:
            taken.fail(str(error))
        except Exception as error:  # one bad trial must not end a study of hundreds
            taken.fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def keyed(config: StudyConfig) -> Mapping[str, Trial]:
    """The trials of a study by key."""
    return {trial.key: trial for trial in trials_of(config)}


def work(
    config: StudyConfig, url: str | None, folder: Path, runtime: Runtime, threads: int
) -> None:
    """What a worker process does from start to end.

    Args:
        config: The study.
        url: Its database; None for the file in the folder.
        folder: The study's folder.
        runtime: Device and precision.
        threads: CPU threads.
    """
    quiet_transformers()
    torch.set_num_threads(threads)
    store = Store(url, config.name, folder)
    parent = os.getppid()
    worker = Worker(
        config, store, folder, runtime, lambda line: print(line, file=sys.stderr), parent
    )
    with suppress(KeyboardInterrupt, Orphaned):
        worker.run()
