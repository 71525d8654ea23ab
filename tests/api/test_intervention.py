"""Interchange: swaps by hand in every architecture, identities, gradients, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers.captured import MODELS, build, gradients
from helpers.intervened import (
    BASE,
    OTHER_SPANS,
    POSITIONS,
    SOURCE,
    SPANS,
    Net,
    by_hand,
    expected_of,
    loss_of,
    outputs_of,
    pairs,
)
from torch import Tensor, nn

from kdkernels import Capture, Interchange, Positions, Spans

transformers = pytest.importorskip("transformers")

ZERO = torch.zeros(2, dtype=torch.int64)
WHOLE = Spans(ZERO, ZERO, ZERO + 7)


def sites_of(name: str, *suffixes: str) -> list[str]:
    """Layers 0, 1 and 2 by their number; ``1a`` is the attention of layer 1."""
    _, layer, attention, _ = MODELS[name]
    return [layer.format(s[0]) + (f".{attention}" if s[1:] else "") for s in suffixes]


BASIS = torch.linalg.qr(torch.randn(32, 5, generator=torch.Generator().manual_seed(5)).double())[0]
CASES: dict[str, tuple[list[str], Any, dict[str, Any]]] = {
    "a layer": (["1"], SPANS, {}),
    "inside of a layer": (["1a"], SPANS, {}),
    "several": (["0", "1a", "2"], [SPANS, OTHER_SPANS, POSITIONS], {}),
    "add": (["1"], SPANS, {"mode": "add"}),
    "subtract": (["1"], POSITIONS, {"mode": "subtract"}),
    "heads": (["1a"], OTHER_SPANS, {"dims": slice(8, 24)}),
    "positions": (["1"], POSITIONS, {}),
    "basis": (["1"], SPANS, {"basis": BASIS}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_swap_by_hand(name: str, case: str) -> None:
    """Values and the gradients of all parameters, through base and source."""
    suffixes, where, options = CASES[case]
    sites, model = sites_of(name, *suffixes), build(name).double()
    each = where if isinstance(where, list) else [where] * len(sites)
    source = outputs_of(model, sites, SOURCE)
    expected = expected_of(
        model, {p: (source[p], w) for p, w in zip(sites, each, strict=True)}, BASE, **options
    )
    loss_of(expected).backward()
    grads = gradients(model)
    model.zero_grad()
    with Capture(model, sites) as seen:
        model(SOURCE)
    for_all = where if each[0] is where else dict(zip(sites, each, strict=True))
    with Interchange(model, sites if len(sites) > 1 else sites[0], seen, for_all, **options):
        actual = model(BASE)
    loss_of(actual).backward()
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, **close)
    torch.testing.assert_close(gradients(model), grads, **close)
    assert not torch.equal(actual.last_hidden_state, model(BASE).last_hidden_state)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_identities(name: str) -> None:
    """To the bit: a run in itself changes nothing, all of a run is that run."""
    model = build(name).eval()
    base, other = model(BASE).last_hidden_state, model(SOURCE).last_hidden_state
    for site in sites_of(name, "1", "1a"):
        with Capture(model, [site]) as own:
            model(BASE)
        for same in (WHOLE, Spans(ZERO + 2, ZERO + 2, ZERO + 3), Spans(ZERO, ZERO, ZERO)):
            with Interchange(model, site, own[site], same):
                assert torch.equal(model(BASE).last_hidden_state, base)
    (site,) = sites_of(name, "1")
    with Capture(model, [site]) as seen:
        model(SOURCE)
    with Interchange(model, site, seen, WHOLE):
        assert torch.equal(model(BASE).last_hidden_state, other)


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_tokens(name: str) -> None:
    """To the bit: states of the words, before positions are added, stand for the words."""
    model = build(name).eval()
    words = model.get_input_embeddings()
    site = next(path for path, module in model.named_modules() if module is words)
    tokens = BASE.clone()
    for row, position, source_row, source_position in pairs(SPANS):
        tokens[row, position] = SOURCE[source_row, source_position]
    with Interchange(model, site, words(SOURCE), SPANS):
        swapped = model(BASE).last_hidden_state
    assert torch.equal(swapped, model(tokens).last_hidden_state)


def test_one_source_for_all_sites() -> None:
    model = build("Llama").double()
    sites, source = sites_of("Llama", "0", "2"), torch.randn(4, 9, 32, dtype=torch.float64)
    source.requires_grad_()
    where = Spans(ZERO, ZERO + 3, ZERO + 6, ZERO + 3)
    with Interchange(model, sites, source, where):
        actual = model(BASE)
    expected = expected_of(model, {site: (source, where) for site in sites}, BASE)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state)
    found, wanted = (torch.autograd.grad(loss_of(o), source)[0] for o in (actual, expected))
    torch.testing.assert_close(found, wanted)
    assert found[3, 3:].abs().min() > 0 and not found[:3].any() and not found[3, :3].any()


class Kept(nn.Sequential):
    """Activations that keep their result for the backward pass."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


@pytest.mark.parametrize("detached", [False, True])
def test_gradients_behind_activations(detached: bool) -> None:
    model = Kept().double()
    base, source = (torch.randn(2, 7, 4, dtype=torch.float64) for _ in range(2))
    ends = base.requires_grad_(), source.requires_grad_()

    def grads(output: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss_of(output), ends, allow_unused=True)

    given = source.detach() if detached else source
    expected = grads(expected_of(model, {"1": (given, SPANS), "3": (given, POSITIONS)}, base))
    with Interchange(model, ["1", "3"], given, {"1": SPANS, "3": POSITIONS}):
        output = model(base)
    actual = grads(output)
    assert (actual[1] is None) == (expected[1] is None) == detached
    torch.testing.assert_close(actual, expected)


def test_captures_around_and_inside() -> None:
    """What is entered before sees the base's own states, what is entered after the swapped ones."""
    model, x, source = Net(), torch.randn(2, 7, 4), torch.randn(2, 7, 4)
    plain = outputs_of(model, ["layers.1"], x)["layers.1"]
    block = Interchange(model, "layers.1", source, SPANS)
    with Capture(model, ["layers.1"]) as before, block, Capture(model, ["layers.1"]) as after:
        model(x)
    assert torch.equal(before["layers.1"], plain)
    assert torch.equal(after["layers.1"], by_hand(plain, source, SPANS))


class Outputs(nn.Module):
    """A layer that returns what it is told of its result, in one more module."""

    def __init__(self, output: Callable[[Tensor], Any], first: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner, self.first = nn.Identity(), first
        self.inner.forward = output  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> tuple[Any, Tensor]:
        output = self.inner(x)
        return output, self.first(output)


class Pair(NamedTuple):
    one: Tensor
    two: int


@pytest.mark.parametrize(
    ("output", "first"),
    [
        (lambda x: (x, 1), lambda output: output[0]),
        (lambda x: [x, 1], lambda output: output[0]),
        (lambda x: Pair(x, 1), lambda output: output.one),
        (lambda x: {"first": x, "second": 1}, lambda output: output["first"]),
        (
            lambda x: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x),
            lambda output: output.last_hidden_state,
        ),
    ],
)
def test_first_of_several_outputs(
    output: Callable[[Tensor], Any], first: Callable[[Any], Tensor]
) -> None:
    model, x, source = Outputs(output, first), torch.randn(2, 7, 4), torch.randn(2, 7, 4)
    with Interchange(model, "inner", source, SPANS):
        found, state = model(x)
    assert torch.equal(state, by_hand(x, source, SPANS))
    assert type(found) is type(output(x)) and len(found) == len(output(x))
    assert model.inner.forward is output


def test_nothing_stays_after_an_exception() -> None:
    model, x = Net(), torch.randn(2, 7, 4)
    block = Interchange(model, ["layers.0", "head"], {"layers.0": x, "head": x[..., :2]}, SPANS)
    with pytest.raises(ZeroDivisionError), block:
        raise ZeroDivisionError  # not that nothing has run
    assert not any("forward" in vars(m) for m in model.modules())
    for _ in range(2):
        with block:  # and it may be entered again
            swapped = model(x)
        assert not torch.equal(swapped, model(x))
    with block, pytest.raises(RuntimeError, match="block must be left before it is entered again"):
        model(x)
        block.__enter__()


class Twice(nn.Module):
    """Runs one layer twice, as models that share their weights across layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.shared(x))


def test_what_runs_twice() -> None:
    x = torch.randn(2, 7, 4)
    for model, site, forwards in ((Twice(), "shared", 1), (Net(), "layers.2.first", 2)):
        message = f"^Interchange: {site} must run once in the block, got a second run"
        with pytest.raises(RuntimeError, match=message), Interchange(model, site, x, SPANS):
            for _ in range(forwards):
                model(x)


def test_what_never_runs() -> None:
    model, x = Net(), torch.randn(2, 7, 4)
    model.unused = nn.Linear(2, 2)
    block = Interchange(model, ["layers.0", "unused"], x, SPANS)
    message = "^Interchange: every site must run in the block, got nothing from unused: was the mod"
    with pytest.raises(RuntimeError, match=message), block:
        model(x)
    assert not any("forward" in vars(m) for m in model.modules())


def test_what_does_not_fit() -> None:
    """Refused in the run, by the function that swaps."""
    model, x = Net(), torch.randn(2, 7, 4)
    for source, where, message in (
        (x[..., :3], SPANS, "source must have the 4 columns of the base, got 3"),
        (x.double(), SPANS, "source must have the dtype of the base .*, got torch.float64"),
        (x, SPANS._replace(length=ZERO + 9), "interchange: .* in row 0"),
        (x, SPANS._replace(length=ZERO[:1]), "length must be a tensor .2."),
    ):
        block = Interchange(model, "layers.0", source, where)
        with pytest.raises((TypeError, ValueError), match=message), block:
            model(x)
    model.layers[0].forward = lambda x: None  # type: ignore[method-assign]
    message = "^Interchange: output of layers.0 must be a tensor, .*, got NoneType"
    with pytest.raises(TypeError, match=message), Interchange(model, "layers.0", x, SPANS):
        model(x)


NET, X = Net(), torch.zeros(2, 7, 4)
GOOD: dict[str, Any] = {"model": NET, "sites": "head", "source": X, "where": SPANS}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": nn.Linear}, "model must be a torch.nn.Module, got type"),
        ({"model": nn.DataParallel(NET)}, "model must not be DataParallel"),
        ({"sites": 3}, "sites must be a list of names, got int"),
        ({"sites": ["head", 3]}, "sites must be names, got int"),
        ({"sites": []}, "sites must name at least one submodule, got none"),
        ({"sites": ["head", "head"]}, "sites must differ, got 'head' twice"),
        ({"sites": "layers.1.fist"}, "sites must name submodules of Net, got 'layers.1.fist'; "
         "nearest: layers.1.first"),
        ({"sites": ["head", "second"]}, "sites must .* nearest: layers.0.second, layers.1.second"),
        ({"source": {"layers.0": X}}, "source must have the site head, got layers.0"),
        ({"source": {}}, "source must have the site head, got nothing"),
        ({"source": [X]}, "source must be a tensor or a mapping of them, got list"),
        ({"source": {"head": None}}, "source must be a tensor or .*, got NoneType"),
        ({"where": (X, X, X)}, "where must be Spans or Positions, got tuple"),
        ({"where": {"layers.0": SPANS}}, "where must have the site head, got layers.0"),
        ({"dims": {"layers.0": (0, 1)}}, "dims must have the site head, got layers.0"),
        ({"mode": "mix"}, "mode must be .*, got 'mix'"),
        ({"basis": X, "where": POSITIONS}, "where must be Spans with a basis, got Positions"),
        ({"basis": X, "mode": "add"}, "basis must come without dims and mode, got .*mode='add'"),
        ({"basis": X, "dims": (0, 1)}, r"basis must come without dims and mode, got dims=\(0, 1"),
    ],
)  # fmt: skip
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^Interchange: {message}"):
        Interchange(**{**GOOD, **given})


def test_where_on_a_device() -> None:
    spans, pairs_there = OTHER_SPANS.to("meta"), POSITIONS.to("meta")
    assert isinstance(spans, Spans) and spans.source_row is None
    assert isinstance(pairs_there, Positions)
    assert all(x.is_meta for x in (*spans[:3], *SPANS.to("meta"), *pairs_there))
