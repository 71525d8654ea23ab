"""Units of work, done in order and each only once.

A unit's result file is written last, so a unit is either complete or done again. Every unit seeds
itself, so a resumed run gives the same numbers as one that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.progress import Bar, Display
from kdkernels.api.distill.store import RunFolder


@dataclass(frozen=True)
class Unit:
    """One unit of work.

    Attributes:
        name: Its name in the run's files.
        title: Its name for people.
        work: Does it, given name and bar, and returns its result.
    """

    name: str
    title: str
    work: Callable[[str, Bar], dict[str, Any]]


class Units:
    """The units of one run."""

    def __init__(
        self, folder: RunFolder, display: Display, summary: Callable[[dict[str, Any]], str]
    ) -> None:
        """Args: the run's files, its display, and what a result is shown as, ``""`` for nothing."""
        self.folder = folder
        self.display = display
        self._summary = summary

    def run(self, units: Sequence[Unit]) -> dict[str, dict[str, Any]]:
        """Does every unit that is not complete; returns the results of all by name."""
        with self.display.live(len(units)):
            for unit in units:
                self._do(unit)
        return {unit.name: self.result(unit.name) for unit in units}

    def _do(self, unit: Unit) -> None:
        """Does one unit unless it is complete."""
        result = self.folder.result(unit.name)
        if result is None:
            started = time.perf_counter()
            with self.display.unit(unit.title) as bar:
                found = unit.work(unit.name, bar)
            result = {**found, "seconds": time.perf_counter() - started}
            self.folder.complete(unit.name, result)
        shown = f"{unit.title:<32}{self._summary(result):<16}{result['seconds']:7.1f} s"
        self.display.unit_done(shown)

    def result(self, name: str) -> dict[str, Any]:
        """The result of a unit known to be complete."""
        result = self.folder.result(name)
        if result is None:
            raise DistillError(f"the run must keep state/{name}.json, got it removed meanwhile")
        return result

    def check_data(self, digest: str, source: str | None) -> None:
        """Raises when the texts, by their digest, are not those the run began with."""
        earlier = self.folder.result("data")
        if earlier is None:
            self.folder.complete("data", {"sha256": digest})
        elif earlier["sha256"] != digest:
            raise DistillError(f"data must be what the run began with, got other texts in {source}")
