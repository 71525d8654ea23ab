"""Averages and distillation in Lightning's trainer, against plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
pytestmark = [
    # Of Lightning's own: no GPU here, few workers, a short epoch.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

STEPS = 6
OPTIONS: dict[str, Any] = {"temperature": 2.0, "alpha": 0.5}


class Model(nn.Module):
    """Logits of ``input_ids``, as a tensor or as an output that has them."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Embedding(9, width), nn.Linear(width, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(input_ids).mean(1))


def batches() -> list[dict[str, Tensor]]:
    source = torch.Generator().manual_seed(5)
    return [
        {
            "input_ids": torch.randint(9, (4, 5), generator=source),
            "labels": torch.randint(3, (4,), generator=source),
        }
        for _ in range(STEPS)
    ]


class Module(pl.LightningModule):
    """A student and a teacher that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Model(4, seed=0)
        self.teachers = (Model(8, seed=1).train(),)
        self.validated: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return kdkernels.lightning.distill_step(
            self, batch, self.student, self.teachers[0], **OPTIONS
        )

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.validated.append(self.student.head.weight.detach().clone())
        kdkernels.lightning.distill_step(
            self, batch, self.student, self.teachers[0], stage="dev", **OPTIONS
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=0.05)


def make_trainer(callback: Any, folder: Path, **options: Any) -> Any:
    values: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=callback, **{**values, **options})


def loader(count: int = STEPS) -> Any:
    return torch.utils.data.DataLoader(batches()[:count], batch_size=None)


def plain_loop(accumulate: int = 1) -> tuple[Model, list[Tensor], list[Tensor]]:
    """The same training by hand: the student, its losses, its head after each step."""
    student, teacher = Model(4, seed=0), Model(8, seed=1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05)
    losses, heads = [], []
    for number, batch in enumerate(batches(), start=1):
        with torch.no_grad():
            target = teacher(batch["input_ids"])
        loss = kdkernels.kd_loss(student(batch["input_ids"]), target, batch["labels"], **OPTIONS)
        (loss / accumulate).backward()
        losses.append(loss.detach())
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            heads.append(student.head.weight.detach().clone())
    return student, losses, heads


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_and_average_are_those_of_a_plain_loop(tmp_path: Path, accumulate: int) -> None:
    module, averaging = Module(), kdkernels.lightning.WeightAveragingCallback("swa")
    trainer = make_trainer(averaging, tmp_path, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(), loader(1))
    student, losses, heads = plain_loop(accumulate)
    torch.testing.assert_close(module.student.state_dict(), student.state_dict())
    assert not module.teachers[0].training and "teachers" not in str(module.state_dict().keys())
    mean = torch.stack(heads).mean(0)
    torch.testing.assert_close(averaging.averager.averages()["student.head.weight"], mean)
    assert averaging.averager.n_averaged == len(heads) == STEPS // accumulate
    torch.testing.assert_close(module.validated[-1], mean)
    logged = trainer.callback_metrics
    assert {"train_loss", "train_kd", "train_ce", "dev_loss", "dev_kd", "dev_ce"} <= set(logged)
    torch.testing.assert_close(logged["train_loss"], losses[-1])
    half = 0.5 * logged["train_kd"] + 0.5 * logged["train_ce"]
    torch.testing.assert_close(logged["train_loss"], half)


def test_a_resumed_training_has_the_same_weights_and_average(tmp_path: Path) -> None:
    found = []
    whole, averaging = Module(), kdkernels.lightning.WeightAveragingCallback("ema", decay=0.9)
    make_trainer(averaging, tmp_path, max_epochs=2).fit(whole, loader(), loader(1))
    found.append((whole.student.state_dict(), averaging.averager.averages()))
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, filename="stopped")
    averaging = kdkernels.lightning.WeightAveragingCallback("ema", decay=0.9)
    first = Module()
    trainer = make_trainer([checkpoints, averaging], tmp_path, enable_checkpointing=True)
    trainer.fit(first, loader(), loader(1))
    stored = torch.load(tmp_path / "stopped.ckpt", weights_only=False)
    # The model's own weights, although the average has just been validated.
    torch.testing.assert_close(
        stored["state_dict"]["student.head.weight"], first.student.head.weight
    )
    second, averaging = Module(), kdkernels.lightning.WeightAveragingCallback("ema", decay=0.9)
    trainer = make_trainer(averaging, tmp_path, max_epochs=2)
    trainer.fit(second, loader(), loader(1), ckpt_path=tmp_path / "stopped.ckpt")
    found.append((second.student.state_dict(), averaging.averager.averages()))
    torch.testing.assert_close(found[1], found[0], rtol=0.0, atol=0.0)


def test_a_failing_validation_leaves_the_weights(tmp_path: Path) -> None:
    class Failing(Module):
        def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
            raise RuntimeError("no dev data")

    module, averaging = Failing(), kdkernels.lightning.WeightAveragingCallback("swa")
    with pytest.raises(RuntimeError, match="no dev data"):
        make_trainer(averaging, tmp_path).fit(module, loader(), loader(1))
    student, _, _ = plain_loop()
    torch.testing.assert_close(module.student.state_dict(), student.state_dict())


def test_test_uses_the_average(tmp_path: Path) -> None:
    class Tested(Module):
        test_step = Module.validation_step

    module = Tested()
    averaging = kdkernels.lightning.WeightAveragingCallback("swa")
    trainer = make_trainer(averaging, tmp_path)
    trainer.fit(module, loader())
    trainer.test(module, loader(1), verbose=False)
    mean = averaging.averager.averages()["student.head.weight"]
    torch.testing.assert_close(module.validated[-1], mean)
    student, _, _ = plain_loop()
    torch.testing.assert_close(module.student.state_dict(), student.state_dict())
