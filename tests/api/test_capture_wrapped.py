"""Capture under activation checkpointing, torch.compile, DistributedDataParallel and FSDP."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import captured
from helpers.captured import (
    BERT,
    MODELS,
    TOKENS,
    Net,
    assert_same,
    build,
    gradients,
    in_place,
    layers_in_place,
    layers_wrapped,
    one_process,
    step,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kdkernels import Capture

pytest.importorskip("transformers")


@pytest.fixture
def gloo() -> Iterator[None]:
    with one_process():
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("inside", [False, True], ids=["backward after", "backward inside"])
@pytest.mark.parametrize(("name", "what"), [("Bert", "output"), ("Bert", "q"), ("GPT2", "q")])
def test_activation_checkpointing(name: str, what: str, inside: bool) -> None:
    paths = [MODELS[name][1].format(i) for i in range(3)]
    expected = step(build(name), paths, what)
    model = build(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step(model, paths, what, inside=inside), expected)
    if name == "Bert":
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            assert_same(step(compiled, paths, what, inside=inside), expected)


class Checkpointed(Net):
    """Every layer run again in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            # Without the tanh, which keeps its result, recomputation stops before the layer ends.
            x = checkpoint(lambda x, run=layer: run(x).tanh(), x, use_reentrant=self.reentrant)
        return self.head(x)


def test_recomputation_is_not_recorded() -> None:
    torch.manual_seed(1)
    plain = Net()
    model = Checkpointed()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4)
    captured.loss(plain, x).backward()
    with Capture(model, ["layers.0", "layers.1"]) as seen:
        logits = model(x)
        before = list(seen.values())
        (logits.square().mean() + sum(v.square().mean() for v in before)).backward()
        assert all(a is b for a, b in zip(seen.values(), before, strict=True))
    assert_same(gradients(model), gradients(plain))


def test_reentrant_checkpoints_are_refused() -> None:
    model = Checkpointed()
    model.reentrant = True
    x = torch.randn(2, 4, requires_grad=True)
    message = "layers.0 must be outside of reentrant activation checkpoints, .*use_reentrant=False"
    with pytest.raises(RuntimeError, match=message), Capture(model, ["layers.0"]):
        model(x)
    with Capture(model, ["head"]) as seen:  # outside
        model(x)
    assert seen["head"].requires_grad


@pytest.mark.parametrize("captured_first", [False, True])
@pytest.mark.parametrize(("name", "what"), [("Bert", "output"), ("GPT2", "k")])
def test_compiled(name: str, what: str, captured_first: bool) -> None:
    """Two graphs, with and without, whichever is first, and no more in later steps."""
    paths = [MODELS[name][1].format(i) for i in range(3)]
    model = build(name)
    expected = step(model, paths, what)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    if not captured_first:
        compiled(TOKENS)
    for inside in (False, True, False):
        assert_same(step(compiled, paths, what, inside=inside), expected)
        compiled(TOKENS)
    assert counter.frame_count == 2


def test_inductor() -> None:
    model, x = Net(), torch.randn(2, 4)
    captured.loss(model, x).backward()
    expected = gradients(model)
    compiled = torch.compile(model, fullgraph=True)
    compiled(x)
    for _ in range(2):
        model.zero_grad()
        captured.loss(compiled, x).backward()
        assert_same(gradients(model), expected)


def parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def parallel_of_compiled(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(torch.compile(model, backend="aot_eager"))


def compiled_parallel(model: nn.Module) -> nn.Module:
    return torch.compile(DistributedDataParallel(model), backend="aot_eager")


@pytest.mark.parametrize(
    ("what", "wrap"),
    [
        ("output", in_place),
        ("q", layers_in_place),
        ("output", layers_wrapped),
        ("q", layers_wrapped),
        ("output", parallel),
        ("q", parallel),
        ("output", parallel_of_compiled),
        ("q", compiled_parallel),
    ],
)
def test_wrapped(what: str, wrap: Callable[[nn.Module], nn.Module], gloo: None) -> None:
    expected = step(build("Bert"), BERT, what)
    model = wrap(build("Bert"))
    model(TOKENS)
    for _ in range(2):
        assert_same(step(model, BERT, what), expected)


@pytest.mark.parametrize("what", ["output", "q"])
def test_fully_sharded(what: str, gloo: None) -> None:
    expected = step(build("Bert"), BERT, what)
    model, mesh = build("Bert"), init_device_mesh("cpu", (1,))
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found, values = step(model, BERT, what)
    assert_same(({name: grad.full_tensor() for name, grad in found.items()}, values), expected)


def test_layers_compiled_one_by_one_share_their_code() -> None:
    """More layers than torch.compile makes versions of one function (8)."""
    model = build("Bert", num_hidden_layers=10)
    paths = [f"encoder.layer.{i}" for i in range(10)]
    counter = CompileCounterWithBackend("eager")
    for layer in model.encoder.layer:
        layer.compile(backend=counter, fullgraph=True)
    for what in ("q", "output"):
        for _ in range(2):
            with Capture(model, paths, what) as seen:
                model(TOKENS)
            model(TOKENS)
        assert len(seen) == 10
    assert counter.frame_count <= 4


def test_compiled_code_without_guards_is_an_error() -> None:
    model = torch.compile(Net(), backend="eager")
    model(torch.randn(2, 4))
    message = "compiled by torch.compile without guards"
    stance = torch.compiler.set_stance(skip_guard_eval_unsafe=True)
    with stance, pytest.raises(RuntimeError, match=message), Capture(model, ["head"]):
        model(torch.randn(2, 4))


@pytest.mark.parametrize("paths", [["layers.0", "head"], ["module.layers.0", "module.head"]])
def test_paths_of_wrapped_models(paths: list[str], gloo: None) -> None:
    model = DistributedDataParallel(Net())
    with Capture(model, paths) as seen:
        model(torch.randn(2, 4))
    assert list(seen) == paths  # as written
    with pytest.raises(ValueError, match="DistributedDataParallel, got 'heat'; nearest: head"):
        Capture(model, ["heat"])


@pytest.mark.distributed
def test_two_processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = str(Path(captured.__file__))
    done = subprocess.run([*command, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
