"""Interchange under activation checkpointing, torch.compile, DistributedDataParallel, autocast."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import intervened
from helpers.captured import (
    BERT,
    MODELS,
    assert_same,
    build,
    gradients,
    layers_in_place,
    layers_wrapped,
    one_process,
)
from helpers.intervened import (
    BASE,
    OTHER_SPANS,
    POSITIONS,
    SOURCE,
    SPANS,
    Block,
    Net,
    checkpointed_compiled,
    expected_of,
    loss_of,
    parallel,
    sharded,
    step,
    step_by_hand,
    unwrapped,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointError, checkpoint

from kdkernels import Interchange

pytest.importorskip("transformers")

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
INSIDE = pytest.mark.parametrize("inside", [False, True], ids=["backward after", "backward inside"])


@pytest.fixture
def gloo() -> Iterator[None]:
    with one_process():
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def two_steps(model: nn.Module, *args: Any, **options: Any) -> list[Any]:
    """Outputs and gradients of two steps, by Interchange in this model."""
    return [(step(model, *args, **options), unwrapped(gradients(model))) for _ in range(2)]


def two_by_hand(model: nn.Module, *args: Any) -> list[Any]:
    return [(step_by_hand(model, *args), gradients(model)) for _ in range(2)]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@INSIDE
@REENTRANT
@pytest.mark.parametrize("name", ["Bert", "GPT2", "Llama"])
def test_checkpointed_layers(name: str, reentrant: bool, inside: bool) -> None:
    sites = [MODELS[name][1].format(i) for i in (0, 2)]
    expected = two_by_hand(build(name), sites, SPANS)
    model = build(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(two_steps(model, sites, SPANS, inside=inside), expected)
    inner = f"{sites[0]}.{MODELS[name][2]}"
    message = rf"^Interchange: sites must not lie inside .*, got {inner} inside of a checkpointed "
    block = Interchange(model, [sites[1], inner], torch.zeros(2, 7, 32), SPANS)
    with pytest.raises(ValueError, match=message):
        block.__enter__()
    assert not any("forward" in vars(m) for m in model.modules())
    model.eval()
    with block:  # evaluation checkpoints nothing
        model(BASE)


class GradientCheckpointingLayer(Block):
    """Layers of transformers before 5.23 checkpoint their ``__call__``, not their ``forward``."""

    gradient_checkpointing = True

    def __init__(self, reentrant: bool, by_name: bool) -> None:
        super().__init__()
        self.calls, self.by_name = 0, by_name
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        self.calls += 1
        return scale * super().forward(x), None


class Called(Net):
    """A net of such layers."""

    def __init__(self, reentrant: bool, by_name: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            GradientCheckpointingLayer(reentrant, by_name) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x=x, scale=0.5)[0] if layer.by_name else layer(x, scale=0.5)[0]
        return self.head(x)


@INSIDE
@pytest.mark.parametrize(("reentrant", "by_name"), [(False, False), (False, True), (True, False)])
def test_checkpointed_calls(reentrant: bool, by_name: bool, inside: bool) -> None:
    model = Called(reentrant, by_name)
    # Reentrant checkpoints have a gradient only where one of their arguments has one.
    x = torch.randn(2, 7, 4, requires_grad=True), torch.randn(2, 7, 4, requires_grad=True)
    sites = ["layers.0", "layers.2"]
    for layer in model.layers:
        layer.gradient_checkpointing = False
    expected = two_by_hand(model, sites, SPANS, x)
    for layer in model.layers:
        layer.gradient_checkpointing, layer.calls = True, 0
    functions = [layer._gradient_checkpointing_func for layer in model.layers]
    assert_same(two_steps(model, sites, SPANS, x, inside=inside), expected)
    assert [layer.calls for layer in model.layers] == [8] * 3  # all of it again, two runs, twice
    assert [layer._gradient_checkpointing_func for layer in model.layers] == functions
    block = Interchange(model, "layers.1.first", x[1], SPANS)
    with pytest.raises(ValueError, match="inside of a checkpointed GradientCheckpointingLayer"):
        block.__enter__()
    model.eval()
    with block:
        model(x[0])


@INSIDE
@REENTRANT
def test_checkpoint_wrapper(reentrant: bool, inside: bool) -> None:
    model = Net()
    x = torch.randn(2, 7, 4, requires_grad=True), torch.randn(2, 7, 4, requires_grad=True)
    sites = ["layers.0", "layers.2"]
    expected = two_by_hand(model, sites, SPANS, x)
    implementation = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=implementation)
    assert_same(two_steps(model, sites, SPANS, x, inside=inside), expected)
    for inner in ("layers.1.first", "layers.1._checkpoint_wrapped_module"):
        block = Interchange(model, inner, x[1], SPANS)
        message = f"got {inner} inside of a checkpointed CheckpointWrapper"
        with pytest.raises(ValueError, match=message):
            block.__enter__()


class Own(Net):
    """Layers in a checkpoint that Interchange does not see."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        run = nn.Sequential(*self.layers[:2]).forward
        return self.head(self.layers[2](checkpoint(run, x, use_reentrant=self.reentrant)))


def test_checkpoint_around_a_site() -> None:
    """Right gradients where the block is still there, never wrong ones."""
    model, plain = Own(), Net()
    plain.load_state_dict(model.state_dict())
    sites, (x, *other) = ["layers.0", "layers.1.second"], torch.randn(3, 2, 7, 4)
    source = dict(zip(sites, other, strict=True))
    expected = expected_of(plain, {site: (source[site], SPANS) for site in sites}, x)
    loss_of(expected).backward()
    block = Interchange(model, sites, source, SPANS)
    with block:
        found = model(x)
        loss_of(found).backward()
    assert_same((found, gradients(model)), (expected, gradients(plain)))
    with block:
        found = model(x)
    with pytest.raises(CheckpointError):
        loss_of(found).backward()
    with pytest.raises(CheckpointError):  # the source run would be computed again with the swap
        step(model, sites, SPANS, (x, other[0]), inside=True)
    model.reentrant = True
    message = "^Interchange: layers.0 must be outside of reentrant activation checkpoints, which"
    with pytest.raises(RuntimeError, match=message), block:
        model(x.requires_grad_())


def test_compiled() -> None:
    """Two graphs more, of Capture and of Interchange, and no more in later steps."""
    sites, model = ["h.0", "h.2.attn"], build("GPT2")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    plain = compiled(BASE).last_hidden_state
    for where, x, inside in (
        (SPANS, (BASE, SOURCE), False),
        (SPANS._replace(length=OTHER_SPANS.length[[1, 1]]), (SOURCE, BASE), True),
        (SPANS, (SOURCE, SOURCE), False),
    ):
        expected = step_by_hand(model, sites, where, x), gradients(model)
        assert_same((step(compiled, sites, where, x, inside=inside), gradients(model)), expected)
        assert_same(compiled(BASE).last_hidden_state, plain)
        assert counter.frame_count == 3


@pytest.mark.parametrize(
    ("where", "options"),
    [
        (POSITIONS, {"mode": "add"}),
        (SPANS, {"basis": torch.eye(4)[:, :2]}),
        (SPANS, {"dims": slice(1, 3)}),
    ],
)
def test_compiled_kinds(where: Any, options: dict[str, Any]) -> None:
    model, x = Net(), (torch.randn(2, 7, 4), torch.randn(2, 7, 4))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = step_by_hand(model, ["layers.1"], where, x, **options), gradients(model)
    found = step(compiled, ["layers.1"], where, x, **options), gradients(model)
    assert_same(found, expected)


@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing_enable. is deprecated", "ignore:.broadcast_buffers. is"
)
@pytest.mark.parametrize(
    "wrap", [layers_in_place, layers_wrapped, checkpointed_compiled, parallel, sharded]
)
def test_wrapped(wrap: Callable[[nn.Module], nn.Module], gloo: None) -> None:
    sites = [BERT[0], BERT[2]]
    expected = two_by_hand(build("Bert"), sites, SPANS)
    assert_same(two_steps(wrap(build("Bert")), sites, SPANS), expected)


def test_sites_of_wrapped_models(gloo: None) -> None:
    model, x = DistributedDataParallel(Net()), torch.randn(2, 7, 4)
    for site in ("layers.0", "module.layers.0"):  # as written
        with Interchange(model, [site], {site: x}, SPANS):
            model(x)
    with pytest.raises(ValueError, match="DistributedDataParallel, got 'heat'; nearest: head"):
        Interchange(model, "heat", x, SPANS)


@pytest.mark.parametrize("basis", [None, torch.eye(32)[:, 3:7]])
def test_autocast(basis: Tensor | None) -> None:
    model, sites = build("GPT2"), ["h.0.attn", "h.1.mlp"]  # whose outputs are bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        expected = step_by_hand(model, sites, SPANS, basis=basis), gradients(model)
        found = step(model, sites, SPANS, basis=basis), gradients(model)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-4)
    if basis is None:
        assert torch.equal(found[0], expected[0])


@pytest.mark.distributed
def test_two_processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = str(Path(intervened.__file__))
    done = subprocess.run(
        [*command, script], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
