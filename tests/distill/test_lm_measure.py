"""Memory and speed of the two routes, and that they are the same loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdkernels.api.distill import lm_measure
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.train import Runtime

RUNTIME = Runtime(torch.device("cpu"), bf16=False)
# Large enough that the eager route's tensors, 3 MB each, are more than what a process has spare.
SHAPE = lm_measure.Shape(
    rows=512, vocab=1600, width=16, top_k=8, temperature=2.0, alpha=0.5, train_head=True
)


def test_hidden_states_take_less_memory() -> None:
    found = {(row["loss"], row["route"]): row for row in lm_measure.routes(SHAPE, RUNTIME)}
    assert len(found) == 4
    for row in found.values():
        assert row["rows"] == 512 and row["tokens_per_second"] > 0
    # The logits of one model are 3.3 MB; eager code keeps several of them.
    for loss, least in ((lm_measure.LIVE, 9.0), (lm_measure.CACHED, 6.0)):
        ours, eager = (found[loss, r]["peak_mb"] for r in (lm_measure.HIDDEN, lm_measure.EAGER))
        assert eager > max(least, 1.5 * ours)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("kind", [lm_measure.LIVE, lm_measure.CACHED])
def test_both_routes_have_the_same_gradient(alpha: float, kind: str) -> None:
    shape = lm_measure.Shape(20, 300, 16, 8, 2.0, alpha, True)
    gradients = []
    for route in (lm_measure.HIDDEN, lm_measure.EAGER):
        loss = lm_measure.make_losses(shape, RUNTIME)[kind, route]()
        leaves = _leaves(loss)
        assert len(leaves) == 2
        gradients.append(torch.autograd.grad(loss, leaves))
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-7)


def _leaves(loss: Tensor) -> list[Tensor]:
    """What the loss has a gradient for, hidden states before the head."""
    found: dict[int, Tensor] = {}

    def walk(node: object) -> None:
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        for after, _ in getattr(node, "next_functions", ()):
            walk(after)

    walk(loss.grad_fn)
    return sorted(found.values(), key=lambda leaf: len(leaf))


def test_a_wrong_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: 1.1 * right(*args, **kwargs)

    right = lm_measure.kdkernels.linear_kd_loss
    monkeypatch.setattr(lm_measure.kdkernels, "linear_kd_loss", wrong(right))
    with pytest.raises(DistillError, match="^the loss with a live teacher must be the same from"):
        lm_measure.routes(SHAPE, RUNTIME)
