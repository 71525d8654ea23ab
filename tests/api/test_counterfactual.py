"""Counterfactual: three runs that share layers, against three runs that do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.captured import (
    BERT,
    MODELS,
    assert_same,
    build,
    gradients,
    in_place,
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
    Net,
    checkpointed,
    checkpointed_compiled,
    compiled_parallel,
    expected_of,
    hooked,
    loss_of,
    outputs_of,
    parallel,
    sharded,
    three_runs,
    unwrapped,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from kdkernels import Counterfactual

pytest.importorskip("transformers")


@pytest.fixture
def gloo() -> Iterator[None]:
    with one_process():
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def sites_of(name: str, suffixes: str) -> list[str]:
    """Layers 0, 1 and 2 by their number; ``1a`` is the attention of layer 1."""
    _, layer, attention, _ = MODELS[name]
    return [layer.format(s[0]) + (f".{attention}" if s[1:] else "") for s in suffixes.split(" ")]


@pytest.mark.parametrize("source_at", ["output", "input"])
@pytest.mark.parametrize("suffixes", ["1", "1a", "0 2", "2a 1", "0 1a 2"])
@pytest.mark.parametrize("name", MODELS)
def test_reuse_changes_nothing(name: str, suffixes: str, source_at: str) -> None:
    """To the bit in evaluation mode, and the gradients but for the order of sums."""
    model, sites = build(name).eval(), sites_of(name, suffixes)
    found = {}
    for reuse in (True, False):
        outputs = three_runs(model, sites, source_at=source_at, reuse=reuse)
        found[reuse] = outputs, gradients(model)
    for actual, expected in zip(found[True][0], found[False][0], strict=True):
        assert torch.equal(actual, expected)
    torch.testing.assert_close(found[True][1], found[False][1], rtol=1e-4, atol=1e-6)
    assert not torch.equal(*found[True][0])
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("reuse", [True, False])
def test_by_hand(reuse: bool) -> None:
    """What the three runs are: base, source without an output, base with the source's states."""
    model = build("Bert").double()
    x = BASE, SOURCE
    sites = [BERT[1], f"{BERT[2]}.attention.self"]
    for at in ("output", "input"):
        # The input of a layer is the output of the layer in front, that of its attention as well.
        taken = sites if at == "output" else [BERT[0], BERT[1]]
        model.zero_grad()
        states = outputs_of(model, taken, SOURCE)
        swaps = {site: (states[of], SPANS) for site, of in zip(sites, taken, strict=True)}
        base, expected = model(BASE), expected_of(model, swaps, BASE)
        (loss_of(base) + 2 * loss_of(expected)).backward()
        grads = gradients(model)
        found = three_runs(model, sites, SPANS, x, source_at=at, reuse=reuse)
        wanted = base.last_hidden_state, expected.last_hidden_state
        torch.testing.assert_close((found, gradients(model)), (wanted, grads))


@pytest.mark.parametrize(
    ("where", "options"),
    [
        (POSITIONS, {"mode": "add"}),
        (OTHER_SPANS, {"dims": (8, 16)}),
        (SPANS, {"basis": torch.eye(32)[:, 3:7]}),
    ],
)
def test_options_of_interchange(where: Any, options: dict[str, Any]) -> None:
    model = build("Llama").eval()
    states = outputs_of(model, ["layers.1"], SOURCE)["layers.1"]
    hand = {k: slice(*v) if k == "dims" else v for k, v in options.items()}
    expected = expected_of(model, {"layers.1": (states, where)}, BASE, **hand).last_hidden_state
    _, swapped = three_runs(model, "layers.1", where, **options)
    torch.testing.assert_close(swapped, expected)


def layers_run(name: str, layers: int, site: str, **options: Any) -> list[int]:
    """How many layers base, source and counterfactual run compute."""
    size = {"GPT2": "n_layer", "DistilBert": "n_layers"}.get(name, "num_hidden_layers")
    model, counts = build(name, **{size: layers}), [0]
    _, layer, attention, _ = MODELS[name]

    def count(_: Any) -> None:
        counts[-1] += 1

    runs = Counterfactual(model, site, **options)
    paths = [f"{layer.format(i)}.{attention}" for i in range(layers)]
    with hooked(model, dict.fromkeys(paths, count)):
        runs.base(BASE)
        counts.append(0)
        runs.source(SOURCE)
        counts.append(0)
        runs.counterfactual(SPANS)
    return counts


@pytest.mark.parametrize(
    ("name", "layers", "site", "options", "expected"),
    [
        ("Bert", 12, "encoder.layer.6", {"source_at": "input"}, [12, 6, 5]),
        ("Bert", 12, "encoder.layer.6", {}, [12, 7, 5]),
        ("Bert", 12, "encoder.layer.6", {"reuse": False}, [12, 12, 12]),
        ("Bert", 12, "encoder.layer.6.attention.self", {}, [12, 7, 6]),
        ("Bert", 12, "encoder.layer.6.attention.self", {"source_at": "input"}, [12, 7, 6]),
        ("DistilBert", 6, "transformer.layer.3", {"source_at": "input"}, [6, 3, 2]),
        ("GPT2", 6, "h.0", {"source_at": "input"}, [6, 0, 5]),
        ("Llama", 6, ["layers.4", "layers.1"], {"source_at": "input"}, [6, 4, 4]),
        ("Llama", 6, ["layers.4", "layers.1.mlp"], {}, [6, 5, 5]),
    ],
)
def test_layers_computed(
    name: str, layers: int, site: Any, options: dict[str, Any], expected: list[int]
) -> None:
    assert layers_run(name, layers, site, **options) == expected


def test_base_as_its_own_source() -> None:
    """A batch whose rows are read by other rows: no source run."""
    model = build("Bert", num_hidden_layers=12).eval()
    counts, site = [0], "encoder.layer.6"

    def count(_: Any) -> None:
        counts[-1] += 1

    runs = Counterfactual(model, site)
    paths = [f"encoder.layer.{i}.attention" for i in range(12)]
    with hooked(model, dict.fromkeys(paths, count)):
        base = runs.base(BASE).last_hidden_state
        counts.append(0)
        flipped = SPANS._replace(source_row=torch.tensor([1, 0]))
        swapped = runs.counterfactual(flipped, source="base").last_hidden_state
        assert counts == [12, 5]
        again = runs.counterfactual(OTHER_SPANS, source="base").last_hidden_state
    states = outputs_of(model, [site], BASE)[site]
    for found, where in ((swapped, flipped), (again, OTHER_SPANS)):
        expected = expected_of(model, {site: (states, where)}, BASE).last_hidden_state
        assert torch.equal(found, expected) and not torch.equal(found, base)
    with pytest.raises(RuntimeError, match="source must run before counterfactual"):
        runs.counterfactual(flipped)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_the_run(name: str) -> None:
    model = build(name).eval()
    (site,), found = sites_of(name, "1"), []
    for reuse in (True, False):
        runs = Counterfactual(model, site, reuse=reuse)
        base = runs.base(BASE, output_hidden_states=True).hidden_states
        runs.source(SOURCE)
        found.append(runs.counterfactual(SPANS).hidden_states)
    assert len(base) == len(found[0]) == 4
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    same = [torch.equal(x, y) for x, y in zip(found[0], base, strict=True)]
    assert same == [True, True, False, False]


def test_dropout_is_shared_in_front_of_the_site() -> None:
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = build("Bert", num_hidden_layers=4, **dropout)
    nothing = SPANS._replace(length=torch.zeros(2, dtype=torch.int64))
    for reuse in (True, False):
        runs = Counterfactual(model, "encoder.layer.1", reuse=reuse)
        base = runs.base(BASE, output_hidden_states=True).hidden_states
        runs.source(SOURCE)
        other = runs.counterfactual(nothing).hidden_states
        same = [torch.equal(x, y) for x, y in zip(base[1:], other[1:], strict=True)]
        assert same == ([True, True, False, False] if reuse else [False] * 4)


def reentrant(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model


def wrapped_in_checkpoints(model: nn.Module) -> nn.Module:
    for i, layer in enumerate(model.encoder.layer):
        model.encoder.layer[i] = checkpoint_wrapper(layer)
    return model


@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing_enable. is deprecated", "ignore:.broadcast_buffers. is"
)
@pytest.mark.parametrize(
    "wrap",
    [
        checkpointed,
        reentrant,
        wrapped_in_checkpoints,
        checkpointed_compiled,
        in_place,
        layers_in_place,
        layers_wrapped,
        parallel,
        compiled_parallel,
        sharded,
    ],
)
def test_wrapped(wrap: Callable[[nn.Module], nn.Module], gloo: None) -> None:
    """Several layers, the last one taken at its output: as the plain model."""
    sites = [BERT[1], BERT[0]]
    plain = build("Bert")
    expected = three_runs(plain, sites, SPANS), gradients(plain)
    model = wrap(build("Bert"))
    for _ in range(2):
        outputs = three_runs(model, sites, SPANS)
        assert_same((outputs, unwrapped(gradients(model))), expected)


def test_compiled() -> None:
    """Graphs of the base run and of the counterfactual run, no more in later steps."""
    model = build("GPT2")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    longer = SPANS._replace(length=torch.tensor([3, 1]))
    for where, x in ((SPANS, (BASE, SOURCE)), (longer, (SOURCE, BASE)), (SPANS, (BASE, BASE))):
        for site, at in (("h.1", "input"), ("h.1.attn", "output")):
            expected = three_runs(model, site, where, x, source_at=at), gradients(model)
            found = three_runs(compiled, site, where, x, source_at=at), gradients(model)
            assert_same(found, expected)
        assert counter.frame_count == 4


def test_layers_compiled_one_by_one_share_their_code() -> None:
    """More layers and sites than torch.compile makes versions of one function (8)."""
    model = build("Bert", num_hidden_layers=10)
    counter = CompileCounterWithBackend("eager")
    for layer in model.encoder.layer:
        layer.compile(backend=counter, fullgraph=True)
    for site in (6, 3, 8, 1):
        for at in ("output", "input"):
            three_runs(model, f"encoder.layer.{site}", SPANS, source_at=at)
    assert counter.frame_count <= 8


class Lists(nn.Module):
    """Two lists of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.one, *self.two):
            x = layer(x).tanh()
        return x


class Shared(nn.Module):
    """One layer, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)] * 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


NET = Net()


@pytest.mark.parametrize(
    ("model", "sites", "options", "message"),
    [
        (nn.Linear, "x", {}, "model must be a torch.nn.Module, got type"),
        (NET, 3, {}, "sites must be a list of names, got int"),
        (NET, ["head", "head"], {}, "sites must differ, got 'head' twice"),
        (NET, "layers.1.fist", {}, "sites must .* got 'layers.1.fist'; nearest: layers.1.first"),
        (NET, "head", {}, "sites must lie in one list of layers with reuse=True, got head outside"),
        (nn.Sequential(nn.Linear(4, 4)), "0", {}, "sites .* reuse=True, got 0 outside of one"),
        (Lists(), ["one.1", "two.0"], {}, "sites .* got two.0 in another one than one.1"),
        (NET, "layers.1", {"source_at": "inside"}, "source_at must be .*, got 'inside'"),
    ],
)
def test_refusals(model: Any, sites: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^Counterfactual: {message}"):
        Counterfactual(model, sites, **options)


def test_sites_anywhere_without_reuse() -> None:
    x = torch.randn(2, 7, 4), torch.randn(2, 7, 4)
    three_runs(Lists(), ["one.1", "two.0"], SPANS, x, reuse=False)
    three_runs(Net(), ["layers.1", "head"], SPANS, x, reuse=False)


def test_order_of_runs() -> None:
    x = torch.randn(2, 7, 4)
    runs = Counterfactual(NET, "layers.1")
    for start in (lambda: None, lambda: runs.source(x), runs.clear):
        start()
        with pytest.raises(RuntimeError, match="^Counterfactual: base must run before counterf"):
            runs.counterfactual(SPANS, source="base")
    runs.base(x)
    message = "^Counterfactual: source must run before counterfactual, got nothing from layers.1$"
    with pytest.raises(RuntimeError, match=message):
        runs.counterfactual(SPANS)
    runs.source(x)
    runs.base(x)  # a new one lets go of the old source
    with pytest.raises(RuntimeError, match=message):
        runs.counterfactual(SPANS)
    with pytest.raises(ValueError, match="^Counterfactual: source must be .*, got 'other'"):
        runs.counterfactual(SPANS, source="other")


@pytest.mark.parametrize("reuse", [True, False])
def test_layers_that_share_their_weights(reuse: bool) -> None:
    message = "^Counterfactual: every layer must run once in a run, got .* twice: no modules that"
    with pytest.raises(RuntimeError, match=message):
        Counterfactual(Shared(), "layers.0", reuse=reuse).base(torch.randn(2, 7, 4))


class Reversed(Net):
    """Runs its layers from the last to the first."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return self.head(x)


class Dropping(Net):
    """Leaves out a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[2](self.layers[1](x)))


@pytest.mark.parametrize("site", ["layers.1", "layers.1.first"])
def test_layers_in_another_order(site: str) -> None:
    """What would be left out is not in front of the site."""
    x = torch.randn(2, 7, 4)
    message = "^Counterfactual: layers must run in the order of their list with reuse=True, got "
    for model in (Reversed(), Dropping()):
        with pytest.raises(RuntimeError, match=message):
            Counterfactual(model, site).base(x)
        three_runs(model, site, SPANS, (x, x), reuse=False)


class Adding(Net):
    """Overwrites what its layers return."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x += 1
        return self.head(x)


@pytest.mark.parametrize("site", ["layers.1", "layers.1.first"])
def test_overwritten_layers(site: str) -> None:
    """The counterfactual run would add twice; without reuse only what a site returns matters."""
    x = torch.randn(2, 7, 4)
    message = "^Counterfactual: layers and sites must keep their output, got a later operation that"
    for reuse in (True, False):
        runs = Counterfactual(Adding(), site, reuse=reuse)
        runs.base(x)
        runs.source(x)
        if site == "layers.1.first" and not reuse:
            runs.counterfactual(SPANS)
            continue
        with pytest.raises(RuntimeError, match=message):
            runs.counterfactual(SPANS)


def test_what_never_runs() -> None:
    model, x = Net(), torch.randn(2, 7, 4)
    model.layers[1].unused = nn.Linear(4, 4)
    runs = Counterfactual(model, ["layers.0", "layers.1.unused"])
    runs.base(x)
    runs.source(x)
    for run in ("source", "base"):
        with pytest.raises(RuntimeError, match="^Counterfactual: .* nothing from layers.1.unused$"):
            runs.counterfactual(SPANS, source=run)


def test_nothing_stays_after_an_exception() -> None:
    model, x = Net(), torch.randn(2, 7, 4)
    runs = Counterfactual(model, ["layers.0", "layers.2.first"])
    for wrong in (runs.base, runs.source):
        with pytest.raises(RuntimeError):
            wrong(x[..., :3])
    runs.base(x)
    runs.source(x)
    with pytest.raises(ValueError, match="^interchange: "):
        runs.counterfactual(SPANS._replace(length=SPANS.length + 9))
    assert not any("forward" in vars(module) for module in model.modules())
