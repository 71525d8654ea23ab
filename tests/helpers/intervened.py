"""Interventions by hand, and one process of two that intervenes; run as a script by its test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kdkernels import Capture, Counterfactual, Interchange, Positions, Spans

# No token is the padding that RoBERTa counts its positions by.
BASE = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(3))
SOURCE = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(4))
SPANS = Spans(
    base_start=torch.tensor([1, 3]),
    source_start=torch.tensor([4, 0]),
    length=torch.tensor([2, 3]),
    source_row=torch.tensor([1, 1]),
)
OTHER_SPANS = Spans(torch.tensor([0, 5]), torch.tensor([1, 4]), torch.tensor([6, 1]))
POSITIONS = Positions(
    torch.tensor([[0, 6], [0, 1], [1, 2]]), torch.tensor([[1, 0], [0, 0], [1, 6]])
)


def pairs(where: Spans | Positions) -> list[tuple[int, int, int, int]]:
    """Row and position in the base, row and position in the source."""
    if isinstance(where, Positions):
        base, source = where.base_index.tolist(), where.source_index.tolist()
        return [(*to, *of) for to, of in zip(base, source, strict=True)]
    start, of, length, row = (None if x is None else x.tolist() for x in where)
    rows = range(len(start)) if row is None else row
    return [
        (b, start[b] + k, rows[b], of[b] + k) for b in range(len(start)) for k in range(length[b])
    ]


def by_hand(
    base: Tensor,
    source: Tensor,
    where: Spans | Positions,
    *,
    dims: slice = slice(None),
    basis: Tensor | None = None,
    mode: str = "swap",
) -> Tensor:
    """The base with the source's states in it, position for position."""
    out = base.clone()
    for row, position, source_row, source_position in pairs(where):
        old, new = base[row, position, dims], source[source_row, source_position, dims]
        if basis is not None:
            with torch.autocast("cpu", enabled=False):
                wide = old.to(basis.dtype)
                new = (wide + (new.to(basis.dtype) - wide) @ basis @ basis.T).to(old.dtype)
        elif mode != "swap":
            new = old + new if mode == "add" else old - new
        out[row, position, dims] = new
    return out


@contextmanager
def hooked(
    model: nn.Module, change: Mapping[str, Callable[[Tensor], Tensor | None]]
) -> Iterator[None]:
    """What a function returns of a module's output, or its first element, in its place."""

    def hook(act: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        def changed(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                return act(output)
            first = act(output[0])
            return None if first is None else (first, *output[1:])

        return changed

    with ExitStack() as stack:
        for path, act in change.items():
            handle = model.get_submodule(path).register_forward_hook(hook(act))
            stack.callback(handle.remove)
        yield


def outputs_of(model: nn.Module, paths: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """What modules of a plain model return, by forward hooks."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[Tensor], None]:
        return lambda output: found.update({path: output})

    with hooked(model, {path: keep(path) for path in paths}):
        model(x)
    return found


def expected_of(
    model: nn.Module, sites: Mapping[str, tuple[Tensor, Spans | Positions]], x: Any, **options: Any
) -> Any:
    """The output of a plain model with states (a source, where) put in at sites."""

    def act(source: Tensor, where: Spans | Positions) -> Callable[[Tensor], Tensor]:
        return lambda output: by_hand(output, source, where, **options)

    with hooked(model, {path: act(*site) for path, site in sites.items()}):
        return model(x)


def loss_of(output: Any) -> Tensor:
    """A loss that no normalisation makes constant."""
    state = getattr(output, "last_hidden_state", output)
    weight = torch.arange(state[0].numel(), dtype=state.dtype).sin().view_as(state[0])
    return (state * weight).mean()


def step(
    model: nn.Module,
    sites: Sequence[str],
    where: Spans | Positions,
    x: tuple[Tensor, Tensor] = (BASE, SOURCE),
    *,
    inside: bool = False,
    **options: Any,
) -> Tensor:
    """One step through base and source, the gradients in the model; returns the output."""
    model.zero_grad()
    with Capture(model, sites) as source:
        model(x[1])
    with Interchange(model, sites, source, where, **options):
        output = model(x[0])
        if inside:
            loss_of(output).backward()
    if not inside:
        loss_of(output).backward()
    assert not any("forward" in vars(m) for m in model.modules() if not hasattr(m, "_orig_mod"))
    return getattr(output, "last_hidden_state", output).detach()


def step_by_hand(
    model: nn.Module,
    sites: Sequence[str],
    where: Spans | Positions,
    x: tuple[Tensor, Tensor] = (BASE, SOURCE),
    **options: Any,
) -> Tensor:
    """The same by forward hooks."""
    model.zero_grad()
    source = outputs_of(model, sites, x[1])
    output = expected_of(model, {path: (source[path], where) for path in sites}, x[0], **options)
    loss_of(output).backward()
    return getattr(output, "last_hidden_state", output).detach()


def three_runs(
    model: nn.Module,
    sites: str | Sequence[str],
    where: Spans | Positions = SPANS,
    x: tuple[Tensor, Tensor] = (BASE, SOURCE),
    *,
    source: str = "source",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Base and counterfactual output by Counterfactual, the gradients of both in the model."""
    model.zero_grad()
    runs = Counterfactual(model, sites, **options)
    outputs = [runs.base(x[0])]
    if source == "source":
        runs.source(x[1])
    outputs.append(runs.counterfactual(where, source=source))
    (loss_of(outputs[0]) + 2 * loss_of(outputs[1])).backward()
    base, swapped = (getattr(o, "last_hidden_state", o).detach() for o in outputs)
    return base, swapped


class Block(nn.Module):
    """A layer of two modules."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # The mean mixes positions, as attention does.
        return x + self.dropout(self.second(self.first(x).relu() + x.mean(1, keepdim=True))).tanh()


class Net(nn.Module):
    """Layers with a head, for ``[batch, seq, 4]``."""

    def __init__(self, layers: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dropout) for _ in range(layers))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def checkpointed_compiled(model: nn.Module) -> nn.Module:
    return torch.compile(checkpointed(model), backend="aot_eager")


def parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, broadcast_buffers=False)


def compiled_parallel(model: nn.Module) -> nn.Module:
    return torch.compile(parallel(model), backend="aot_eager")


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def unwrapped(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of a model without CheckpointWrapper, and not sharded."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): getattr(grad, "full_tensor", grad.clone)()
        for name, grad in gradients.items()
    }


def main() -> None:
    """Each process its half of a batch: the gradients must be those of the whole batch."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(1)
    model, x, y = Net(), torch.randn(4, 7, 4), torch.randn(4, 7, 4)
    whole = Spans(*(torch.tensor(v) for v in ([0, 4, 2, 1], [3, 0, 0, 5], [4, 1, 5, 2])))
    half = Spans(*(None if v is None else v.chunk(2)[rank] for v in whole))
    parts = x.chunk(2)[rank], y.chunk(2)[rank]
    sites = ["layers.0", "layers.2.first"]
    expected = {}
    for run in (step, three_runs):
        run(model, sites, whole, (x, y))
        expected[run] = [p.grad.clone() for p in model.parameters()]
    wrapped = parallel(model)  # from here on every backward pass averages
    for run, grads in expected.items():
        for _ in range(2):
            run(wrapped, sites, half, parts)
            for p, grad in zip(model.parameters(), grads, strict=True):
                torch.testing.assert_close(p.grad, grad)
    torch.distributed.barrier()
    # No teardown: see one_process, but here the interpreter ends as well.
    os._exit(0)


if __name__ == "__main__":
    main()
