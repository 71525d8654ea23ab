"""The runs of a case, and how a mode calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kdkernels.bench.cases import Case, Consuming, Inputs, Run, Setting
from kdkernels.bench.timing import Prepare

Variants = dict[str, Run | Consuming]


def build(
    case: Case, setting: Setting, backends: Sequence[str], against: Sequence[str]
) -> tuple[Variants, dict[str, str]]:
    """Every run by name, ours first, and the rivals that cannot run with the reason."""
    variants: Variants = {name: case.ours(setting, name) for name in backends}
    missing = {}
    for name in against:
        rival = case.rival(setting, name)
        if isinstance(rival, str):
            missing[name] = rival
        else:
            variants[name] = rival
    return variants, missing


def preparer(variant: Run | Consuming, sets: Sequence[Inputs], mode: str) -> Prepare:
    """Calls of a variant in a mode: ``forward`` (no gradient), ``backward`` or ``full`` (both)."""
    run = variant.run if isinstance(variant, Consuming) else variant

    def prepare(index: int) -> Callable[[], object]:
        first, *others = sets[index]
        if isinstance(variant, Consuming):
            first = first.detach().clone().requires_grad_(first.requires_grad)
        leaves = [x for x in (first, *others) if x.requires_grad]
        if mode == "backward":
            loss = run(first, *others)
            return lambda: torch.autograd.grad(loss, leaves)
        if mode == "full":
            return lambda: torch.autograd.grad(run(first, *others), leaves)
        return lambda: _without_gradient(run, (first, *others))

    return prepare


def _without_gradient(run: Run, inputs: Inputs) -> object:
    with torch.no_grad():
        return run(*inputs)
