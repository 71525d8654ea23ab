"""Capture: values and gradients of output_hidden_states, projections by hand, refusals."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.captured import BERT, MODELS, TOKENS, Net, assert_same, build, gradients, loss_of, step
from torch import Tensor, nn

from kdkernels import Capture

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_hidden_states(name: str) -> None:
    model, layer = build(name), MODELS[name][1]
    paths = [layer.format(i) for i in range(2)]  # the last entry is often normalised
    hidden = model(TOKENS, output_hidden_states=True)
    (loss_of(hidden.hidden_states[1:3]) + hidden.last_hidden_state.square().mean()).backward()
    expected = gradients(model), list(hidden.hidden_states[1:3])
    assert_same(step(model, paths), expected)


@pytest.mark.parametrize("holder", ["layer", "attention"])
@pytest.mark.parametrize("name", MODELS)
def test_projections_by_hand(name: str, holder: str) -> None:
    model = build(name)
    _, layer, attention, names = MODELS[name]
    path = layer.format(1) + (f".{attention}" if holder == "attention" else "")
    modules = [model.get_submodule(f"{layer.format(1)}.{attention}.{n}") for n in names.split()]
    found: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _, x, y: found.append(y)) for m in modules]
    with Capture(model, [path], ("q", "k", "v")) as seen:
        model(TOKENS)
    for handle in handles:
        handle.remove()
    if name == "GPT2":
        found = list(found[0].split(32, dim=2))
    elif name == "GPTNeoX":  # as its attention does
        found = list(found[0].view(2, 7, 4, 24).transpose(1, 2).chunk(3, dim=-1))
        found = [x.transpose(1, 2).reshape(2, 7, 32) for x in found]
    assert_same(list(seen[path]), found)
    narrow = 16 if MODELS[name][0].get("num_key_value_heads") else 32
    assert [x.shape for x in seen[path]] == [(2, 7, 32), (2, 7, narrow), (2, 7, narrow)]
    for kind, tensor in zip("qkv", found, strict=True):
        with Capture(model, [path], kind) as one:
            model(TOKENS)
        assert_same(one[path], tensor)


def test_fused_queries_and_keys_are_those_of_the_attention_maps() -> None:
    """The softmax of captured q k is the map that the model reports: GPT-2 has no rotation."""
    model = build("GPT2", attn_implementation="eager").eval()
    with Capture(model, ["h.1"], ("q", "k")) as seen:
        maps = model(TOKENS, output_attentions=True).attentions[1]
    q, k = (x.view(2, 7, 4, 8).transpose(1, 2) for x in seen["h.1"])
    scores = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(7, 7).tril().bool(), float("-inf"))
    assert_same(scores.softmax(-1), maps)


def test_gpt_neox_values_are_those_of_the_attention() -> None:
    """Values are not rotated, so attention maps times captured values are what it computes."""
    model = build("GPTNeoX", attn_implementation="eager").eval()
    with Capture(model, ["layers.1"], "v") as seen, Capture(model, ["layers.1.attention"]) as out:
        maps = model(TOKENS, output_attentions=True).attentions[1]
    mixed = maps @ seen["layers.1"].view(2, 7, 4, 8).transpose(1, 2)
    attention = model.layers[1].attention
    assert_same(attention.dense(mixed.transpose(1, 2).reshape(2, 7, 32)), out["layers.1.attention"])


def test_mapping() -> None:
    model = Net()
    capture = Capture(model, ["layers.2", "layers.0"])
    with capture as seen:
        assert seen is capture and len(seen) == 0 and "layers.0" not in seen
        with pytest.raises(KeyError, match="layers.0 must have run in the block, got nothing"):
            seen["layers.0"]
        model(torch.randn(5, 4))
        assert list(seen) == ["layers.2", "layers.0"]  # of the paths, not of running
    assert [x.shape for x in seen.values()] == [(5, 4)] * 2
    assert seen["layers.0"] is seen["layers.0"]
    with pytest.raises(KeyError, match="path must be one of layers.2, layers.0, got 'layers.1'"):
        seen["layers.1"]
    assert seen == capture and seen != Capture(model, ["layers.0"]) and hash(seen) == hash(capture)
    assert repr(seen) == "Capture(['layers.2', 'layers.0'], what='output')"
    seen.clear()
    assert len(seen) == 0


def test_each_entry_starts_a_new_record() -> None:
    model = Net()
    seen = Capture(model, ["layers.0"])
    for rows in (2, 3):
        with seen:
            assert len(seen) == 0
            model(torch.randn(rows, 4))
        assert seen["layers.0"].shape == (rows, 4)
    model(torch.randn(9, 4))
    assert seen["layers.0"].shape == (3, 4)


@pytest.mark.parametrize("compiled", [False, True])
def test_tensors_are_let_go(compiled: bool) -> None:
    model = Net()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    seen = Capture(run, ["layers.0"])
    with seen:
        run(torch.randn(2, 4))
    held = weakref.ref(seen["layers.0"])
    assert held() is not None
    seen.clear()
    assert held() is None


def test_no_graph_without_grad() -> None:
    model = Net()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Capture(model, ["layers.0"]) as seen:
            model(torch.randn(2, 4))
        assert not seen["layers.0"].requires_grad


class Outputs(nn.Module):
    """Returns what it is told, which its caller does not use."""

    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.forward = output  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        return x


@pytest.mark.parametrize(
    "output",
    [
        lambda x: (x, 1),
        lambda x: [x],
        lambda x: {"first": x, "second": 2 * x},
        lambda x: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x),
    ],
)
def test_first_of_several_outputs(output: Callable[[Tensor], Any]) -> None:
    model, x = Outputs(output), torch.randn(3)
    with Capture(model, ["inner"]) as seen:
        model(x)
    assert seen["inner"] is x
    assert model.inner.forward is output  # its own forward is back


@pytest.mark.parametrize("output", [None, 3, (), (None, torch.zeros(2)), {}, "x"])
def test_outputs_that_are_no_tensors(output: Any) -> None:
    model = Outputs(lambda x: output)
    message = f"Capture: output of inner must be a tensor, .*, got {type(output).__name__}"
    with pytest.raises(TypeError, match=message), Capture(model, ["inner"]):
        model(torch.randn(3))


def test_nothing_stays_after_an_exception() -> None:
    model = Net()
    seen = Capture(model, ["layers.0", "head"])
    with pytest.raises(ZeroDivisionError), seen:
        model(torch.randn(2, 4))
        raise ZeroDivisionError
    assert len(seen) == 0 and not any("forward" in vars(m) for m in model.modules())
    with seen:  # and it may be entered again
        model(torch.randn(2, 4))
    assert len(seen) == 2


def test_blocks_in_blocks() -> None:
    model, x = Net(), torch.randn(2, 4)
    with Capture(model, ["layers.0"]) as outer, Capture(model, ["layers.0", "head"]) as inner:
        model(x)
    assert outer["layers.0"] is inner["layers.0"]
    assert "forward" not in vars(model.layers[0])
    first, second = Capture(model, ["head"]), Capture(model, ["head"])
    first.__enter__()
    second.__enter__()
    model(x)
    with pytest.raises(RuntimeError, match="must be left in reverse order of entry, got .* Linear"):
        first.__exit__(None, None, None)


class Twice(nn.Module):
    """Runs one layer twice, as models that share their weights across layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.shared(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_what_runs_twice(compiled: bool) -> None:
    for model, path, forwards in ((Twice(), "shared", 1), (Net(), "head", 2)):
        run = torch.compile(model, backend="eager") if compiled else model
        message = f"Capture: {path} must run once in the block, got a second run"
        with pytest.raises(RuntimeError, match=message), Capture(run, [path]):
            for _ in range(forwards):
                run(torch.randn(2, 4))


def test_what_never_runs() -> None:
    model = Net()
    model.unused = nn.Linear(2, 2)
    seen = Capture(model, ["layers.0", "unused"])
    message = "every path must run in the block, got nothing from unused: was the model called"
    with pytest.raises(RuntimeError, match=message), seen:
        model(torch.randn(2, 4))
    assert len(seen) == 0
    with pytest.raises(RuntimeError, match="got nothing from layers.0, unused:"), seen:
        pass


def test_overwritten_output() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    message = "Capture: 0 must keep its output, got a later operation that overwrote it"
    with pytest.raises(RuntimeError, match=message), Capture(model, ["0"]):
        model(torch.randn(2, 4))


def test_entered_twice() -> None:
    model = Net()
    with Capture(model, ["head"]) as seen:
        with pytest.raises(RuntimeError, match="block must be left before it is entered again"):
            seen.__enter__()
        model(torch.randn(2, 4))
    assert len(seen) == 1 and "forward" not in vars(model.head)


NET = Net()


@pytest.mark.parametrize(
    ("model", "paths", "what", "message"),
    [
        (nn.Linear, ["x"], "output", "model must be a torch.nn.Module, got type"),
        (nn.DataParallel(NET), ["head"], "output", "model must not be DataParallel, use Distr"),
        (NET, "head", "output", "paths must be a list of names, got str"),
        (NET, ["head", 3], "output", "paths must be names, got int"),
        (NET, [], "output", "paths must name at least one submodule, got none"),
        (NET, ["head", "head"], "output", "paths must differ, got 'head' twice"),
        (NET, ["head"], "x", "what must be one of output, q, k, v or a tuple of them, got 'x'"),
        (NET, ["head"], (), r"what must be one of .*, got \(\)"),
        (NET, ["head"], ("q", "q"), r"what must be one of .*, got \('q', 'q'\)"),
        (NET, ["layers.3"], "output", "paths must name submodules of Net, got 'layers.3'; nearest: "
         "layers.*layers.0"),
        (NET, [""], "output", "paths must name submodules of Net, got ''; nearest: none"),
        (nn.Sequential(NET), ["head"], "output", ".* got 'head'; nearest: 0.head"),
        (NET, ["head"], "q", "head must be or hold one attention module for what='q', got Linear "
         "with none of query/key/value, q_proj/k_proj/v_proj, q_lin/k_lin/v_lin, c_attn, query_k"),
    ],
)  # fmt: skip
def test_refusals(model: Any, paths: Any, what: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^Capture: {message}"):
        Capture(model, paths, what)


def test_refusals_of_attention() -> None:
    decoder = build("Bert", is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match=r"BertLayer with 2: attention.self, crossattention.self$"):
        Capture(decoder, BERT, "k")
    with pytest.raises(ValueError, match="encoder must be or hold one .* BertEncoder with 3: "):
        Capture(build("Bert"), ["encoder"], "v")
    falcon = transformers.FalconModel(
        transformers.FalconConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            multi_query=False, new_decoder_architecture=False,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="FalconDecoderLayer with none of"):
        Capture(falcon, ["h.0"], "q")


def test_forward_given_by_others() -> None:
    """As accelerate gives to modules that it moves between devices."""
    model = Net()
    plain = model.head.forward

    def moved(x: Tensor) -> Tensor:
        return plain(x) + 1

    model.head.forward = moved  # type: ignore[method-assign]
    with Capture(model, ["head"]) as seen:
        assert torch.equal(model(torch.ones(2, 4)), seen["head"])
    assert model.head.forward is moved
