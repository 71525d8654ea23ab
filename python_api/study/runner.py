"""Opens a study, starts its workers, shows what they do, and writes the report."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kdkernels.api._files import write_text
from kdkernels.api.distill.errors import DistillError, require
from kdkernels.api.distill.progress import Display
from kdkernels.api.distill.runner import choose_runtime, quiet_transformers
from kdkernels.api.distill.store import disk_error
from kdkernels.api.distill.train import Runtime
from kdkernels.api.study import analysis, report
from kdkernels.api.study.analysis import Row
from kdkernels.api.study.config import StudyConfig, read_config
from kdkernels.api.study.estimate import dry_run
from kdkernels.api.study.grid import Trial, trials_of
from kdkernels.api.study.store import FILE, Store, store_error
from kdkernels.api.study.worker import POLL, Worker, keyed, work

CONFIG, EXPORT = "config.yaml", "trials.jsonl"
# How many workers that died are replaced.
REPLACEMENTS = 3


def run_study(
    path: Path,
    out: Path | None,
    storage: str | None,
    workers: int | None,
    threads: int | None,
    dry: bool,
    console: Console,
) -> Path:
    """Runs or continues a study.

    Args:
        path: The configuration.
        out: The study's folder; None for ``studies/NAME``.
        storage: Database; None for a file in the folder.
        workers: Worker processes on this machine; None for one a core, or one for a GPU.
        threads: CPU threads of each; None for an equal share of the cores.
        dry: Only print the trials and how long they will take.
        console: Where to print.

    Returns:
        The study's folder.

    Raises:
        DistillError: Anything the user can act on.
    """
    quiet_transformers()
    config = read_config(path)
    runtime = choose_runtime(config)
    cores = len(os.sched_getaffinity(0))
    if workers is None:
        workers = cores if runtime.device.type == "cpu" else 1
    require(workers >= 1, "workers", "be at least 1", workers)
    threads = max(1, cores // workers) if threads is None else threads
    require(threads >= 1, "threads", "be at least 1", threads)
    folder = out or Path("studies") / config.name
    display = Display(console)
    if dry:
        torch.set_num_threads(threads)
        dry_run(config, runtime, workers, display)
        return folder
    try:
        prepare(folder, path)
        store = Store(storage, config.name, folder)
        Run(config, store, folder, storage, runtime, display).go(workers, threads)
        write_report(config, store, folder, display)
    except Exception as error:
        sentence = disk_error(error, folder) or store_error(error)
        if sentence is None:
            raise
        raise sentence from error
    return folder


def prepare(folder: Path, path: Path) -> None:
    """Makes the study's folder with a copy of its configuration.

    Results are found by all that determines them, so a study may be continued with another
    configuration: what it shares with the earlier one is not done again.
    """
    require(not folder.exists() or folder.is_dir(), "out", "be a folder", folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).exists() or not path.samefile(folder / CONFIG):
        write_text(folder / CONFIG, path.read_text(encoding="utf-8"))


class Run:
    """One start of the command."""

    def __init__(
        self,
        config: StudyConfig,
        store: Store,
        folder: Path,
        storage: str | None,
        runtime: Runtime,
        display: Display,
    ) -> None:
        self._config, self._store, self._folder = config, store, folder
        self._storage, self._runtime, self._display = storage, runtime, display
        self._trials = keyed(config)
        self._shown: set[str] = set()

    def go(self, workers: int, threads: int) -> None:
        """Runs every trial that has no result.

        Raises:
            DistillError: Workers died again and again.
        """
        display, trials = self._display, self._trials
        died = self._store.recover(trials)
        if died:
            display.note(f"{died} trials of workers that died are tried again")
        self._store.enqueue(list(trials))  # those that failed in an earlier start, too
        done = self._store.results(trials)
        if done:
            display.note(f"{len(done)} of {len(trials)} trials are done")
        with display.live(len(trials)):
            for key in done:
                self._shown.add(key)
                display.unit_done(None)
            if workers == 1:
                self._alone(threads)
            else:
                self._several(workers, threads)
        for key, error in self._store.errors(trials).items():
            display.note(f"failed: {trials[key].title}: {error}")

    def _alone(self, threads: int) -> None:
        """Runs the trials in this process."""
        torch.set_num_threads(threads)
        worker = Worker(self._config, self._store, self._folder, self._runtime, self._display.note)
        with self._display.unit("") as bar:
            worker.run(lambda trial: bar.title(trial.title), bar.event, self._look)

    def _several(self, workers: int, threads: int) -> None:
        """Runs the trials in processes of their own."""
        arguments = (self._config, self._storage, self._folder, self._runtime, threads)
        context, left = get_context("spawn"), REPLACEMENTS

        def start() -> BaseProcess:
            process = context.Process(target=work, args=arguments)
            process.start()
            return process

        running = [start() for _ in range(workers)]
        try:
            while running:
                time.sleep(POLL)
                self._look()
                for process in [p for p in running if not p.is_alive()]:
                    running.remove(process)
                    if process.exitcode == 0:
                        continue
                    self._display.note(f"a worker died (exit code {process.exitcode})")
                    self._store.recover(self._trials)
                    if left and self._store.unfinished(self._trials):
                        left -= 1
                        running.append(start())
            self._look()
        finally:
            # Their trials are given back: a worker whose parent stops gets the same signal.
            for process in running:
                process.join(timeout=30)
                process.kill()
        if self._store.unfinished(self._trials):
            raise DistillError(
                f"workers must live, got {REPLACEMENTS + workers} that died; "
                "the same command continues"
            )

    def _look(self) -> None:
        """Leaves a line for every trial that has been done since the last look."""
        for key, result in self._store.results(self._trials).items():
            if key not in self._shown:
                self._shown.add(key)
                self._display.unit_done(line_of(self._trials[key], result))


def line_of(trial: Trial, result: dict[str, Any]) -> str:
    """One line on a finished trial."""
    dev, test = (result["figures"][split][result["metric"]] for split in ("dev", "test"))
    return f"{trial.title:<64} dev {dev:6.2f}  test {test:6.2f}  {result['seconds']:6.1f} s"


def write_report(config: StudyConfig, store: Store, folder: Path, display: Display) -> None:
    """Exports the results and writes the report on them."""
    trials = keyed(config)
    results = store.results(trials)
    rows = [row_of(trials[key], results[key]) for key in trials if key in results]
    write_text(folder / EXPORT, "".join(f"{json.dumps(asdict(row))}\n" for row in rows))
    _report(config, rows, len(trials), folder, display)


def row_of(trial: Trial, result: dict[str, Any]) -> Row:
    """A result with what it is of."""
    return Row(*trial.cell, trial.arm, trial.candidate, trial.seed, trial.loss.teacher, result)


def report_study(folder: Path, storage: str | None, console: Console) -> None:
    """Writes the report of a study again, from its store, or from the export beside it.

    Args:
        folder: The study's folder.
        storage: Its database; None for the file in the folder.
        console: Where to print.

    Raises:
        DistillError: No study, or no result.
    """
    require((folder / CONFIG).is_file(), "folder", f"be a study's, with {CONFIG}", folder)
    display, path = Display(console), folder / EXPORT
    if storage is not None or (folder / FILE).is_file():
        config = read_config(folder / CONFIG)
        write_report(config, Store(storage, config.name, folder), folder, display)
        return
    require(path.is_file(), "folder", f"have {FILE} or {EXPORT}, or --storage be given", folder)
    config = read_config(folder / CONFIG, data=False)
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [Row(**json.loads(line)) for line in lines]
    _report(config, rows, len(trials_of(config)), folder, display)


def _report(
    config: StudyConfig, rows: list[Row], wanted: int, folder: Path, display: Display
) -> None:
    require(bool(rows), "study", "have a result", "none yet")
    found = analysis.analyse(rows, config.margin, config.level, wanted)
    report.write(folder, config.name, found, notes_of(rows))
    report.show(display.console, folder, found)


def notes_of(rows: list[Row]) -> list[str]:
    """On what data and machines the results were made."""
    notes = [f"{task}: {source}." for task, source in dict.fromkeys(
        (row.task, row.result["source"]) for row in rows)]  # fmt: skip
    notes += list(dict.fromkeys(line for row in rows for line in row.result["licences"]))
    return notes + list(dict.fromkeys(row.result["machine"] for row in rows))
