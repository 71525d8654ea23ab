"""Models sharded by ``fully_shard`` against one process; run as a script by its test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import kdkernels
from helpers.processes import fork
from kdkernels.api.parallel import gathered, through_head

VOCAB, WIDTH, STEPS = 23, 8, 3


class LM(nn.Module):
    """Gives the hidden states that its head gets, as a loss from hidden states needs them."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(3))  # of which some of four processes have nothing
        self.head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale.square().sum()
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def build(tied: bool = False) -> LM:
    torch.manual_seed(0)
    return LM(tied)


def shard(model: LM, how: str) -> LM:
    """Where the head is: in the root's group, in one of its own, on a mesh of two dimensions."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    if how == "hybrid":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    options: dict[str, Any] = {"mesh": mesh}
    if how == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in model.layers:
        fully_shard(layer, **options)
    if how in ("own", "mixed"):
        fully_shard(model.head, **options)
    fully_shard(model, **options, reshard_after_forward=True if how == "freed" else None)
    return model


def batches(step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The micro-batches of a step: tokens, labels and teacher's hidden states."""
    made = torch.Generator().manual_seed(step)
    found = []
    for rows in (1, 2, 3, 1):
        tokens = torch.randint(VOCAB, (rows, 5), generator=made)
        labels = tokens.masked_fill(torch.rand(tokens.shape, generator=made) < 0.5, -100)
        found.append((tokens, labels, torch.randn(rows, 5, 4, generator=made)))
    found[-1][1].fill_(-100)  # nothing counts in one
    return found


TEACHER = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(9))


def loss_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, teacher: Tensor, count: Any
) -> Tensor:
    return kdkernels.linear_kd_loss(
        hidden, weight, teacher.to(weight.dtype), TEACHER.to(weight.dtype), labels,
        student_bias=bias, shift=1, temperature=2.0, num_items_in_batch=count,
    )  # fmt: skip


def whole_head(model: LM, hidden: Tensor, *rest: Any) -> Tensor:
    return loss_of(hidden, *gathered(model.head), *rest)


def inside_head(model: LM, hidden: Tensor, *rest: Any) -> Tensor:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert not isinstance(weight, DTensor)
        return loss_of(hidden, weight, bias, *rest)

    return through_head(model.head, loss, hidden)


def backward(model: LM, step: int, through: Callable[..., Tensor], alone: bool = False) -> Tensor:
    """A step's gradients from all micro-batches, or this process's share of them."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = batches(step) if alone else batches(step)[rank::world]
    labels = [labels for _, labels, _ in mine]
    if alone:
        count = torch.stack([(x[:, 1:] != -100).sum() for x in labels]).sum()
    else:
        count = kdkernels.global_valid_count(labels, shift=1, averaged=True)
    total = torch.zeros(())
    for tokens, labels, teacher in mine:
        loss = through(model, model(tokens), labels, teacher, count)
        loss.backward()
        total += loss.detach()
    if not alone:
        torch.distributed.all_reduce(total)
        total /= world
    return total


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x  # type: ignore[no-any-return]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    # Sums over processes round in another order: a few times eps of the largest element.
    eps = 32 * torch.finfo(dtype).eps
    scale = float(expected.abs().max())
    torch.testing.assert_close(full(actual), expected, rtol=eps, atol=eps * scale)


def gradients_of_heads() -> None:
    for tied in (False, True):
        alone = build(tied)
        expected = backward(alone, 0, whole_head, alone=True)
        for how in ("root", "own", "freed", "hybrid"):
            if tied and how == "own":
                continue  # a parameter of two groups is no case of fully_shard
            for through in (whole_head, inside_head):
                model = shard(build(tied), how)
                close(backward(model, 0, through), expected)
                for (name, p), wanted in zip(
                    model.named_parameters(), alone.parameters(), strict=True
                ):
                    assert isinstance(p, DTensor) and p.grad is not None, (name, how)
                    close(p.grad, wanted.grad)  # type: ignore[arg-type]


def mixed_precision() -> None:
    """Through the head the loss has the policy's dtype; gathered, that of the parameters."""
    seen = []

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        seen.append((hidden.dtype, weight.dtype))
        return loss_of(hidden, weight, bias, *rest)

    def through(model: LM, hidden: Tensor, *rest: Any) -> Tensor:
        return through_head(model.head, lambda *xs: loss(*xs, *rest), hidden)

    alone = build()
    expected = backward(alone, 0, whole_head, alone=True)
    model = shard(build(), "mixed")
    close(backward(model, 0, through), expected, torch.bfloat16)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    for p, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        assert p.grad is not None and p.grad.dtype == torch.float32
        close(p.grad, wanted.grad, torch.bfloat16)  # type: ignore[arg-type]
    assert gathered(model.head).weight.dtype == torch.float32


def train(model: LM, sharded: bool) -> tuple[Any, ...]:
    optimizer = kdkernels.AdamWAverage(model.parameters(), 0.05, max_grad_norm=0.5, eps=1e-3)
    averager = kdkernels.WeightAverager(model, "ema", decay=0.5)
    run(model, optimizer, averager, range(STEPS), sharded)
    return model, optimizer, averager


def run(model: LM, optimizer: Any, averager: Any, steps: Any, sharded: bool) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, whole_head, alone=not sharded)
        optimizer.step()
        averager.update(step)


def assert_like(sharded: tuple[Any, ...], alone: tuple[Any, ...]) -> None:
    """Parameters, moments and averages of both."""
    pairs = list(zip(sharded[0].parameters(), alone[0].parameters(), strict=True))
    pairs += list(zip(sharded[1].averages(), alone[1].averages(), strict=True))
    for p, other in list(pairs[: len(list(alone[0].parameters()))]):
        for name, expected in alone[1].state[other].items():
            pairs.append((sharded[1].state[p][name], expected))
    ours, theirs = (x[2].state_dict()["averages"] for x in (sharded, alone))
    pairs += [(ours[name], theirs[name]) for name in theirs]
    for actual, expected in pairs:
        close(actual.detach(), expected.detach())
    assert sharded[1].n_averaged == alone[1].n_averaged
    assert sharded[2].n_averaged == alone[2].n_averaged


def state_of(model: LM, optimizer: Any, averager: Any) -> dict[str, Any]:
    found = get_state_dict(model, optimizer)
    return {"model": found[0], "optimizer": found[1], "averager": averager.state_dict()}


def save(folder: Path) -> None:
    """Trains some steps and saves; the averages are those of one process."""
    parts = train(shard(build(), "own"), sharded=True)
    assert_like(parts, train(build(), sharded=False))
    dcp.save(state_of(*parts), checkpoint_id=folder)


def load(folder: Path) -> None:
    """By as many processes as there are, also one: goes on as if never interrupted."""
    alone = train(build(), sharded=False)
    torch.manual_seed(5)
    model = LM()  # with other weights
    sharded = torch.distributed.get_world_size() > 1
    if sharded:
        shard(model, "own")
    optimizer = kdkernels.AdamWAverage(model.parameters(), 0.05, max_grad_norm=0.5, eps=1e-3)
    averager = kdkernels.WeightAverager(model, "ema", decay=0.5)
    state = state_of(model, optimizer, averager)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    averager.load_state_dict(state["averager"])
    assert_like((model, optimizer, averager), alone)
    for parts, own in (((model, optimizer, averager), sharded), (alone, False)):
        run(*parts, range(STEPS, STEPS + 2), own)
    assert_like((model, optimizer, averager), alone)


def main(task: str, folder: Path) -> None:
    if task == "load":
        return load(folder)
    for case in (gradients_of_heads, mixed_precision, partial(save, folder)):
        print(case, flush=True)
        case()


if __name__ == "__main__":
    for world, task in ((2, "save"), (2, "load"), (1, "load"), (4, "load")):
        print(world, task, flush=True)
        fork(world, main, task, Path(sys.argv[1]))
