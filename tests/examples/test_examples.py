"""The examples run: on tiny models here, on the real ones behind the marker ``network``."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import reviewed

EXAMPLES = Path(__file__).parents[2] / "examples"
SCORE = re.compile(r"student: ([\d.]+) % of (\d+) ")


def run(name: str, *arguments: object, cwd: Path) -> str:
    """What an example prints, in a process and a folder of its own."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options: texts, a teacher and a student."""
    folder = tmp_path_factory.mktemp("models")
    teacher = reviewed.save_encoder(folder / "teacher", 3)
    student = reviewed.save_encoder(folder / "student", 1)
    data = reviewed.write_reviews(folder / "reviews.csv")
    return ["--data", data, "--teacher", teacher, "--student", student]


def test_every_example_is_short_and_listed() -> None:
    listed = set(re.findall(r"^\| `(\w+)\.py` ", (EXAMPLES / "README.md").read_text(), re.M))
    assert listed == {path.stem for path in EXAMPLES.glob("*.py")}
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 90, path.name


def test_plain_loop(classifiers: list[object], tmp_path: Path) -> None:
    out = run("plain_loop.py", *classifiers, cwd=tmp_path)
    found = SCORE.search(out)
    assert out.count("epoch 3: loss ") == 2 and found is not None, out
    assert int(found[2]) > 10


def test_lightning_module(classifiers: list[object], tmp_path: Path) -> None:
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    found = SCORE.search(run("lightning_module.py", *classifiers, "--quick", cwd=tmp_path))
    assert found is not None and 0 <= float(found[1]) <= 100


def test_offline_cache(tmp_path: Path) -> None:
    text = reviewed.write_lines(tmp_path / "lines.txt")
    model = reviewed.save_language_model(tmp_path / "lm", text)
    options = ["--model", model, "--data", text, "--layers", 2, "--quick"]
    first = run("offline_cache.py", *options, cwd=tmp_path)
    again = run("offline_cache.py", *options, cwd=tmp_path)
    assert "cache: 16 of 16 blocks written" in first
    assert "cache: 0 of 16 blocks written" in again, "the teacher runs once"
    # From the same files, the same student.
    assert first.splitlines()[1:] == again.splitlines()[1:]
    assert "epoch 1: KL " in first


@pytest.mark.network
@pytest.mark.parametrize("name", ["plain_loop.py", "lightning_module.py", "offline_cache.py"])
def test_quick_on_real_models(name: str, tmp_path: Path) -> None:
    """Downloads models and texts, see python_api/distill/fetch.py."""
    out = run(name, "--quick", cwd=tmp_path)
    assert "student: " in out or "epoch 1: KL " in out


def test_the_readme_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"`{path.name}`" in text, path.name
