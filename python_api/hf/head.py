"""The linear layer that a language model ends in, and what the model does to its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.api import _sites
from kdkernels.api._averaged import is_sharded, unwrapped

__all__ = ["Head"]

NAME = "DistillMixin"
# What configurations call a factor of the logits.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
# Models whose logits_scaling multiplies; that of MiniCPM3 divides what the head gets, all others'
# the logits.
MULTIPLIED, BEFORE_THE_HEAD = ("hyperclovax",), ("minicpm3",)
# What the head answers when it is asked what the model makes of its output. Far from zero, where a
# cap shows.
RAMP = (-90.0, 90.0, 61)


class Head(NamedTuple):
    """``logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``."""

    weight: Tensor  # [vocab, width]
    bias: Tensor | None  # [vocab]
    scale: float = 1.0
    softcap: float | None = None


def core(model: nn.Module) -> Any:
    """The model of transformers inside of wrappers and of PEFT."""
    model = unwrapped(model)
    get: Any = getattr(model, "get_base_model", None)  # of PeftModel
    return get() if callable(get) else model


def logit_options(model: nn.Module) -> tuple[float, float | None]:
    """Scale and cap of the logits, from the model's configuration."""
    config: Any = getattr(core(model), "config", None)
    if config is None:
        return 1.0, None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(config, "final_logit_softcapping", None)
    factors = (getattr(config, name, None) for name in FACTORS)
    scale = next((factor for factor in factors if factor is not None), None)
    scaling = getattr(config, "logits_scaling", None)
    kind = getattr(config, "model_type", None)
    if scale is None and scaling is not None and kind not in BEFORE_THE_HEAD:
        scale = scaling if kind in MULTIPLIED else 1.0 / scaling
    return (1.0 if scale is None else float(scale)), (None if not softcap else float(softcap))


def find_head(model: nn.Module, who: str) -> nn.Module:
    """The output embeddings of a model, if losses can be computed from hidden states and them.

    Args:
        model: a language model, wrapped or not.
        who: ``student`` or ``teacher``, for error messages.

    Raises:
        ValueError: no head, or one whose weight is not all there is to it.
    """
    inner = core(model)
    get = getattr(inner, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{NAME}: {who} must have output embeddings for route='hidden', got "
            f"{type(inner).__name__} without; use route='logits'"
        )
    if type(head).__module__.partition(".")[0] == "peft":
        raise ValueError(
            f"{NAME}: {who} must have a head that PEFT does not wrap, got {type(head).__name__}: "
            "the loss reads the head's weight, so what PEFT adds to it would never be trained. "
            "Leave the head (lm_head) out of target_modules, modules_to_save and "
            "trainable_token_indices, or use route='logits'"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = getattr(weight, "dtype", type(weight).__name__)
        raise ValueError(
            f"{NAME}: {who} must have a head with a weight of floats, got {type(head).__name__} "
            f"with {got}; leave the head out of quantisation (llm_int8_skip_modules of "
            "bitsandbytes), or use route='logits'"
        )
    return head


@contextmanager
def answering(head: nn.Module, answer: Callable[..., Any], who: str) -> Iterator[None]:
    """Has a head answer by ``answer(own forward, hidden)`` in the block, where it must run.

    The model is called as ever, through all of its wrappers.

    Raises:
        RuntimeError: on leaving the block, if the head did not run in it, or twice.
    """
    runs: list[None] = []

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: Tensor) -> Any:
            runs.append(None)
            return answer(original, hidden)

        return forward

    with _sites.replaced(NAME, head, make):
        yield
    if len(runs) != 1:
        raise RuntimeError(
            f"{NAME}: the {who}'s head must run once in a forward pass, got {len(runs)} runs: the "
            "model computes its logits in another way than by its output embeddings (a patched "
            "forward?); use route='logits'"
        )


def one_column(value: Tensor, hidden: Tensor) -> Tensor:
    """Tiny logits ``[..., 1]`` of value 0 that hang on a loss.

    What waits for gradients by the model's output, such as DistributedDataParallel or FSDP, so
    finds in it all that the loss depends on.
    """
    zero = (value.sum() * 0).to(hidden.dtype)
    return zero.expand(*hidden.shape[:-1], 1)


@torch.no_grad()
def check_logits(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any], who: str) -> None:
    """Raises unless the model makes of its head's output what its configuration says.

    A forward pass in which the head answers with known numbers: in evaluation mode, but for models
    in training whose layers are quantised. On CPUs those of bitsandbytes turn into layers without a
    gradient in an evaluation without one, and stay so, in silence (0.50).

    Raises:
        ValueError: it makes something else of it.
    """
    scale, softcap = logit_options(model)
    ramp = torch.linspace(*RAMP)
    inner, training = unwrapped(model), model.training
    keeps_mode = bool(getattr(core(model), "is_quantized", False))
    refused = ValueError(
        f"{NAME}: {who} must scale by {scale} and cap by {softcap} what its head gives, as its "
        f"configuration says, got {type(core(model)).__name__}, which makes something else of it; "
        "use route='logits'"
    )
    inner.train(training and keeps_mode)
    on_gpus = {p.device for p in inner.parameters() if p.is_cuda}
    try:
        with (
            torch.random.fork_rng(on_gpus, enabled=training and keeps_mode),
            answering(head, partial(_ramp, ramp), who),
        ):
            outputs = inner(**inputs)
    except RuntimeError as error:
        if "size of tensor" in str(error):  # a bias of its own, of the vocabulary's size
            raise refused from error
        raise
    finally:
        inner.train(training)
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    expected = ramp.to(logits.device, logits.dtype).float() * scale
    if softcap is not None:
        expected = softcap * (expected / softcap).tanh()
    got = logits.reshape(-1, logits.shape[-1])[0].float()
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=0.02, atol=0.02):
        raise refused


def _ramp(ramp: Tensor, original: Callable[..., Any], hidden: Tensor) -> Tensor:
    return ramp.to(hidden.device, hidden.dtype).expand(*hidden.shape[:-1], -1)


@contextmanager
def whole(tensors: list[Tensor | None]) -> Iterator[list[Tensor | None]]:
    """Frozen tensors as they are unsharded: of FSDP2's gathered, of ZeRO-3's in the block."""
    zero = [x for x in tensors if x is not None and hasattr(x, "ds_id")]
    if zero:
        import deepspeed

        with deepspeed.zero.GatheredParameters(zero):
            # They are let go of at the end of the block.
            yield [None if x is None else x.detach().clone() for x in tensors]
        return
    yield [
        x.full_tensor() if x is not None and is_sharded(x) else x  # type: ignore[attr-defined]
        for x in tensors
    ]
