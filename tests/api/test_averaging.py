"""Averages of weights: conventions, exchange, resuming, export, against float64."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import averaged
from helpers.averaged import Net, build, script
from helpers.budget import assert_within_budget
from torch import Tensor, nn

import kdkernels
from kdkernels import WeightAverager, ema_update_, swa_update_
from kdkernels.api import _files
from kdkernels.api import averager as averager_module

HALVES = [torch.bfloat16, torch.float16]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
Snapshots = list[dict[str, Tensor]]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def disturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p))


def trained(model: nn.Module, averager: WeightAverager, steps: int) -> Snapshots:
    """Weights after each step."""
    found = []
    for step in range(steps):
        disturb(model, step)
        averager.update(step)
        found.append(snapshot(model))
    return found


def assert_averages(averager: WeightAverager, oracle: dict[str, Tensor], same: Any) -> None:
    found = averager.averages()
    assert list(found) == list(oracle)
    for name, right in oracle.items():
        assert_within_budget(found[name], right, same[name], found[name].dtype)


def mean(models: Snapshots, dtype: torch.dtype) -> dict[str, Tensor]:
    """By the recursion, in a dtype."""
    found = {name: x.to(dtype) for name, x in models[0].items()}
    for n, model in enumerate(models[1:], 1):
        found = {name: x + (model[name].to(dtype) - x) / (n + 1) for name, x in found.items()}
    return found


def exponential(models: Snapshots, decays: list[float], dtype: torch.dtype) -> dict[str, Tensor]:
    found = {name: x.to(dtype) for name, x in models[0].items()}
    for model, decay in zip(models[1:], decays, strict=True):
        found = {name: x + (1 - decay) * (model[name].to(dtype) - x) for name, x in found.items()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("count_start", [False, True])
def test_swa_is_the_mean_of_the_models(count_start: bool, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    start = [snapshot(model)] if count_start else []
    averager = WeightAverager(model, count_start=count_start)
    assert averager.started is count_start
    models = start + trained(model, averager, 6)
    oracle = {name: torch.stack([m[name].double() for m in models]).mean(0) for name in models[0]}
    assert_averages(averager, oracle, mean(models, torch.float32))
    assert averager.n_averaged == len(models)


@pytest.mark.parametrize("warmup", [False, True])
def test_ema(warmup: bool) -> None:
    model = build()
    averager = WeightAverager(model, "ema", decay=0.4, warmup=warmup)
    models = trained(model, averager, 9)
    decays = [min(0.4, (1 + n) / (10 + n)) if warmup else 0.4 for n in range(1, 9)]
    assert_averages(
        averager,
        exponential(models, decays, torch.float64),
        exponential(models, decays, torch.float32),
    )


@pytest.mark.parametrize(
    # A bfloat16 pair has 16 bits: at decay 0.9999 half of such a change would be lost.
    ("dtype", "decay"),
    [(torch.float32, 0.9999), (torch.float16, 0.9999), (torch.bfloat16, 0.99)],
)
def test_bfloat16_moves_as_float64_says(dtype: torch.dtype, decay: float) -> None:
    model = nn.Linear(8, 8).bfloat16()
    averager = WeightAverager(model, "ema", decay=decay, dtype=dtype, count_start=True)
    start = model.weight.detach().double()
    disturb(model, 0)
    end, steps = model.weight.detach().double(), 500
    for step in range(steps):
        averager.update(step)
    right = end + (start - end) * decay**steps
    total = averager.averages()["weight"].double()
    if dtype in HALVES:
        total = total + averager.state_dict()["compensations"]["weight"].double()
    assert (total - right).norm() < 0.01 * (right - start).norm()
    with averager.swapped():
        eps = torch.finfo(torch.bfloat16).eps
        assert ((model.weight - total).abs() <= eps * total.abs()).all()


def test_steps() -> None:
    model = build()
    averager = WeightAverager(model, start_step=3, every=2)
    assert [averager.update(step) for step in range(9)] == [s in (3, 5, 7) for s in range(9)]
    assert averager.n_averaged == 3


def test_the_start_counts_at_start_step_in_both_conventions() -> None:
    results = []
    for count_start in (False, True):
        model = build()
        averager = WeightAverager(model, start_step=2, count_start=count_start)
        trained(model, averager, 5)
        results.append((averager.averages(), averager.n_averaged))
    assert results[0][1] == results[1][1] == 3
    assert all(torch.equal(results[0][0][name], x) for name, x in results[1][0].items())


def test_tied_weights_are_averaged_once() -> None:
    model = build()
    names = list(WeightAverager(model).averages())
    assert names == [name for name, _ in model.named_parameters()]
    assert "first.weight" in names and "last.weight" not in names
    apart = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))
    apart[1].weight.data = apart[0].weight.data  # two parameters, one memory
    averager = WeightAverager(apart)
    assert list(averager.averages()) == ["0.weight"]
    trained(apart, averager, 2)
    before = snapshot(apart)
    with averager.swapped():
        pass
    assert torch.equal(apart[1].weight, before["1.weight"])


@pytest.mark.parametrize("buffers", ["copy", "average", "skip"])
def test_buffers(buffers: str) -> None:
    model = build()
    model.register_buffer("constant", torch.ones(1, 1).expand(2, 3))
    averager = WeightAverager(model, buffers=buffers, every=2)
    means = []
    for step in range(3):
        model(torch.randn(5, 7))
        averager.update(step)
        means.append(model.norm.running_mean.clone())
    model(torch.randn(5, 7))
    before = {name: b.clone() for name, b in model.named_buffers()}
    expected = {
        "copy": means[2],
        "average": means[0] + 0.5 * (means[2] - means[0]),
        "skip": before["norm.running_mean"],
    }[buffers]
    with averager.swapped():
        assert torch.equal(model.norm.running_mean, expected)
        assert model.norm.num_batches_tracked == (4 if buffers == "skip" else 3)
        model(torch.randn(5, 7))  # writes to the statistics
    for name, buffer in model.named_buffers():
        if buffers != "skip" or "norm" not in name:
            assert torch.equal(buffer, before[name])
    saved = [averager.state_dict()["averages"], averager.state_dict()["copies"]]
    assert ("norm.running_mean" in saved[0]) == (buffers == "average")
    assert len(saved[1]) == {"copy": 3, "average": 1, "skip": 0}[buffers]


def bits(x: Tensor) -> Tensor:
    return x.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize(
    ("param", "average"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("fails", [False, True])
def test_swapped(param: torch.dtype, average: torch.dtype, device: Any, fails: bool) -> None:
    model = build().to(param)
    averager = WeightAverager(model, "ema", decay=0.5, dtype=average, device=device)
    trained(model, averager, 4)
    kept = averager.state_dict()
    copies = [dict(kept[key]) for key in ("averages", "compensations", "copies")]
    copies = [{name: x.clone() for name, x in part.items()} for part in copies]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    wanted = {name: x.to(param) for name, x in copies[0].items()}
    with pytest.raises(KeyError) if fails else averager.swapped():
        if fails:
            with averager.swapped():
                raise KeyError
        for name, p in model.named_parameters():
            # By one digit: the exchange takes ties away from zero, pairs have more of them.
            close = torch.finfo(param).eps * wanted[name].abs()
            lost = torch.finfo(average).eps * wanted[name].abs() if average in HALVES else 0
            assert ((p - wanted[name]).abs() <= close + lost).all()
            assert not torch.equal(p, before[name])
    assert all(torch.equal(bits(x), bits(before[n])) for n, x in model.named_parameters())
    for key, part in zip(("averages", "compensations", "copies"), copies, strict=True):
        for name, x in averager.state_dict()[key].items():
            assert torch.equal(x, part[name])


def test_an_average_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there is one device: the copies on the way are made all the same."""
    monkeypatch.setattr(averager_module, "_elsewhere", lambda source, device: True)
    check_elsewhere(build().bfloat16(), "cpu")


@needs_gpu
@pytest.mark.parametrize(("model", "average"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_an_average_on_another_device(model: str, average: str) -> None:
    check_elsewhere(build().bfloat16().to(model), average)


def check_elsewhere(model: nn.Module, device: str) -> None:
    averager = WeightAverager(model, device=device)
    models = [{n: x.cpu() for n, x in m.items()} for m in trained(model, averager, 3)]
    found = averager.averages()
    assert all(x.device.type == device for x in found.values())
    before = snapshot(model)
    with averager.swapped():
        for name, right in mean(models, torch.float64).items():
            assert_within_budget(
                found[name].cpu(), right, mean(models, torch.float32)[name], torch.float32
            )
            assert torch.equal(
                dict(model.named_parameters())[name].cpu(), found[name].cpu().bfloat16()
            )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@needs_gpu
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_updates_do_not_synchronise(kind: str) -> None:
    model = build().cuda()
    averager = WeightAverager(model, kind, warmup=kind == "ema")
    averager.update(0)
    shadow = [p.detach().clone() for p in model.parameters()]
    step = torch.tensor(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        averager.update(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ema_update_(shadow, model.parameters(), step=step)
    swa_update_(shadow, model.parameters(), n_averaged=step)


@needs_gpu
def test_a_model_moves_to_the_gpu_with_its_average() -> None:
    averager = WeightAverager(model := build(), count_start=True)
    model.cuda()
    averager.update(1)
    assert averager.n_averaged.is_cuda and averager.averages()["first.weight"].is_cuda


def test_swapped_needs_no_copy_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    averager = WeightAverager(model := nn.Linear(4, 4).bfloat16(), count_start=True)
    monkeypatch.setattr(Tensor, "clone", lambda x: pytest.fail("a copy"))
    with averager.swapped() as same:
        assert same is model


def test_what_must_stay_outside_of_swapped() -> None:
    averager = WeightAverager(model := build(), count_start=True)
    calls: dict[str, Callable[[], object]] = {
        "update": lambda: averager.update(1),
        "swapped": lambda: averager.swapped().__enter__(),
        "state_dict": averager.state_dict,
        "load_state_dict": lambda: averager.load_state_dict({}),
        "export": lambda: averager.export("nowhere"),
        "averages": averager.averages,
    }
    before = snapshot(model)
    with averager.swapped():
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=f"{name} must be called outside of swapped"):
                call()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert averager.update(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writing_in_the_block_is_an_error(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    averager = WeightAverager(model, count_start=True)
    disturb(model, 1)
    before = snapshot(model)
    with (
        pytest.raises(RuntimeError, match="got a change of first.bias: it is restored"),
        averager.swapped(),
        torch.no_grad(),
    ):
        model.first.bias.add_(1.0)
    if dtype == torch.bfloat16:
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_autocast_does_not_keep_old_weights() -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    averager = WeightAverager(model, count_start=True)
    disturb(model, 1)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with averager.swapped():
            inside = model(x)
        after = model(x)
    assert torch.equal(after, before) and not torch.equal(inside, before)


def test_saved_tensors_notice_the_exchange() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    averager = WeightAverager(model, count_start=True)
    loss = model(torch.randn(2, 3)).sum()
    with averager.swapped(), pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


@pytest.mark.parametrize(("kind", "dtype"), [("swa", "float32"), ("ema", "bfloat16")])
def test_resuming_after_a_kill(kind: str, dtype: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    assert script("train", folders[1], kind, dtype, 7).returncode == -signal.SIGKILL
    for folder in folders:  # both in processes of as many threads: matrix products round by them
        done = script("train", folder, kind, dtype, -1)
        assert done.returncode == 0, done.stderr
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in folders]
    (whole, killed), key = ends, "averager"
    assert whole[key]["n_averaged"] == killed[key]["n_averaged"] == averaged.STEPS - 2
    pairs = [(whole["model"], killed["model"])]
    pairs += [(whole[key][part], killed[key][part]) for part in ("averages", "compensations")]
    for right, actual in pairs:
        assert right.keys() == actual.keys()
        assert all(torch.equal(actual[name], x) for name, x in right.items())


@pytest.mark.distributed
def test_two_processes_with_a_sharded_model(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    launcher += ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    done = script("shard", tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", ["averages", "copies"])
def test_a_state_that_does_not_fit_changes_nothing(part: str) -> None:
    averager = WeightAverager(model := build(), "ema", count_start=True)
    other = WeightAverager(build(), "ema")
    trained(model, averager, 2)
    state = averager.state_dict()
    name = list(state[part])[-1]
    faults = [
        ({**state, "kind": "swa"}, "kind of the state must be 'ema', got 'swa'"),
        ({**state, "dtype": "bfloat16"}, "dtype of the state must be 'float32', got 'bfloat16'"),
        ({**state, "buffers": "skip"}, "buffers of the state must be 'copy', got 'skip'"),
        ({**state, "format": 9}, "format of the state must be 1, got 9"),
        ({"kind": "ema"}, "state must have 'format', got none"),
        (
            {**state, part: {n: x for n, x in state[part].items() if n != name}},
            f"{part} of the state must have {name}, got none",
        ),
        ({**state, part: {**state[part], "x": torch.ones(1)}}, "must be of this model, got x"),
        (
            {**state, part: {**state[part], name: torch.ones(2, 9)}},
            rf"{name} of the state must be Tensor .*, got Tensor torch.float32 \[2, 9\]",
        ),
    ]
    before = {n: x.clone() for n, x in other.averages().items()}
    for fault, message in faults:
        with pytest.raises(ValueError, match=f"WeightAverager: .*{message}"):
            other.load_state_dict(fault)
    assert all(torch.equal(x, before[n]) for n, x in other.averages().items())
    assert not other.started
    other.load_state_dict(state)
    assert other.started and other.n_averaged == 3


def test_a_model_that_moves() -> None:
    model = build()
    averager = WeightAverager(model)
    averager.update(0)
    first = snapshot(model)
    # As load_state_dict(assign=True) and Module.to() of other devices do it.
    model.load_state_dict({n: x.clone() for n, x in model.state_dict().items()}, assign=True)
    model.norm.weight.data = model.norm.weight.data.clone()
    disturb(model, 1)
    averager.update(1)
    models = [first, snapshot(model)]
    del models[1]["last.weight"]  # assigned, so no longer tied
    assert_averages(averager, mean(models, torch.float64), mean(models, torch.float32))
    model.half()
    with pytest.raises(RuntimeError, match=r"first.weight must stay torch.float32 \[7, 7\], got"):
        averager.update(2)


def test_thawing_is_an_error() -> None:
    model = build()
    model.norm.requires_grad_(False)
    averager = WeightAverager(model)
    assert list(averager.averages()) == ["first.weight", "first.bias", "last.bias"]
    assert len(WeightAverager(model, trainable_only=False).averages()) == 5
    model.norm.requires_grad_(True)
    with pytest.raises(RuntimeError, match="norm.weight must stay frozen, got requires_grad=True"):
        averager.update(0)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled(backend: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    compiled = torch.compile(model, backend=backend)
    averager = WeightAverager(compiled)
    assert list(averager.averages()) == [name for name, _ in model.named_parameters()]
    x = torch.randn(3, 4)
    compiled(x)
    trained(model, averager, 3)
    before = compiled(x)
    with averager.swapped():
        torch.testing.assert_close(compiled(x), model(x))
        assert (compiled(x) - before).abs().max() > 0.01
    assert torch.equal(compiled(x), before)


def test_names_of_wrapped_models() -> None:
    inner = nn.Sequential(nn.Linear(2, 2))
    inner.add_module("module", nn.Linear(2, 2))  # a name, not a wrapper
    inner[0] = torch.compile(inner[0])
    model = nn.DataParallel(torch.compile(inner))
    names = ["0.weight", "0.bias", "module.weight", "module.bias"]
    assert list(WeightAverager(model).averages()) == names


@pytest.fixture
def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=40, intermediate_size=32, **sizes)
    return transformers.BertForMaskedLM(config).eval()


TOKENS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("wrapped", ["", "model", "layers"])
def test_export_reloads(wrapped: str, bert: nn.Module, tmp_path: Path) -> None:
    model = torch.compile(bert, backend="eager") if wrapped == "model" else bert
    if wrapped == "layers":
        layers = bert.bert.encoder.layer
        layers[0] = torch.compile(layers[0], backend="eager")
    averager = WeightAverager(model)
    trained(model, averager, 3)
    before = snapshot(bert)
    averager.export(tmp_path / "deep" / "model")
    assert all(torch.equal(p, before[name]) for name, p in bert.named_parameters())
    loaded, info = type(bert).from_pretrained(tmp_path / "deep" / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with averager.swapped(), torch.no_grad():
        assert torch.equal(loaded.eval()(TOKENS).logits, bert(TOKENS).logits)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model"]


def test_export_is_whole_or_not_at_all(bert: nn.Module, tmp_path: Path) -> None:
    averager, path = WeightAverager(bert, count_start=True), tmp_path / "model"
    averager.export(path)
    names = sorted(p.name for p in path.iterdir())
    with pytest.raises(FileExistsError, match="model must be new or empty unless overwrite=True"):
        averager.export(path)

    def broken(folder: str) -> None:
        (Path(folder) / "half").write_text("")
        raise OSError("disk full")

    before, real = snapshot(bert), bert.save_pretrained
    bert.save_pretrained = broken
    with pytest.raises(OSError, match="disk full"):
        averager.export(path, overwrite=True)
    assert sorted(p.name for p in path.iterdir()) == names
    assert all(torch.equal(p, before[name]) for name, p in bert.named_parameters())
    bert.save_pretrained = real
    (path / "old").write_text("")
    averager.export(path, overwrite=True)
    assert sorted(p.name for p in path.iterdir()) == names
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_rename_that_fails_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    _files.write_folder(path, lambda folder: (folder / "a").write_text("1"))
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target == path and source.name == "new":
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(_files.os, "replace", replace)
    with pytest.raises(OSError, match="no"):
        _files.write_folder(path, lambda folder: None, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert (path / "a").read_text() == "1"


def test_export_of_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT models need peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=40, intermediate_size=32, **sizes)
    base = transformers.BertForMaskedLM(config).eval()
    weights = {name: x.clone() for name, x in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"]))
    averager = WeightAverager(model)
    assert all("lora_" in name for name in averager.averages())
    for step in range(2):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
        averager.update(step)
    averager.export(tmp_path / "adapter")
    fresh = transformers.BertForMaskedLM(config).eval()
    fresh.load_state_dict(weights)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with averager.swapped(), torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model.eval()(TOKENS).logits)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_functions(backend: str, as_tensor: bool) -> None:
    model = build().bfloat16()
    count = (lambda n: torch.tensor(n)) if as_tensor else (lambda n: n)
    models, shadows = [], [[torch.empty_like(p).float() for p in model.parameters()] for _ in "ab"]
    decays = [0.5, *(min(0.3, (1 + n) / (10 + n)) for n in range(5))]
    for n in range(6):
        disturb(model, n)
        models.append(snapshot(model))
        with kdkernels.use_backend(backend):
            swa_update_(shadows[0], model.parameters(), n_averaged=count(n))
            if n == 0:
                shadows[1] = [x.clone() for x in shadows[0]]
            else:
                ema_update_(shadows[1], model.parameters(), decay=0.3, step=count(n - 1))
    for shadow, average in (
        (shadows[0], lambda dtype: mean(models, dtype)),
        (shadows[1], lambda dtype: exponential(models, decays[1:], dtype)),
    ):
        for x, right, same in zip(
            shadow, *(average(d).values() for d in (torch.float64, torch.float32)), strict=True
        ):
            assert_within_budget(x, right, same, torch.float32)


X, P = [torch.zeros(2)], [torch.ones(2)]
REFUSALS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: ema_update_(X, [*P, *P]), ValueError, "ema_update_: params must be as many as shadow"),
    (
        lambda: ema_update_([X[0].bfloat16()], P),
        ValueError,
        r"ema_update_: shadow\[0\] must be float32 or float64, got torch.bfloat16",
    ),
    (lambda: ema_update_(X, P, decay=1.1), ValueError, r"decay must be in \[0, 1\], got 1.1"),
    (lambda: ema_update_(X, P, step=-1), ValueError, "step must be 0 or more, got -1"),
    (lambda: ema_update_(X, P, step=1.0), TypeError, "step must be an int, got float"),
    (
        lambda: swa_update_(X, P, n_averaged=torch.ones(2)),
        ValueError,
        r"swa_update_: n_averaged must be one number, got shape \[2\]",
    ),
    (
        lambda: swa_update_(X, [torch.ones(3)], n_averaged=1),
        ValueError,
        r"swa_update_: params\[0\] must have the shape",
    ),
    (
        lambda: swa_update_(X, P, n_averaged=torch.ones((), device="meta")),
        ValueError,
        "n_averaged must be on cpu, got meta",
    ),
    (lambda: WeightAverager(3), TypeError, "model must be a torch.nn.Module, got int"),
    (lambda: WeightAverager(Net(), "mean"), ValueError, "kind must be one of swa, ema, got 'mean'"),
    (lambda: WeightAverager(Net(), buffers="no"), ValueError, "buffers must be one of copy, aver"),
    (lambda: WeightAverager(Net(), decay=-1), ValueError, r"decay must be in \[0, 1\], got -1"),
    (lambda: WeightAverager(Net(), every=0), ValueError, "every must be 1 or more, got 0"),
    (lambda: WeightAverager(Net(), start_step="1"), TypeError, "start_step must be an int"),
    (lambda: WeightAverager(Net(), dtype=torch.int8), ValueError, "dtype must be float32, bfloat"),
    (lambda: WeightAverager(Net(), warmup=True), ValueError, "warmup must be False for kind='swa'"),
    (
        lambda: WeightAverager(Net().requires_grad_(False)),
        ValueError,
        "model must have parameters to average, got 5 that require no grad",
    ),
    (
        lambda: WeightAverager(Net().double()),
        ValueError,
        "WeightAverager: first.weight must be float32, bfloat16 or float16, got torch.float64",
    ),
    (lambda: WeightAverager(Net().to("meta")), ValueError, "must hold values, got a meta tensor"),
    (lambda: WeightAverager(Net()).update(0.5), TypeError, "step must be an int, got float"),
    (
        lambda: WeightAverager(Net()).swapped().__enter__(),
        RuntimeError,
        "swapped must come after an update that averages, got none",
    ),
    (
        lambda: WeightAverager(Net(), count_start=True).export("x"),
        TypeError,
        "model must have save_pretrained to be exported, got Net",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSALS)
def test_refusals(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as found:
        call()
    assert re.match(r"(WeightAverager|ema_update_|swa_update_): .* must .*, got ", str(found.value))
