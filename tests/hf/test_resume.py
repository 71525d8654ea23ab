"""What checkpoints hold, and trainings that go on from them to the same bits."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import trained
from helpers.trained import distilled, weights, whole_run
from safetensors.torch import load_file

from kdkernels.api import hf

PROJECTIONS, AVERAGES = "distill_projections.pt", "weight_averager.pt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its beginning to its end."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, averager = whole_run(folder)
    trainer.train()
    end = {"weights": weights(trainer.model), "averages": averager.averages()}
    torch.save({**end, "projections": trainer._hidden.projections.state_dict()}, folder / "end.pt")
    return folder


def resume_and_compare(folder: Path, whole: Path) -> None:
    trainer, averager = whole_run(folder)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    end = torch.load(whole / "end.pt", weights_only=True)
    projections = trainer._hidden.projections.state_dict()
    for name, found in (
        ("weights", weights(trainer.model)),
        ("averages", averager.averages()),
        ("projections", projections),
    ):
        assert found.keys() == end[name].keys()
        for key, value in found.items():
            assert torch.equal(value, end[name][key]), (name, key)


def test_checkpoints(whole: Path) -> None:
    checkpoint = whole / "checkpoint-4"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "optimizer.pt", PROJECTIONS, AVERAGES} <= files
    student = trained.lm(2)
    saved = load_file(checkpoint / "model.safetensors")
    # The head is tied to the embedding: it is not stored twice.
    assert saved.keys() == student.state_dict().keys() - {"lm_head.weight"}
    projections = torch.load(checkpoint / PROJECTIONS, weights_only=True)
    assert {tuple(value.shape) for value in projections.values()} == {(32, 16), (32,)}
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(state["param_groups"]) == 3
    assert len(state["param_groups"][2]["params"]) == len(projections) == 4
    type(student).from_pretrained(checkpoint)


def test_exported_student_is_clean(tmp_path: Path) -> None:
    trainer = distilled(tmp_path, hidden_weight=0.3)
    trainer.train()
    # The Trainer clears those of its model: they would add up over the steps.
    assert all(p.grad is None for p in trainer._hidden.projections.parameters())
    trainer.save_model()
    assert not (tmp_path / PROJECTIONS).exists()
    saved = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(value, trainer.model.state_dict()[name]) for name, value in saved.items()
    )


def test_projections_learn(whole: Path) -> None:
    found = [
        torch.load(whole / f"checkpoint-{step}" / PROJECTIONS, weights_only=True)
        for step in (2, 4, 6)
    ]
    for before, after in pairwise(found):
        assert all(not torch.equal(value, after[name]) for name, value in before.items())


def test_killed_and_resumed(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, trained.__file__, "killed", str(tmp_path), "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()  # half a checkpoint
    assert hf.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resume_and_compare(tmp_path, whole)


def test_resumed_from_a_path(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    resume_and_compare(tmp_path, whole)
    (tmp_path / "checkpoint-4" / PROJECTIONS).unlink()
    trainer, _ = whole_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"must be a checkpoint with {PROJECTIONS}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert hf.last_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="must not be True without a complete checkpoint"):
        distilled(tmp_path).train(resume_from_checkpoint=True)
