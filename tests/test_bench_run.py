"""The benchmark: what it checks, refuses, times and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.planted import plant
from torch import Tensor
from typer.testing import CliRunner

import kdkernels
from kdkernels import _backend
from kdkernels.api.cli import app
from kdkernels.bench import cases, rivals, run, steps
from kdkernels.bench.accuracy import compare
from kdkernels.bench.cases import Consuming, Setting
from kdkernels.bench.memory import peaks
from kdkernels.bench.timing import input_sets, interleaved
from kdkernels.bench.variants import preparer

ROOT = Path(__file__).parents[1]
PLANTED = "planted_for_bench"
OURS = kdkernels.available_backends("kd_loss")[0]
SMALL = ["--device", "cpu", "--backend", OURS, "--shape", "4x64", "--seconds", "0.02"]


def _spoil_one(grad: Tensor) -> Tensor:
    grad[0, 0] += 1e-3
    return grad


plant(PLANTED, _spoil_one)


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "120"})


def test_rows_are_written_with_what_makes_them_believable(tmp_path: Path) -> None:
    out = tmp_path / "results" / "run.jsonl"
    arguments = ["--dtype", "fp32,bf16", "--against", "eager", "--json", str(out)]
    result = bench(*SMALL, *arguments, "--mode", "forward", "--mode", "full")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["variant"] for row in rows] == [OURS, "eager"] * 4
    assert {(row["dtype"], row["mode"]) for row in rows} == {
        (dtype, mode) for dtype in ("float32", "bfloat16") for mode in ("forward", "full")
    }
    for row in rows:
        assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"]
        assert row["launch_bound"] and row["floor_ms"] is None
        assert row["gradient_error"] < 0.01
        assert row["machine"]["cpu"] and row["versions"]["torch"] and row["time"]
        assert "commit" in row and "command" in row
    ours, eager = rows[:2]
    assert ours["ratio"]["eager"] == pytest.approx(eager["ms"] / ours["ms"])


def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_backend, "_extra", (PLANTED,))
    out = tmp_path / "run.jsonl"
    arguments = ["--device", "cpu", "--backend", PLANTED, "--shape", "4x64", "--dtype", "fp32"]
    result = bench(*arguments, "--against", "eager", "--json", str(out))
    assert result.exit_code == 1
    assert f"refused to time {PLANTED} at 4x64 float32: gradient errs by" in result.output
    assert out.read_text() == ""


def test_a_rival_that_cannot_run_is_left_out_with_the_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("the peers may run here")
    result = bench(*SMALL, "--dtype", "fp32", "--against", "eager,liger")
    assert result.exit_code == 0
    assert "liger is left out: liger_kernel " in result.output


def test_figures_against_the_copy_of_the_same_run(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    arguments = ["--op", "scale_grad", "--device", "cpu", "--backend", "reference", "--quick"]
    result = bench(*arguments, "--dtype", "fp32", "--seconds", "0.05", "--json", str(out))
    assert result.exit_code == 0, result.output
    row = json.loads(out.read_text().splitlines()[0])
    size = 4 * row["rows"] * row["columns"]
    assert row["gb_per_s"] == pytest.approx(2 * size / row["ms"] / 1e6)
    assert row["floor_ms"] == pytest.approx(2 * size / row["copy_gb_per_s"] / 1e6)
    assert row["fraction_of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])


def test_tables_are_written_as_they_come_and_all_rivals_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run.jsonl"
    real = run.measure

    def fail_at_bfloat16(plan: Any, setting: Any, shape: Any) -> Any:
        if setting.dtype == torch.bfloat16:
            raise RuntimeError("cut")
        return real(plan, setting, shape)

    monkeypatch.setattr(run, "measure", fail_at_bfloat16)
    arguments = ["--op", "scale_grad", "--device", "cpu", "--backend", "reference", "--quick"]
    result = bench(*arguments, "--seconds", "0.05", "--against", "all", "--json", str(out))
    assert result.exit_code != 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["variant"], row["dtype"]) for row in rows] == [
        ("reference", "float32"), ("eager", "float32"),
    ]  # fmt: skip


def test_every_op_has_a_case_and_the_layout_of_one() -> None:
    assert cases.names() == sorted(kdkernels.ops.__all__)
    for name in cases.names():
        case = cases.load(name)
        # A bound of the time: by memory, or a rival that does only what nobody can save.
        assert case.modes
        assert any(case.traffic(mode) for mode in case.modes) or case.unchecked
        assert case.shapes("cpu") and case.shapes("cuda")


@pytest.mark.parametrize("divergence", list(rivals.DIVERGENCES))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_eager_computes_what_we_compute(divergence: str, temperature: float) -> None:
    case = cases.load("kd_loss")
    setting = Setting("cpu", torch.float32, divergence, temperature)
    inputs = case.inputs(setting, (5, 300))
    eager = rivals.eager(divergence, temperature)
    for mine, theirs in zip(
        *(
            (loss, *torch.autograd.grad(loss, inputs[0]))
            for loss in (case.ours(setting, "reference")(*inputs), eager(*inputs))  # type: ignore[operator]
        ),
        strict=True,
    ):
        assert compare("rival", theirs, mine.double(), mine, torch.float32).error < 1e-5


def test_variants_take_turns_and_inputs_rotate() -> None:
    calls: list[tuple[str, int]] = []

    def variant(name: str) -> Any:
        def prepare(index: int) -> Any:
            # Long enough to be timed alone.
            return lambda: (calls.append((name, index)), torch.ones(300_000).exp_())

        return prepare

    variants = {name: variant(name) for name in ("a", "b", "c")}
    times = interleaved(variants, sets=4, device="cpu", seconds=0.0, rounds=(8, 8))
    timed = calls[2 * len(variants) :]
    assert {times[name].samples for name in variants} == {8}
    assert {index for _, index in timed} == {0, 1, 2, 3}
    if len(timed) == 24:  # one call a sample
        assert [name for name, _ in timed[:6]] == ["a", "b", "c", "b", "c", "a"]


def test_small_inputs_rotate_past_the_cache_and_large_ones_need_not() -> None:
    assert input_sets(2**20, "cpu") > 1
    assert input_sets(2**34, "cpu") == 1


def test_a_consuming_run_gets_its_own_input() -> None:
    original = torch.ones(3)
    prepare = preparer(Consuming(lambda x: x.mul_(2)), [(original,)], "forward")
    for _ in range(2):
        assert prepare(0)().eq(2).all()  # type: ignore[attr-defined]
    assert original.eq(1).all()


def test_peak_memory_counts_the_gradient() -> None:
    rows, columns = 256, 8192
    found = peaks(
        "kd_loss", Setting("cpu", torch.float32), (rows, columns), "full", [OURS], ["eager"]
    )
    if not found:
        pytest.skip("this system does not tell the peak")
    gradient = 4 * rows * columns
    assert 0.9 * gradient <= found[OURS] < found["eager"]
    assert found["eager"] >= 2.9 * gradient  # two log-softmaxes and the gradient, at least


def test_throughput_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "DEFAULT_RIVALS", ("eager",))
    rows = run.throughput_table(shapes=[(16, 20000)], seconds=0.2, dtypes=[torch.float32])
    assert len(rows) == 1 and rows[0]["rows x vocab"] == "16 x 20000"
    assert rows[0]["kd_loss,\nms"] > 0 and rows[0]["eager /\nkd_loss"] > 0
    run.print_throughput(rows)


def test_runs_as_a_script() -> None:
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--against" in done.stdout
    command[-1:] = ["--shape", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("step", steps.names())
def test_training_steps_are_measured_as_ops_are(step: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "run.jsonl"
    arguments = ["--op", step, "--device", "cpu", "--dtype", "fp32", "--quick"]
    result = bench(*arguments, "--seconds", "0.05", "--against", "eager", "--json", str(out))
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for ours, eager in zip(rows[::2], rows[1::2], strict=True):  # of each kind
        assert (ours["ours"], eager["variant"]) == (True, "eager")
        assert ours["ratio"]["eager"] > 0 and ours["gradient_error"] < 1e-3
