"""``AdamWAverage`` against torch's AdamW and the averages of its weights."""

from __future__ import annotations

import copy
import doctest
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.averaged import build, script
from helpers.budget import assert_within_budget
from torch import Tensor, nn

import kdkernels
from kdkernels import AdamWAverage, WeightAverager, optim

HALVES = [torch.bfloat16, torch.float16]


def give_grads(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """The same gradients for the same seed, whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    return build().to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.detach().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values()]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) > 0
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_torch(
    steps: int, dtype: torch.dtype, average: dict[str, Any], **options: Any
) -> tuple[nn.Module, WeightAverager]:
    """Torch's AdamW, then the average."""
    model = net().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    averager = WeightAverager(model, dtype=dtype, buffers="skip", **average)
    for step in range(1, steps + 1):
        give_grads(model, step)
        optimizer.step()
        averager.update(step)
    return model, averager


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    "average",
    [
        {"kind": "swa"},
        {"kind": "swa", "count_start": True},
        {"kind": "swa", "start_step": 3, "every": 4},
        {"kind": "ema", "decay": 0.8, "warmup": True},
        {"kind": "ema", "decay": 0.8, "start_step": 5, "count_start": True},
    ],
    ids=str,
)
def test_equals_adamw_and_its_average(average: dict[str, Any], backend: str) -> None:
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)}
    right, right_average = by_torch(20, torch.float64, average, **options)
    same, same_average = by_torch(20, torch.float32, average, **options)
    model = net()
    kind = {("average" if key == "kind" else key): x for key, x in average.items()}
    optimizer = AdamWAverage(model.parameters(), **options, **kind, backend=backend)
    for step in range(1, 21):
        give_grads(model, step)
        optimizer.step()
    assert optimizer.n_averaged == right_average.n_averaged
    for actual, oracle, alike in zip(
        [*model.parameters(), *optimizer.averages()],
        [*right.parameters(), *right_average.averages().values()],
        [*same.parameters(), *same_average.averages().values()],
        strict=True,
    ):
        # Small numbers beside 1: what a weight moves.
        assert_within_budget(actual, oracle, alike, torch.float32, unit=1.0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_masters_of_16_bit_weights(dtype: torch.dtype) -> None:
    """Many steps below the last digit of a weight arrive; without masters they do not."""
    results = []
    for kind in (torch.float64, torch.float32, dtype, None):
        model = nn.Linear(9, 9).to(kind or dtype)
        for p in model.parameters():
            nn.init.ones_(p)
        optimizer = AdamWAverage(model.parameters(), lr=1e-5, master_weights=kind == dtype)
        for _ in range(60):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        masters = [optimizer.state[p].get("master", p) for p in model.parameters()]
        results.append([*masters, *optimizer.averages()])
        if kind == dtype:
            assert all(x.dtype == torch.float32 for x in states(optimizer))
            pairs = zip(model.parameters(), masters, strict=True)
            assert all(torch.equal(p, m.to(dtype)) for p, m in pairs)
    oracle, same, found, without = results
    for actual, right, alike in zip(found, oracle, same, strict=True):
        assert_within_budget(actual, right, alike, torch.float32)
    if dtype == torch.bfloat16:
        assert (without[0] == 1).all() and (oracle[0] < 0.9995).all()


def test_groups_have_their_own_options() -> None:
    def run(kind: type[torch.optim.Optimizer], model: nn.Module, **more: Any) -> nn.Module:
        first, last = model.first.parameters(), model.last.bias
        groups = [
            {"params": first, "lr": 0.1, "betas": (0.5, 0.6)},
            {"params": [last], "eps": 0.1, "weight_decay": 0.5, "maximize": True},
        ]
        optimizer = kind(groups, lr=0.02, **more)
        optimizer.add_param_group({"params": model.norm.parameters(), "lr": torch.tensor(0.3)})
        for step in range(6):
            give_grads(model, step)
            optimizer.step()
        return model

    right = run(torch.optim.AdamW, net().double(), foreach=False)
    same = run(torch.optim.AdamW, net(), foreach=False)
    actual = run(AdamWAverage, net())
    for p, oracle, alike in zip(*(m.parameters() for m in (actual, right, same)), strict=True):
        assert_within_budget(p, oracle, alike, torch.float32, unit=1.0)


def test_mixed_dtypes_in_a_group() -> None:
    model = net(torch.bfloat16)
    model.norm.float()
    optimizer = AdamWAverage(model.parameters(), lr=0.1, master_weights=True)
    for step in range(3):
        give_grads(model, step)
        optimizer.step()
    assert [("master" in optimizer.state[p]) for p in model.parameters()] == [
        p.dtype == torch.bfloat16 for p in model.parameters()
    ]
    assert all(a.dtype == torch.float32 for a in optimizer.averages())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("most", [0.1, 1e6])
def test_clipping(most: float, dtype: torch.dtype) -> None:
    model, other = net(dtype), net(dtype).double()
    groups = [{"params": model.first.parameters()}, {"params": [*model.norm.parameters()]}]
    optimizer = AdamWAverage(groups, lr=0.1, max_grad_norm=most, eps=0.1)
    right = torch.optim.AdamW(other.parameters(), lr=0.1, eps=0.1)
    assert optimizer.grad_norm is None
    for step in range(4):
        give_grads(model, step)
        model.last.bias.grad = None
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.double()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), most)
        optimizer.step()
        right.step()
        torch.testing.assert_close(optimizer.grad_norm.double(), norm, rtol=1e-5, atol=0)
        for p, g in zip(model.parameters(), before, strict=True):
            assert g is None or torch.equal(p.grad, g)
    eps = torch.finfo(dtype).eps
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p.double() - q).abs().max() <= 8 * eps * max(1.0, q.abs().max())


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool) -> None:
    """The scale is divided out; a step that overflows changes and counts nothing."""
    model, other = net(), net()
    optimizer = AdamWAverage(model.parameters(), lr=0.1, max_grad_norm=0.5)
    right = AdamWAverage(other.parameters(), lr=0.1, max_grad_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(5):
        overflows = step == 2
        scaler.scale(torch.zeros(()))  # as a loss is, before backward
        give_grads(model, step, scaler.get_scale())
        give_grads(other, step)
        if overflows:
            model.last.bias.grad[0] = float("inf")
            kept = [*model.parameters(), *states(optimizer)]
            before = [x.clone() for x in kept]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert_same(kept, before)
        else:
            right.step()
    assert scaler.get_scale() == 512.0
    assert optimizer.n_averaged == right.n_averaged == 4
    assert_same(list(model.parameters()), list(other.parameters()))
    assert_same(states(optimizer), states(right))
    torch.testing.assert_close(optimizer.grad_norm, right.grad_norm)


OPTIONS: list[dict[str, Any]] = [
    {"average": "ema", "warmup": True, "start_step": 2, "every": 2},
    {"average": "swa", "count_start": True, "max_grad_norm": 1.0},
    {"average": None},
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resuming_is_exact(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """Torch's own loading rounds the state of 16-bit parameters to their dtype."""

    def make() -> tuple[nn.Module, AdamWAverage]:
        model = net(dtype)
        return model, AdamWAverage(model.parameters(), 0.1, master_weights=True, **options)

    model, optimizer = make()
    for step in range(8):
        give_grads(model, step)
        optimizer.step()
        if step == 4:
            both = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(both, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again, resumed = make()
    again.load_state_dict(saved["model"])
    kept = copy.deepcopy(saved["optimizer"])
    resumed.load_state_dict(saved["optimizer"])
    for step in range(5, 8):
        give_grads(again, step)
        resumed.step()
    assert_same(list(again.parameters()), list(model.parameters()))
    assert_same(states(resumed), states(optimizer))
    assert resumed.n_averaged == optimizer.n_averaged
    # What was loaded is not what later steps write to.
    for i, state in kept["state"].items():
        assert_same(list(saved["optimizer"]["state"][i].values()), list(state.values()))


@pytest.mark.parametrize("fused", [False, True])
def test_the_state_of_adamw_loads(fused: bool) -> None:
    model, other = net(), net()
    before = torch.optim.AdamW(other.parameters(), lr=0.1, fused=fused)
    for step in range(3):
        give_grads(other, step)
        before.step()
    model.load_state_dict(other.state_dict())
    optimizer = AdamWAverage(model.parameters(), lr=0.5, count_start=True)
    optimizer.load_state_dict(before.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.n_averaged == 1
    models = [[p.detach().clone() for p in model.parameters()]]
    for step in range(3, 6):
        give_grads(model, step)
        give_grads(other, step)
        optimizer.step()
        before.step()
        models.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for average, *values in zip(optimizer.averages(), *models, strict=True):
        torch.testing.assert_close(average, torch.stack(values).mean(0))


def test_distributed_checkpoint_keeps_the_count(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    results = []
    for load in (False, True):
        model = net(torch.bfloat16)
        optimizer = AdamWAverage(model.parameters(), 0.1, every=2, master_weights=True)
        if load:
            found = get_state_dict(model, optimizer)
            state = {"model": found[0], "optimizer": found[1]}
            dcp.load(state, checkpoint_id=tmp_path)
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        for step in range(3 if load else 0, 6):
            give_grads(model, step)
            optimizer.step()
            if step == 2:
                found = get_state_dict(model, optimizer)
                dcp.save({"model": found[0], "optimizer": found[1]}, checkpoint_id=tmp_path)
        assert optimizer.n_averaged == 3
        results.append([*model.parameters(), *states(optimizer)])
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_swapped(fails: bool, dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = AdamWAverage(model.parameters(), 0.1, master_weights=dtype in HALVES)
    for step in range(4):
        give_grads(model, step)
        optimizer.step()
    kept = [*model.parameters(), *states(optimizer)]
    before = [x.detach().clone() for x in kept]
    averages = [a.clone() for a in optimizer.averages()]
    try:
        with optimizer.swapped():
            for p, average in zip(model.parameters(), averages, strict=True):
                error = (p.double() - average.double()).abs()
                assert (error <= torch.finfo(dtype).eps * average.abs()).all()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(kept, before, strict=True))
    give_grads(model, 9)
    optimizer.step()


def test_what_must_stay_outside_of_swapped() -> None:
    model = net()
    optimizer = AdamWAverage(model.parameters())
    assert not optimizer.started
    with pytest.raises(RuntimeError, match="swapped must come after a step that averages, got non"):
        optimizer.swapped().__enter__()
    give_grads(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    calls: dict[str, Callable[[], object]] = {
        "step": optimizer.step,
        "averages": optimizer.averages,
        "swapped": lambda: optimizer.swapped().__enter__(),
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(state),
    }
    with optimizer.swapped():
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=f": {name} must be called outside of swapped"):
                call()
    kept = [p.detach().clone() for p in model.parameters()]
    with (
        pytest.raises(RuntimeError, match=r"must not be written to inside of swapped, got a chan"),
        optimizer.swapped(),
        torch.no_grad(),
    ):
        model.norm.bias.add_(1)
    assert torch.equal(kept[0], model.first.weight)
    other = AdamWAverage(net().parameters(), average=None)
    for call in (other.averages, lambda: other.swapped().__enter__()):
        with pytest.raises(RuntimeError, match="of an optimizer that averages, got average=None"):
            call()


def test_parameters_without_gradients() -> None:
    """Never: left alone. At times: averaged as they are."""
    results = []
    for kind in (torch.optim.AdamW, AdamWAverage):
        model = net()
        parameters = list(model.parameters())
        optimizer = kind(parameters, lr=0.1)
        averager = WeightAverager(model, buffers="skip")
        for step in range(6):
            give_grads(model, step)
            model.last.bias.grad = None
            if step in (0, 3):
                model.first.bias.grad = None
            if step == 5:
                model.norm.weight.grad = None
            optimizer.step()
            averager.update(step)
        if isinstance(optimizer, AdamWAverage):
            assert model.last.bias not in optimizer.state
            assert optimizer.state[model.first.bias]["step"] == 4
            averages = optimizer.averages()
        else:
            averages = list(averager.averages().values())
        results.append([*parameters, *averages])
    for actual, right in zip(*results[::-1], strict=True):
        torch.testing.assert_close(actual, right)


def test_a_step_that_averages_nothing_leaves_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    own = optim.adamw_average_

    def spy(*args: Any, **options: Any) -> None:
        seen.append(options["weight"] is not None)
        own(*args, **options)

    monkeypatch.setattr(optim, "adamw_average_", spy)
    model = net()
    optimizer = AdamWAverage(model.parameters(), every=3)
    for step in range(6):
        give_grads(model, step)
        optimizer.step()
    assert seen == [False, False, True] * 2


def test_schedulers_and_closures() -> None:
    x, results = torch.randn(5, 7), []
    for kind in (torch.optim.AdamW, AdamWAverage):
        model = net()
        optimizer = kind(model.parameters(), lr=0.1, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        losses = []
        for _ in range(6):
            losses.append(optimizer.step(closure).detach())
            scheduler.step()
        results.append([*model.parameters(), torch.stack(losses)])
    for actual, right in zip(*results, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)


def test_copies_and_moved_state() -> None:
    model = net()
    optimizer = AdamWAverage(model.parameters(), lr=0.1)
    give_grads(model, 0)
    optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    for state in other.state.values():  # as frameworks do that offload
        for name, x in state.items():
            state[name] = x.clone()
    for m, o in ((model, optimizer), (twin, other)):
        give_grads(m, 1)
        o.step()
    assert_same(list(model.parameters()), list(twin.parameters()))
    assert_same(states(optimizer), states(other))
    assert other.n_averaged == 2


@pytest.mark.distributed
def test_two_processes_with_a_sharded_model(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    launcher += ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    done = script("optimize", tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = net()
    optimizer = AdamWAverage(model.parameters())
    give_grads(model, 0)
    optimizer.step()
    before = [x.clone() for x in states(optimizer)]
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][1]["average"] = torch.zeros(3)
    amsgrad = torch.optim.AdamW(net().parameters(), amsgrad=True).state_dict()
    missing = copy.deepcopy(optimizer.state_dict())
    del missing["state"][0]["exp_avg"]
    for state, message in (
        (wrong, r"average of the state must have the shape of its parameter \[7\], got \[3\]"),
        (amsgrad, "amsgrad of the state must be False, got True"),
        (missing, "state must have exp_avg of each parameter, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    assert_same(states(optimizer), before)


P = [nn.Parameter(torch.zeros(3))]
REFUSALS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: AdamWAverage(P, average="mean"), ValueError, "average must be one of swa, ema, got"),
    (lambda: AdamWAverage(P, decay=2.0), ValueError, r"decay must be in \[0, 1\], got 2.0"),
    (lambda: AdamWAverage(P, every=0), ValueError, "every must be 1 or more, got 0"),
    (lambda: AdamWAverage(P, start_step=0.5), TypeError, "start_step must be an int, got float"),
    (lambda: AdamWAverage(P, warmup=True), ValueError, "warmup must be False for average='swa'"),
    (
        lambda: AdamWAverage(P, average=None, count_start=True),
        ValueError,
        "count_start must be False for average=None, got True",
    ),
    (lambda: AdamWAverage(P, max_grad_norm=0), ValueError, "max_grad_norm must be positive, got 0"),
    (lambda: AdamWAverage(P, lr=-1), ValueError, "lr must be finite and 0 or more, got -1"),
    (lambda: AdamWAverage(P, lr=torch.ones(2)), ValueError, r"lr must be one number, got shape"),
    (lambda: AdamWAverage(P, betas=(0.9, 1.0)), ValueError, "betas must be below 1, got 1.0"),
    (lambda: AdamWAverage(P, betas=(0.9,)), ValueError, "betas must be two numbers, got 1"),
    (lambda: AdamWAverage(P, eps="0"), TypeError, "eps must be a number, got str"),
    (lambda: AdamWAverage(P, backend="cuda"), ValueError, "backend must be one of .*, got 'cuda'"),
    (
        lambda: AdamWAverage([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]),
        TypeError,
        "params must be real, got torch.complex64 at place 0",
    ),
    (
        lambda: AdamWAverage([nn.Parameter(torch.zeros(2, dtype=torch.float8_e5m2))]),
        TypeError,
        "params must be float32, bfloat16, float16 or float64, got torch.float8_e5m2 at place 0",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSALS)
def test_refusals(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as found:
        call()
    assert re.match(r"AdamWAverage: .* must .*, got ", str(found.value))


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(
        RuntimeError, match="gradients must be dense, got torch.sparse_coo for a pa"
    ):
        AdamWAverage(table.parameters()).step()


def test_the_facade_and_the_example() -> None:
    assert kdkernels.optim.AdamWAverage is kdkernels.AdamWAverage is AdamWAverage
    found = doctest.testmod(optim)
    assert found.attempted > 0 and found.failed == 0
