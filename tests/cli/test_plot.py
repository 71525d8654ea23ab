"""``kdkernels plot``: what is read of a log, and the picture of one and of several."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kdkernels.api.cli import app
from kdkernels.api.distill.log import read_log


def write_run(folder: Path, units: list[str], parts: bool) -> Path:
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for unit in units:
        for step in (20, 40):
            line = {"unit": unit, "event": "step", "step": step, "loss": 1 / step, "lr": 1e-3}
            line |= {"parts": {"kd": 0.5 / step, "ce": 0.1}, "tokens_per_s": 900.0} if parts else {}
            lines.append(line)
        dev = {"unit": unit, "event": "evaluation", "step": 40, "split": "dev", "accuracy": 71.5}
        lines += [dev, {**dev, "split": "test", "accuracy": 69.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + '{"unit": "kd-seed0", "st')  # being written
    return folder


def test_reading_a_log(tmp_path: Path) -> None:
    found = read_log(write_run(tmp_path / "run", ["kd-seed0", "kd-seed1"], parts=True))
    assert list(found) == ["kd-seed0", "kd-seed1"]
    log = found["kd-seed0"]
    assert log.loss == [(20, 0.05), (40, 0.025)] and log.dev == [(40, 71.5)]
    assert log.figure == "accuracy" and log.speed == [(20, 900.0), (40, 900.0)]
    assert log.parts == {"kd": [(20, 0.025), (40, 0.0125)], "ce": [(20, 0.1), (40, 0.1)]}


def test_one_run_and_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = write_run(tmp_path / "a", ["kd-seed0", "kd-seed1", "ft-seed0"], parts=True)
    write_run(tmp_path / "b", ["kd-seed0"], parts=False)  # of an earlier version
    one = CliRunner().invoke(app, ["plot", str(first)])
    assert one.exit_code == 0, one.output
    both = CliRunner().invoke(app, ["plot", "a", "b", "--out", "both.png"])
    assert both.exit_code == 0 and both.output == "both.png\n"
    pictures = [(first / "log.png").read_bytes(), (tmp_path / "both.png").read_bytes()]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]


def test_curves_are_those_of_the_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    from kdkernels.api.distill import log_plot

    drawn: dict[str, list[Any]] = {}
    plot = Axes.plot

    def record(self: Axes, x: Any, y: Any, *arguments: Any, **options: Any) -> Any:
        drawn.setdefault(options["label"] or "", []).append((list(x), list(y), options["color"]))
        return plot(self, x, y, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", record)
    runs = [write_run(tmp_path / name, ["kd-seed0", "kd-seed1"], parts=True) for name in "ab"]
    log_plot.save(tmp_path / "out.png", runs)
    # Loss, dev figure and speed of the first seed; its parts have names of their own.
    assert [curve[:2] for curve in drawn["a: kd"]] == [
        ([20, 40], [0.05, 0.025]),
        ([40], [71.5]),
        ([20, 40], [900.0, 900.0]),
    ]
    assert set(drawn) == {"a: kd", "a: kd, kd", "a: kd, ce", "b: kd", "b: kd, kd", "b: kd, ce", ""}
    assert {c[2] for c in drawn["a: kd"]}.isdisjoint({c[2] for c in drawn["b: kd"]})


@pytest.mark.parametrize("content", [None, "", '{"unit": "logits", "event": "test"}\n'])
def test_what_is_no_run_is_one_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    done = CliRunner().invoke(app, ["plot", str(tmp_path)])
    assert done.exit_code == 1 and done.output.startswith("plot: run must ")
    assert not (tmp_path / "log.png").exists()


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["kd-seed0"], parts=True)
    program = (
        "import sys; sys.modules['matplotlib'] = None; from kdkernels.api.cli import main; "
        f"sys.argv = ['kdkernels', 'plot', {str(run)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("plot: the package matplotlib must be installed, got none; run")
