"""What the screen shows of a training."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from kdkernels.api.distill.progress import Display

EVENT = {"step": 20, "steps": 80, "loss": 0.25, "parts": {"kd": 0.2, "ce": 0.3}}


@pytest.mark.parametrize("width", [80, 140])
def test_the_bar_shows_time_left_and_where_there_is_room_parts_and_speed(width: int) -> None:
    screen = StringIO()
    console = Console(file=screen, width=width, force_terminal=True)
    display = Display(console)
    with display.live(), display.unit("distilled, seed 0") as bar:
        bar.event({**EVENT, "tokens_per_s": 12345.6, "dev_accuracy": 71.5})
        bar._progress.refresh()
    shown = screen.getvalue()
    assert "…" not in shown, "a column is cut off"
    for word in ("distilled, seed 0", "20/80", "ETA", "loss 0.250"):
        assert word in shown
    for word in ("kd 0.200", "ce 0.300", "tok/s 12,346"):
        assert (word in shown) == (width == 140), word
