"""The examples with a Trainer run as they are, on a tiny model and on the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.trained import lm, tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = {"trl_sft_kd": ("trl", "peft")}
OPTIONS = {"hf_trainer": (), "trl_sft_kd": ("--lora",)}


def run(name: str, *options: object) -> str:
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, options), "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options for a model and a text of one's own."""
    folder = tmp_path_factory.mktemp("own")
    lm(4).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    words = [" ".join(f"w{(7 * line + word) % 90}" for word in range(12)) for line in range(400)]
    (folder / "text.txt").write_text("\n".join(words), encoding="utf-8")
    return "--model", folder / "model", "--data", folder / "text.txt"


@pytest.mark.parametrize("name", OPTIONS)
def test_on_a_model_of_ones_own(name: str, own: tuple[object, ...], tmp_path: Path) -> None:
    sizes = ("--layers", 2, *(("--seq-len", 16) if name == "hf_trainer" else ()))
    said = run(name, *own, *sizes, "--out", tmp_path, *OPTIONS[name])
    assert "held-out text" in said and "kd_loss" in said
    saved = "adapter_model.safetensors" if OPTIONS[name] else "model.safetensors"
    assert (tmp_path / saved).is_file()


@pytest.mark.network
@pytest.mark.parametrize("name", OPTIONS)
def test_on_the_real_model(name: str, tmp_path: Path) -> None:
    assert "held-out text" in run(name, "--out", tmp_path)
