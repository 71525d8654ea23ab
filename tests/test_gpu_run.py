"""The GPU run's stages, on commands of our own: a failure, a time-out, a missing program."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdkernels.api.backends import available_backends
from kdkernels.bench import gpu_run, small
from kdkernels.bench.gpu_run import Stage

PYTHON = sys.executable


def python(name: str, code: str, seconds: float = 30.0, **options: object) -> Stage:
    return Stage(name, (PYTHON, "-c", code), seconds, **options)  # type: ignore[arg-type]


def test_a_bad_stage_does_not_stop_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    todo = [
        python("first", "print('fine')"),
        python("broken", "import sys; print('last words'); sys.exit(3)"),
        python("slow", "import time; print('begun', flush=True); time.sleep(60)", 1.0),
        Stage("absent", ("no-such-program",), 5.0, needs="no-such-program"),
        Stage("unstartable", ("no-such-program",), 5.0),
        python("set", "import os; assert os.environ['A'] == 'b'", environment=(("A", "b"),)),
    ]
    start = time.monotonic()
    outcomes = gpu_run.run(todo, folder, 60.0)
    assert time.monotonic() - start < 30
    assert [(o.stage, o.status) for o in outcomes] == [
        ("first", "ok"),
        ("broken", "failed"),
        ("slow", "timed out"),
        ("absent", "left out"),
        ("unstartable", "failed"),
        ("set", "ok"),
    ]
    lines = [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [stage.name for stage in todo]
    text = (folder / "summary.md").read_text()
    assert "| broken | failed |" in text and "last words" in text and "begun" in text
    assert "no-such-program is not installed" in text
    assert (folder / "slow.log").read_text() == "begun\n"


def test_results_survive_a_run_that_is_cut(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from kdkernels.bench import gpu_run
folder = Path({str(tmp_path)!r})
python = sys.executable
todo = [gpu_run.Stage("first", (python, "-c", "print(1)"), 5.0),
        gpu_run.Stage("endless", (python, "-c", "import time; time.sleep(60)"), 60.0)]
gpu_run.run(todo, folder, 60.0)
"""
    process = subprocess.Popen([PYTHON, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "summary.md").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert "| first | ok |" in (tmp_path / "summary.md").read_text()
    assert "Not finished: 1 stages follow." in (tmp_path / "summary.md").read_text()


def test_time_is_over_for_the_rest(tmp_path: Path) -> None:
    todo = [python("slow", "import time; time.sleep(9)"), python("late", "print(1)")]
    outcomes = gpu_run.run(todo, tmp_path, 1.5)
    assert [o.status for o in outcomes] == ["timed out", "left out"]
    assert outcomes[1].detail == "no time was left"


def test_benchmarks_are_in_the_summary(tmp_path: Path) -> None:
    row = {"op": "kd_loss", "variant": "native", "mode": "full", "rows": 8, "columns": 9}
    row |= {"dtype": "bfloat16", "ms": 1.5, "fraction_of_floor": 0.875, "ratio": {"eager": 20.0}}
    (tmp_path / "bench.jsonl").write_text(json.dumps(row) + "\n" + '{"op": "cut o')
    text = gpu_run.summary([], 0, tmp_path)
    assert "| kd_loss full | native | 8 x 9 | bfloat16 | 1.5 | 88% | eager 20 x |" in text


@pytest.mark.parametrize("quick", [False, True])
def test_commands_of_the_stages_exist(tmp_path: Path, quick: bool) -> None:
    todo = gpu_run.stages(tmp_path, quick=quick, wheels=tmp_path)
    names = [stage.name for stage in todo]
    assert names[:3] == ["machine", "install", "build"]
    assert {"verify", "tests", "sanitizer-memcheck", "bench-kd_loss"} <= set(names)
    for stage in todo:
        # Files and modules that the commands name exist.
        for word in stage.command:
            if word.endswith(".py") or word.startswith("tests/"):
                assert (gpu_run.ROOT / word).exists(), word


def test_every_op_runs_small() -> None:
    if "native" not in available_backends("kd_loss", "cpu"):
        pytest.skip("no compiled kernels here")
    assert small.run_all("native") >= 2 * len(small.DTYPES) * len(small.SHAPES)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "results"])
    assert gpu_run.main() == 2
