"""Losses of a language model: the two routes, perplexity, the order of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdkernels.api.cache import TeacherCache, TeacherCacheWriter
from kdkernels.api.distill import lm_models, lm_train
from kdkernels.api.distill.lm_data import Block, lm_blocks
from kdkernels.api.distill.lm_train import LmLoss, Source
from kdkernels.api.distill.train import Loop, Recipe, Runtime, run

RUNTIME = Runtime(torch.device("cpu"), bf16=False)
TOP_K = 16


@pytest.fixture(scope="module")
def loaded(tiny_lm: Path) -> tuple[Any, Any]:
    model, tokenizer = lm_models.load_causal_lm(str(tiny_lm))
    return model.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def blocks(loaded: tuple[Any, Any], tiny_text: Path) -> list[Block]:
    return lm_blocks(str(tiny_text), loaded[1], "train", 24, 24 * 24)


@pytest.fixture(scope="module")
def cache(
    loaded: tuple[Any, Any], blocks: list[Block], tmp_path_factory: pytest.TempPathFactory
) -> TeacherCache:
    teacher, folder = loaded[0], tmp_path_factory.mktemp("cache")
    vocab = teacher.config.vocab_size
    with TeacherCacheWriter(folder, k=TOP_K, vocab_size=vocab, temperature=2.0) as writer:
        for name, tokens in blocks:
            logs = (teacher(tokens[None]).logits[0] / 2.0).log_softmax(-1)
            values, ids = logs.topk(TOP_K, -1)
            writer.add(name, tokens, ids, values)
    return TeacherCache(folder)


def source_of(arm: str, teacher: Any, cache: TeacherCache) -> Source:
    return {"ce": Source(), "live": Source(teacher=teacher), "cached": Source(cache=cache)}[arm]


@pytest.mark.parametrize("arm", ["ce", "live", "cached"])
def test_both_routes_learn_the_same(
    loaded: tuple[Any, Any], blocks: list[Block], cache: TeacherCache, arm: str
) -> None:
    """Twelve steps of both from the same weights over the same batches: loss curves and weights."""
    curves, weights = [], []
    for route in ("hidden", "logits"):
        student = lm_models.make_student(loaded[0], 2).requires_grad_(True)
        loss = LmLoss(source_of(arm, loaded[0], cache), route, 2.0, 0.5, RUNTIME)
        curve: list[float] = []

        def logged(
            step: list[Block], loss: LmLoss = loss, model: Any = student, to: list[float] = curve
        ) -> Any:
            value = loss(model, step)
            to.append(value.item())
            return value

        loop = Loop(logged, lambda: 0.0, "dev_perplexity", len, lambda event: None)
        run(student, lm_train.schedule(blocks, 4, 2, 0), loop, Recipe(2, 1e-3, 4, 0))
        curves.append(torch.tensor(curve))
        weights.append(torch.cat([weight.flatten() for weight in student.parameters()]))
    assert len(curves[0]) == 12 and curves[0][-1] < curves[0][0]
    # Rounding of single steps, 1e-6, grows where Adam divides small gradients by their own size.
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-4)


def test_loss_is_the_formula(
    loaded: tuple[Any, Any], blocks: list[Block], cache: TeacherCache
) -> None:
    teacher, student = loaded[0], lm_models.make_student(loaded[0], 2)
    tokens = lm_train.stack(blocks[:3])
    logits = student(tokens).logits[:, :-1].double()
    target = (teacher(tokens).logits[:, :-1].double() / 2.0).log_softmax(-1)
    ce = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    logs = (logits / 2.0).log_softmax(-1)
    kd = (target.exp() * (target - logs)).sum(-1).mean()
    live = LmLoss(Source(teacher=teacher), "hidden", 2.0, 0.25, RUNTIME)(student, blocks[:3])
    assert live.item() == pytest.approx((0.75 * ce + 0.25 * 4 * kd).item(), rel=1e-5)
    alone = LmLoss(Source(), "hidden", 2.0, 0.25, RUNTIME)(student, blocks[:3])
    assert alone.item() == pytest.approx(ce.item(), rel=1e-5)
    # The classes it does not name are one class.
    ids, stored = (part[:, :-1] for part in cache.rows(blocks[:3]))
    chosen, known = logs.gather(-1, ids), stored.double()
    rest, rest_known = (torch.log1p(-part.exp().sum(-1)) for part in (chosen, known))
    top = (known.exp() * (known - chosen)).sum(-1) + rest_known.exp() * (rest_known - rest)
    cached = LmLoss(Source(cache=cache), "hidden", 2.0, 1.0, RUNTIME)(student, blocks[:3])
    assert cached.item() == pytest.approx(4 * top.mean().item(), rel=1e-3)


def test_perplexity_is_that_of_transformers(loaded: tuple[Any, Any], blocks: list[Block]) -> None:
    tokens = lm_train.stack(blocks)
    expected = loaded[0](input_ids=tokens, labels=tokens).loss.exp().item()
    counted: list[int] = []
    found = lm_train.perplexity(loaded[0], blocks, RUNTIME, counted.append)
    assert found == pytest.approx(expected, rel=1e-4)
    assert sum(counted) == len(blocks)


def test_order_depends_on_the_seed_alone(blocks: list[Block]) -> None:
    def names(seed: int) -> list[list[str]]:
        return [[name for name, _ in step] for step in lm_train.schedule(blocks, 5, 2, seed)]

    first = names(0)
    assert first == names(0) != names(1)
    flat = [name for step in first for name in step]
    assert sorted(flat) == sorted([name for name, _ in blocks] * 2)
    assert [len(step) for step in first] == [5, 5, 5, 5, 4] * 2
