"""Training that is killed, and training by two processes; run as a script by the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from kdkernels import AdamWAverage, WeightAverager

STEPS = 12


class Net(nn.Module):
    """Two layers of which the last is tied to the first, batch norm, and rows that divide badly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 7)
        self.norm = nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 7)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def script(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs this file with a task."""
    command = [sys.executable, *launcher, __file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The same data for the same step."""
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def train(folder: Path, kind: str, dtype: str, kill_at: int) -> None:
    """Saves every third step, resumes from what is there, dies by SIGKILL at a step."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    averager = WeightAverager(
        model, kind, decay=0.9, warmup=kind == "ema", start_step=2, dtype=getattr(torch, dtype)
    )
    saved, begin = folder / "state.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averager.load_state_dict(state["averager"])
        begin = state["step"] + 1
    for step in range(begin, STEPS):
        train_step(model, optimizer, step)
        averager.update(step)
        if step % 3 == 2:
            parts = {"model": model, "optimizer": optimizer, "averager": averager}
            torch.save(
                {"step": step, **{name: part.state_dict() for name, part in parts.items()}},
                folder / "new",
            )
            (folder / "new").rename(saved)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save({"model": model.state_dict(), "averager": averager.state_dict()}, folder / "end.pt")


def shard(folder: Path) -> None:
    """Two processes with the model sharded must get what one process gets."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo")
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))

    def run(sharded: bool) -> tuple[nn.Module, WeightAverager]:
        model = build().eval()
        if sharded:
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        averager = WeightAverager(model, "swa", count_start=True)
        for step in range(4):
            train_step(model, optimizer, step)
            with torch.no_grad():
                model(torch.ones(1, 7))  # leaves whole parameters in the root
            averager.update(step)
        return model, averager

    def close(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    (alone, one), (model, both) = run(False), run(True)
    x = torch.ones(2, 7)
    with torch.no_grad():
        before = model(x)
        with one.swapped(), both.swapped():
            close(model(x), alone(x))
            assert (model(x) - before).abs().max() > 1e-3
        assert torch.equal(model(x), before)
    state = both.state_dict()
    for name, expected in one.averages().items():
        sharded = state["averages"][name]
        assert isinstance(sharded, DTensor) and sharded.shape == expected.shape
        close(sharded.full_tensor(), expected)
        assert both.averages()[name].shape[0] in (3, 4)  # the part of this process

    fresh = WeightAverager(model, "swa")
    fresh.load_state_dict(state)
    saved = []

    def save_pretrained(where: str, state_dict: dict[str, Tensor]) -> None:
        saved.append(where)
        torch.save(state_dict, f"{where}/weights.pt")

    model.save_pretrained = save_pretrained  # type: ignore[assignment]
    fresh.export(folder / "model")
    torch.distributed.barrier()
    assert len(saved) == (rank == 0)
    loaded = build().eval()
    loaded.load_state_dict(torch.load(folder / "model" / "weights.pt", weights_only=True))
    with one.swapped(), torch.no_grad():
        close(loaded(x), alone(x))
    assert sorted(p.name for p in folder.iterdir()) == ["model"]


def optimize(folder: Path) -> None:
    """The same with the optimizer that averages, and its state in a distributed checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def close(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    def make(sharded: bool) -> tuple[nn.Module, AdamWAverage]:
        model = build().eval()
        if sharded:
            fully_shard(model, mesh=mesh)
        return model, AdamWAverage(model.parameters(), 0.1, max_grad_norm=0.5, eps=1e-3)

    (alone, one), (model, both) = make(False), make(True)
    for step in range(3):
        train_step(alone, one, step)
        train_step(model, both, step)
        assert one.grad_norm is not None and both.grad_norm is not None
        close(both.grad_norm, one.grad_norm)
    found = get_state_dict(model, both)
    dcp.save({"model": found[0], "optimizer": found[1]}, checkpoint_id=folder)
    model, both = make(True)
    found = get_state_dict(model, both)
    state = {"model": found[0], "optimizer": found[1]}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, both, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    for step in range(3, 5):
        train_step(alone, one, step)
        train_step(model, both, step)
        with torch.no_grad():
            model(torch.ones(1, 7))  # leaves whole parameters in the root
    assert one.n_averaged == both.n_averaged == 5
    for average, expected in zip(both.averages(), one.averages(), strict=True):
        assert isinstance(average, DTensor) and average.to_local().shape[0] in (3, 4)
        close(average.full_tensor(), expected)
    x = torch.ones(2, 7)
    with torch.no_grad():
        before = model(x)
        with one.swapped(), both.swapped(model):
            close(model(x), alone(x))
            assert (model(x) - before).abs().max() > 1e-3
        assert torch.equal(model(x), before)


if __name__ == "__main__":
    task, place, *options = sys.argv[1:]
    if task == "train":
        train(Path(place), options[0], options[1], int(options[2]))
    else:
        from processes import leave  # beside this script

        {"shard": shard, "optimize": optimize}[task](Path(place))
        leave()
