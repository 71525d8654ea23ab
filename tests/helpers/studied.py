"""Finished studies: what their trials found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PROGRAM = "from kdkernels.api.cli.study import app; app()"
# What a result holds that is not the same every time.
TIMES = ("seconds", "steps_per_second", "memory_mb")


def results(folder: Path) -> dict[tuple[Any, ...], Any]:
    """What the trials found, without times."""
    found = {}
    for line in (folder / "trials.jsonl").read_text().splitlines():
        row = json.loads(line)
        result = {k: v for k, v in row.pop("result").items() if k not in TIMES}
        if result["teacher"]:
            result["teacher"] = {k: v for k, v in result["teacher"].items() if "seconds" not in k}
        found[tuple(row.values())] = result
    return found
