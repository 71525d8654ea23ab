"""Prototype scores against loops in float64, and their streamed form over a data set."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.budget import assert_within_budget
from torch import Tensor, nn

import kdkernels

K, C, WIDTH = 3, 2, 12
FORMS = ("paper", "code", "pooled")


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def by_hand(
    h: Tensor, prototypes: Tensor, k: int, y: int, form: str, alpha: float, there: Any
) -> float:
    """One score in float64, written down from the paper; ``there``: domains with a prototype."""
    vectors = prototypes[:, 0 if form == "code" else y].double()
    h = h.double()
    others = [j for j in range(len(vectors)) if j != k and there[j]]
    own = cosine(vectors[k], h)
    if not others:
        return own
    if form == "paper":
        zeta = (1 - alpha) / len(others)
        return alpha * own + zeta * sum(cosine(vectors[j], h) for j in others)
    return (own + cosine(torch.stack([vectors[j] for j in others]).mean(0), h)) / 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("domains", [1, 2, K])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_formula(form: str, domains: int, dtype: torch.dtype) -> None:
    classes = 1 if form == "code" else C
    means = torch.randn(9, WIDTH).to(dtype)
    prototypes = torch.randn(domains, classes, WIDTH).to(dtype)
    ks, ys = torch.arange(9) % domains, torch.arange(9) // 3 % classes
    there = [True] * domains
    if domains == K:  # one of another domain that has no examples
        prototypes[2] = 0.0
        there[2] = False
        ks %= 2
    right = torch.tensor(
        [
            by_hand(h, prototypes, int(k), int(y), form, 0.7, there)
            for h, k, y in zip(means, ks, ys, strict=True)
        ],
        dtype=torch.float64,
    )
    found = kdkernels.prototype_scores(
        means,
        prototypes[:, 0] if form == "code" else prototypes,
        ks,
        None if form == "code" else ys,
        form=form,
        alpha=0.7,
    )
    assert found.dtype == dtype and found.shape == (9,)
    assert_within_budget(found, right, right.to(dtype), dtype, unit=1.0)


def test_no_prototype_and_no_content_are_no_nan() -> None:
    prototypes, zero = torch.zeros(2, 1, 4), torch.zeros(2, dtype=torch.int64)
    prototypes[1, 0, 0] = 2.0  # the examples' own domain has none
    means = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0] * 4])
    for form, table in (("paper", prototypes), ("code", prototypes[:, 0]), ("pooled", prototypes)):
        scores = kdkernels.prototype_scores(means, table, zero, zero, form=form)
        assert scores.tolist() == [1.0, 0.0], form


M, P, D = torch.ones(4, 3), torch.ones(2, 2, 3), torch.tensor([0, 1, 1, 0])
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"means": M[0]}, ValueError, r"means must be \[examples, hidden\], got torch.float32 \[3\]"),
    ({"means": M.long()}, TypeError, "means must be a floating tensor, got torch.int64"),
    ({"prototypes": P[0]}, ValueError, r"prototypes must be \[domains, classes, hidden\], got"),
    ({"prototypes": P[..., :2]}, ValueError, "prototypes must be"),
    ({"prototypes": P[:0]}, ValueError, "prototypes must be"),
    ({"prototypes": P.to("meta")}, ValueError, "prototypes must be on cpu, got meta"),
    ({"form": "code"}, ValueError, r"prototypes must be \[domains, hidden\], got"),
    ({"domains": D + 1}, ValueError, r"domains must lie in \[0, 2\), got 1 to 2"),
    ({"domains": D - 1}, ValueError, r"domains must lie in \[0, 2\), got -1 to 0"),
    ({"domains": D[:3]}, ValueError, r"domains must be \[4\], got torch.int64 \[3\]"),
    ({"domains": D.float()}, TypeError, "domains must be integers, got torch.float32"),
    ({"labels": None}, TypeError, "labels must be integers, got NoneType"),
    ({"labels": D + 1}, ValueError, r"labels must lie in \[0, 2\), got 1 to 2"),
    ({"form": "mean"}, ValueError, "form must be one of paper, code, pooled, got 'mean'"),
    ({"alpha": 1.5}, ValueError, "alpha must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"means": M, "prototypes": P, "domains": D, "labels": D, **change}
    with pytest.raises(error, match=f"prototype_scores: .*{message}"):
        kdkernels.prototype_scores(**call)


# ---- a data set ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(3)
    model: nn.Module = BertModel(BertConfig(vocab_size=40, num_hidden_layers=2, **sizes))
    return model.train()  # with dropout, unless it is put in eval mode


def examples(count: int, seq: int = 9) -> dict[str, Tensor]:
    """Texts ``[CLS] ... [SEP] [PAD] ...``, ids 1, 2, 0; the last one has no content."""
    lengths = torch.randint(1, seq - 1, (count,))
    lengths[-1] = 0
    ids = torch.randint(3, 40, (count, seq))
    place = torch.arange(seq)
    ids[:, 0] = 1
    ids[place == lengths[:, None] + 1] = 2
    ids[place > lengths[:, None] + 1] = 0
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "domains": torch.arange(count) % K,
        "labels": torch.arange(count) // 2 % C,
    }


def batches(data: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    count = len(data["input_ids"])
    return [{key: x[i : i + size] for key, x in data.items()} for i in range(0, count, size)]


def embeddings(model: nn.Module, data: dict[str, Tensor], what: str) -> Tensor:
    """Of one text at a time, in float64."""
    inputs = {key: data[key] for key in ("input_ids", "attention_mask")}
    training = model.training
    with torch.no_grad():
        output: Any = model.eval()(**inputs)
    model.train(training)
    if what == "pooled":
        return output.pooler_output.double()
    states = output.last_hidden_state.double()
    if what == "code":
        return states[:, 1:].mean(1)
    rows = []
    for text, ids in zip(states, inputs["input_ids"], strict=True):
        content = text[ids > 2]
        rows.append(content.mean(0) if len(content) else torch.zeros(WIDTH).double())
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("form", "faithful_to"),
    [
        ("paper", "paper"),
        ("paper", "code"),
        ("code", "code"),
        ("code", "paper"),
        ("pooled", "paper"),
    ],
)
def test_streamed_equals_all_at_once(
    encoder: nn.Module, form: str, faithful_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["kdkernels.api.prototypes"], "BLOCK", 5)
    data = examples(23)
    h = embeddings(encoder, data, "pooled" if form == "pooled" else faithful_to)
    classes = 1 if form == "code" else C
    labels = torch.zeros(23).long() if form == "code" else data["labels"]
    counted = h.abs().sum(1) > 0
    table = torch.zeros(K, classes, WIDTH, dtype=torch.float64)
    for k in range(K):
        for y in range(classes):
            table[k, y] = h[(data["domains"] == k) & (labels == y) & counted].mean(0)
    right = kdkernels.prototype_scores(
        h, table[:, 0] if form == "code" else table, data["domains"], labels, form=form, alpha=0.6
    )
    ids = None if faithful_to == "code" or form == "pooled" else (0, 1, 2)
    for size in (4, 23):
        found = kdkernels.instance_scores(
            encoder,
            iter(batches(data, size)),
            n_domains=K,
            n_classes=C,
            form=form,
            alpha=0.6,
            special_ids=ids,
            faithful_to=faithful_to,
        )
        assert found.dtype == torch.float32 and not found.requires_grad
        # The encoder itself is float32 on both sides, in batches of other sizes.
        torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-5)
    assert encoder.training


def test_where_special_tokens_come_from(encoder: nn.Module) -> None:
    data = examples(8)
    options: dict[str, Any] = {"n_domains": K, "n_classes": C}
    right = kdkernels.instance_scores(encoder, batches(data, 4), special_ids=(0, 1, 2), **options)
    special = {**data, "special_tokens_mask": (data["input_ids"] < 3).long()}
    assert torch.equal(kdkernels.instance_scores(encoder, batches(special, 4), **options), right)
    with pytest.raises(ValueError, match="special_ids must be given where batches have no special"):
        kdkernels.instance_scores(encoder, batches(data, 4), **options)
    config: Any = encoder.config
    config.bos_token_id, config.eos_token_id = 1, 2  # as RoBERTa's names them
    try:
        assert torch.equal(kdkernels.instance_scores(encoder, batches(data, 4), **options), right)
    finally:
        config.bos_token_id = config.eos_token_id = None


def test_of_a_classifier_the_encoder_runs(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=40, num_hidden_layers=1, **sizes))
    data = examples(8)
    options: dict[str, Any] = {"n_domains": K, "n_classes": C, "special_ids": (0, 1, 2)}
    found = [
        kdkernels.instance_scores(m, batches(data, 3), directory=tmp_path, **options)
        for m in (model, model.bert)
    ]
    assert torch.equal(*found) and not list(tmp_path.iterdir())


def test_batches_that_do_not_fit(encoder: nn.Module) -> None:
    data = examples(6)
    options: dict[str, Any] = {"n_domains": K, "n_classes": C, "special_ids": (0, 1, 2)}

    def run(change: dict[str, Any], **more: Any) -> None:
        kdkernels.instance_scores(encoder, [{**data, **change}], **(options | more))

    with pytest.raises(ValueError, match="batch must have a tensor labels, got input_ids, attent"):
        run({"labels": None})
    run({"labels": None}, form="code")
    with pytest.raises(ValueError, match=r"domains must lie in \[0, 2\), got 0 to 2"):
        run({}, n_domains=2)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\), got 0 to 1"):
        run({}, n_classes=1)
    with pytest.raises(ValueError, match=r"domains must be \[6\], got"):
        run({"domains": data["domains"][:5]})
    with pytest.raises(ValueError, match="loader must have at least one batch, got none"):
        kdkernels.instance_scores(encoder, [], **options)
    with pytest.raises(ValueError, match="faithful_to must be one of paper, code, got 'text'"):
        run({}, faithful_to="text")
    with pytest.raises(TypeError, match="n_domains must be an int, got float"):
        run({}, n_domains=3.0)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, WIDTH)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.table(input_ids)

    with pytest.raises(TypeError, match="model must return a last_hidden_state, got Tensor witho"):
        kdkernels.instance_scores(Bare(), [data], **options)


def test_examples_in_docstrings_run() -> None:
    found = doctest.testmod(sys.modules["kdkernels.api.prototypes"])
    assert found.attempted > 7 and found.failed == 0


@pytest.mark.slow
def test_a_hundred_thousand_examples_take_under_200_mb() -> None:
    """In a process of its own, whose memory is nothing else's. Promised: 200 MB above the model."""
    script = Path(__file__).parents[1] / "helpers" / "scored.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "100000"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grown, scored = (float(x) for x in done.stdout.split())
    print(f"{grown:.0f} MB above the model for {scored:.0f} examples")
    assert scored == 100_000 and grown < 200
