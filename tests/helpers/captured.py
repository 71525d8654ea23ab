"""Tiny models to capture from, and one process of two that do; run as a script by its test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdkernels import Capture

TOKENS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(3))
BERT = [f"encoder.layer.{i}" for i in range(3)]
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
# name: options of the configuration, path of a layer, of its attention, of a projection in it.
MODELS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "Bert": (SIZES, "encoder.layer.{}", "attention.self", "query key value"),
    "Roberta": (SIZES, "encoder.layer.{}", "attention.self", "query key value"),
    "DistilBert": (DISTILBERT, "transformer.layer.{}", "attention", "q_lin k_lin v_lin"),
    "GPT2": ({**GPT2, "attn_pdrop": 0.0}, "h.{}", "attn", "c_attn"),
    "Llama": (
        {**SIZES, "num_key_value_heads": 2}, "layers.{}", "self_attn", "q_proj k_proj v_proj",
    ),
    "Qwen3": (
        {**SIZES, "num_key_value_heads": 2, "head_dim": 8}, "layers.{}", "self_attn",
        "q_proj k_proj v_proj",
    ),
    "GPTNeoX": (SIZES, "layers.{}", "attention", "query_key_value"),
}  # fmt: skip


def build(name: str, **options: Any) -> nn.Module:
    """A model of transformers, the same for the same arguments."""
    import transformers  # not for the processes of the script

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")
    extra = {"bos_token_id": 1, "eos_token_id": 2} if name == "GPT2" else {"pad_token_id": 0}
    values = {**MODELS[name][0], "vocab_size": 50, **extra, **options}
    # DistributedDataParallel waits for gradients of a pooler that nothing uses.
    pooler = {"add_pooling_layer": False} if name in ("Bert", "Roberta") else {}
    return getattr(transformers, f"{name}Model")(config(**values), **pooler).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter, zero where it has none: compiled backward passes make zeros."""
    found = {}
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        found[name.replace("_orig_mod.", "").removeprefix("module.")] = grad.clone()
    return found


def loss_of(tensors: Any) -> Tensor:
    return sum((i + 1) * x.square().mean() for i, x in enumerate(tensors))


def step(
    model: nn.Module, paths: list[str], what: str = "output", *, inside: bool = False
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gradients and values of one step on captured tensors; the backward pass in the block or not.

    The model's own output takes part, as DistributedDataParallel and FSDP require.
    """
    model.zero_grad()
    with Capture(model, paths, what) as seen:
        output = model(TOKENS).last_hidden_state
        if inside:
            (loss_of(seen.values()) + output.square().mean()).backward()
    if not inside:
        (loss_of(seen.values()) + output.square().mean()).backward()
    assert not any("forward" in vars(m) for m in model.modules() if not hasattr(m, "_orig_mod"))
    return gradients(model), [tensor.detach() for tensor in seen.values()]


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


class Net(nn.Module):
    """Three layers with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """A loss of the logits and of captured tensors."""
    with Capture(model, ["layers.0", "layers.1"]) as seen:
        logits = model(x)
    return logits.square().mean() + sum(tensor.square().mean() for tensor in seen.values())


GROUPS: list[Any] = []


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    # Freeing a group joins its threads under the interpreter's lock, which a thread that has just
    # reduced may wait for to let go of its work: a deadlock. So it lives on.
    GROUPS.append(torch.distributed.group.WORLD)
    yield
    torch.distributed.destroy_process_group()


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager", fullgraph=True)
    return model


def layers_in_place(model: nn.Module) -> nn.Module:
    for layer in model.encoder.layer:
        layer.compile(backend="aot_eager", fullgraph=True)
    return model


def layers_wrapped(model: nn.Module) -> nn.Module:
    for i, layer in enumerate(model.encoder.layer):
        model.encoder.layer[i] = torch.compile(layer, backend="aot_eager", fullgraph=True)
    return model


def main() -> None:
    """Each process its half of a batch: the gradients must be those of the whole batch."""
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(1)
    model, x = Net(), torch.randn(6, 4)
    loss(model, x).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        loss(parallel, x.chunk(2)[torch.distributed.get_rank()]).backward()
        for p, expected in zip(model.parameters(), whole, strict=True):
            torch.testing.assert_close(p.grad, expected)
    torch.distributed.barrier()
    # No teardown: on a busy machine gloo's may wait for ever for a thread that waits for Python.
    os._exit(0)


if __name__ == "__main__":
    main()
