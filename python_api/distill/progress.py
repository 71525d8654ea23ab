"""What the user sees while a run works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# A terminal of 80 columns has no room for the time passed, parts of a loss and speed.
WIDE = 120


class Display:
    """Progress bars of one run: all units of work, and the one at hand."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            *([TimeElapsedColumn()] if console.width >= WIDE else []),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[detail]:<20}"),
            console=console,
        )
        self._overall: TaskID | None = None

    @contextmanager
    def live(self, units: int = 1) -> Iterator[None]:
        """Shows the bars for the duration of the block; one over all units where there are more."""
        with self._progress:
            if units > 1:
                self._overall = self._progress.add_task("whole run", total=units, detail="")
            yield

    @contextmanager
    def unit(self, title: str) -> Iterator[Bar]:
        """Shows a bar for one unit of work."""
        task = self._progress.add_task(title, total=None, detail="")
        try:
            yield Bar(self._progress, task, wide=self.console.width >= WIDE)
        finally:
            self._progress.remove_task(task)

    def unit_done(self, line: str | None) -> None:
        """Counts a unit as done and leaves a line on the screen, if there is one to leave."""
        if line is not None:
            self.note(line)
        if self._overall is not None:
            self._progress.advance(self._overall)

    def note(self, line: str) -> None:
        """Prints a line above the bars."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Bar:
    """The bar of one unit of work."""

    def __init__(self, progress: Progress, task: TaskID, wide: bool = False) -> None:
        """Args: where it is shown; whether there is room for the parts of a loss."""
        self._progress = progress
        self._wide = wide
        self._task = task
        self._detail: dict[str, str] = {}

    def title(self, text: str) -> None:
        """Says what the bar is for from now on."""
        self._progress.update(self._task, description=text)

    def total(self, count: int) -> None:
        """Says how long the bar is."""
        self._progress.update(self._task, total=count)

    def advance(self, count: int) -> None:
        """Moves the bar."""
        self._progress.advance(self._task, count)

    def event(self, event: dict[str, Any]) -> None:
        """Shows a training step."""
        if "loss" in event:
            self._detail["loss"] = f"{event['loss']:.3f}"
            parts = event.get("parts", {}) if self._wide else {}
            self._detail |= {name: f"{value:.3f}" for name, value in parts.items()}
        if "dev" in event:
            self._detail["dev"] = f"{event['dev']:.2f}"
        if "dev_accuracy" in event:
            self._detail["dev"] = f"{event['dev_accuracy']:.1f}%"
        if "dev_perplexity" in event:
            self._detail["dev"] = f"{event['dev_perplexity']:.1f}"
        if "tokens_per_s" in event and self._wide:
            self._detail["tok/s"] = f"{event['tokens_per_s']:,.0f}"
        detail = " ".join(f"{key} {value}" for key, value in self._detail.items())
        self._progress.update(
            self._task, total=event["steps"], completed=event["step"], detail=detail
        )
