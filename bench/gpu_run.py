"""One command that proves the kernels on a GPU: ``python bench/gpu_run.py FOLDER [--quick]``.

For a bare machine with a GPU, torch, Triton, nvcc, cmake and ninja and no network; it takes less
than 9 minutes, with ``--quick`` less than 3. Stages, each with a time limit of its own: what is
here, build, the test suite on ``cuda``, compute-sanitizer's four tools, the benchmarks. A stage
that fails is recorded and does not stop the next. After each stage ``FOLDER/summary.md`` and
``FOLDER/stages.jsonl`` are complete up to it; the benchmarks append to ``FOLDER/bench.jsonl``, the
output of a stage is in ``FOLDER/<stage>.log``. The exit status is 1 when a stage failed.

Uses the standard library only, because it installs the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FULL_SECONDS, QUICK_SECONDS = 530.0, 170.0
TAIL = 12  # lines of a failed stage's output in the summary
# What the tests and the benchmarks import beside torch and Triton.
NEEDED = ("typer", "rich", "pytest", "hypothesis", "numpy", "setuptools>=77", "wheel", "pybind11")


@dataclass(frozen=True)
class Stage:
    """A command with a time limit."""

    name: str
    command: Sequence[str]
    seconds: float
    environment: tuple[tuple[str, str], ...] = ()
    needs: str | None = None  # a program without which the stage is left out, and so recorded


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    stage: str
    status: str  # ok, failed, timed out, left out
    seconds: float
    command: str
    detail: str  # the reason, or the last lines of the output


def stages(folder: Path, *, quick: bool, wheels: Path | None) -> list[Stage]:
    """What to run, in this order."""
    python = sys.executable
    found = [
        Stage("machine", ("nvidia-smi",), 20, needs="nvidia-smi"),
    ]
    if wheels is not None:
        options = ("--no-index", "--find-links", str(wheels), "--disable-pip-version-check")
        install = (python, "-m", "pip", "install", "-q", *options, *NEEDED)
        found.append(Stage("install", install, 60))
    build = (
        python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "-e", str(ROOT),
    )  # fmt: skip
    # Only for the GPU that is here: four architectures take four times as long.
    native = (("KDKERNELS_CUDA", "on"), ("KDKERNELS_CUDA_ARCHITECTURES", "native"))
    found.append(Stage("build", build, 150, native))
    found.append(Stage("info", (python, "-m", "kdkernels", "info"), 30))
    verify = (python, "-m", "kdkernels", "verify", "--device", "cuda")
    found.append(Stage("verify", verify, 60))
    tests = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m")
    marks = "not slow and not network and not packaging"
    chosen = "cuda and (matches or gradient or dtypes)" if quick else "cuda"
    found.append(
        Stage(
            "tests", (*tests, marks, "-k", chosen, "tests/ops", "tests/api"), 40 if quick else 150
        )
    )
    small = (python, "-m", "kdkernels.bench.small")
    for tool in ("memcheck",) if quick else ("memcheck", "racecheck", "initcheck", "synccheck"):
        checked = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small)
        found.append(Stage(f"sanitizer-{tool}", checked, 45, needs="compute-sanitizer"))
    results = ("--device", "cuda", "--json", str(folder / "bench.jsonl"))
    bench = ROOT / "bench"
    files = [*bench.glob("cases/[a-z]*.py"), *bench.glob("steps/[a-z]*.py")]
    for path in sorted(files):
        command: tuple[str, ...] = (python, "bench/run.py", "--op", path.stem, *results)
        command += ("--quick",) if quick else ("--seconds", "4", "--against", "all")
        found.append(Stage(f"bench-{path.stem}", command, 30 if quick else 200))
    return found


def run(todo: Sequence[Stage], folder: Path, seconds: float) -> list[Outcome]:
    """Runs the stages until the time is over; writes the summary after each."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for stage in todo:
        outcomes.append(_run(stage, folder, deadline - time.monotonic()))
        last = outcomes[-1]
        print(f"{last.stage:20} {last.status:10} {last.seconds:6.1f} s", flush=True)
        _write(folder / "stages.jsonl", "".join(json.dumps(asdict(o)) + "\n" for o in outcomes))
        _write(folder / "summary.md", summary(outcomes, len(todo), folder))
    return outcomes


def _run(stage: Stage, folder: Path, left: float) -> Outcome:
    command = " ".join(stage.command)
    if stage.needs is not None and shutil.which(stage.needs) is None:
        return Outcome(stage.name, "left out", 0.0, command, f"{stage.needs} is not installed")
    limit = min(stage.seconds, left)
    if limit < 1:
        return Outcome(stage.name, "left out", 0.0, command, "no time was left")
    log = folder / f"{stage.name}.log"
    start = time.monotonic()
    with log.open("wb") as out:
        try:
            # A process group of its own: a time-out ends what the stage has started, too.
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env={**os.environ, **dict(stage.environment)},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(stage.name, "failed", 0.0, command, str(error))
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    return Outcome(stage.name, status, time.monotonic() - start, command, "\n".join(lines[-TAIL:]))


def summary(outcomes: Sequence[Outcome], planned: int, folder: Path) -> str:
    """The summary as Markdown."""
    lines = ["# GPU run", "", "| stage | status | seconds |", "|---|---|---|"]
    lines += [f"| {o.stage} | {o.status} | {o.seconds:.1f} |" for o in outcomes]
    if len(outcomes) < planned:
        lines += ["", f"Not finished: {planned - len(outcomes)} stages follow."]
    for outcome in outcomes:
        if outcome.status != "ok" or outcome.stage in ("machine", "info", "tests"):
            text = ("", f"## {outcome.stage}: {outcome.status}", "", f"    {outcome.command}", "")
            lines += [*text, *(f"    {line}" for line in outcome.detail.splitlines())]
    lines += _benchmarks(folder / "bench.jsonl")
    return "\n".join(lines) + "\n"


def _benchmarks(path: Path) -> list[str]:
    """A table of what the benchmarks wrote; a line that a time-out has cut is left out."""
    if not path.exists():
        return []
    lines = ["", "## Benchmarks", ""]
    lines += ["| op | variant | shape | dtype | ms | of copy speed | over rivals |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for text in path.read_text().splitlines():
        try:
            row = json.loads(text)
        except ValueError:
            continue
        floor = row.get("fraction_of_floor")
        ratios = ", ".join(f"{name} {ratio:.2g} x" for name, ratio in row["ratio"].items())
        lines.append(
            f"| {row['op']} {row['mode']} | {row['variant']} | {row['rows']} x {row['columns']} "
            f"| {row['dtype']} | {row['ms']:.3g} | {'' if floor is None else f'{floor:.0%}'} "
            f"| {ratios} |"
        )
    return lines


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)


def main() -> int:
    """Reads the command line, runs the stages, returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="less than 3 minutes")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install what is missing")
    parser.add_argument("--seconds", type=float, help="all of it [default: 530, 170 with --quick]")
    arguments = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        print("gpu_run: the machine must have an NVIDIA GPU, got no nvidia-smi", file=sys.stderr)
        return 2
    folder = arguments.folder.resolve()
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else FULL_SECONDS)
    todo = stages(folder, quick=arguments.quick, wheels=arguments.wheels)
    outcomes = run(todo, folder, seconds)
    print(f"\n{folder / 'summary.md'}")
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
