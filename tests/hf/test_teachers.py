"""Teachers: live ones as they are prepared, and caches by id and by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import trained
from helpers.trained import VOCAB, close, distilled, lm, losses, texts, weights

from kdkernels import TeacherCache, TeacherCacheWriter
from kdkernels.api import hf
from kdkernels.api.cache import MissingExampleError

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    """All classes of the teacher, at the temperature of the students."""
    folder = tmp_path_factory.mktemp("cache")
    teacher = lm(3, 32, seed=5).eval()
    options: dict[str, Any] = {"k": VOCAB, "vocab_size": VOCAB, "temperature": 2.0, "shift": 1}
    with TeacherCacheWriter(folder, bits=16, **options) as writer:
        for number, text in enumerate(texts()):
            tokens = text["input_ids"][text["attention_mask"] == 1]
            with torch.no_grad():
                logprobs = (teacher(input_ids=tokens[None]).logits[0] / 2.0).log_softmax(-1)
            top = logprobs.topk(VOCAB)
            writer.add(number, tokens, top.indices, top.values)
    return TeacherCache(folder)


def numbered() -> list[dict[str, Any]]:
    return [{**text, "example_id": number} for number, text in enumerate(texts())]


def left(text: dict[str, Any]) -> dict[str, Any]:
    """Padded at the other side, with the positions that a model then needs."""
    length = int(text["attention_mask"].sum())
    rolled = {name: x.roll(trained.TOKENS - length) for name, x in text.items()}
    rolled["position_ids"] = (rolled["attention_mask"].cumsum(0) - 1).clamp(min=0)
    return rolled


@pytest.mark.parametrize("data", [texts(), numbered(), [left(text) for text in texts()]],
                         ids=["by content", "by id", "padded left"])  # fmt: skip
def test_cached_teacher(tmp_path: Path, cache: TeacherCache, data: list[dict[str, Any]]) -> None:
    live = distilled(tmp_path)
    trainer = distilled(tmp_path, teacher=cache, train_dataset=data)
    for each in (live, trainer):
        each.train()
    # What is stored has 16 bits, and Adam's first steps have the size of the learning rate.
    assert losses(trainer) == pytest.approx(losses(live), rel=1e-3)
    close(weights(trainer.model), weights(live.model), 2e-3)


def test_packed_examples(cache: TeacherCache) -> None:
    """One row of several examples, each of which begins at position 0."""
    parts = [text["input_ids"][text["attention_mask"] == 1] for text in texts(3)]
    tokens, lengths = torch.cat(parts)[None], [len(part) for part in parts]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids, logprobs = hf.CachedTeacher(cache, 2.0)(
        {"input_ids": tokens, "position_ids": positions}
    ).topk  # type: ignore[misc]
    for number, (found, values) in enumerate(
        zip(ids[0].split(lengths), logprobs[0].split(lengths), strict=True)
    ):
        expected = cache.get(number, parts[number])
        assert torch.equal(found, expected[0]) and torch.equal(values, expected[1])


def test_refused_caches(tmp_path: Path, cache: TeacherCache) -> None:
    with pytest.raises(ValueError, match="temperature must be 2.0, which is stored"):
        distilled(tmp_path, teacher=cache, temperature=1.0)
    with pytest.raises(ValueError, match="teacher must be a model for route='logits', got a cache"):
        distilled(tmp_path, teacher=cache, route="logits")
    with pytest.raises(ValueError, match="have the student's 90 classes, got a cache"):
        distilled(tmp_path, lm(vocab_size=90), teacher=cache)
    other = [{**text, "input_ids": text["input_ids"] + 1} for text in texts()]
    with pytest.raises(MissingExampleError, match="must be the tokens of one of the 12 examples"):
        distilled(tmp_path, teacher=cache, train_dataset=other).train()
    with pytest.raises(ValueError, match="must be those the teacher read for example"):
        wrong = [{**text, "example_id": 0} for text in texts()]
        distilled(tmp_path, teacher=cache, train_dataset=wrong).train()


def test_ids_survive_a_data_set_with_columns(tmp_path: Path, cache: TeacherCache) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{k: v.tolist() if k != "example_id" else v for k, v in text.items()}
            for text in numbered()]  # fmt: skip
    data = datasets.Dataset.from_list([{**row, "unused": 1} for row in rows])
    trainer = distilled(tmp_path, teacher=cache, train_dataset=data)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "example_id" in batch and "unused" not in batch
    trainer.train()
    assert trainer.state.log_history[0]["kd_loss"] > 0


def test_prepared_teacher() -> None:
    model = lm(2).train()
    teacher = hf.prepare_teacher(model, dtype=torch.bfloat16)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    batch = {k: v[None] for k, v in texts(1)[0].items()}
    signals = teacher(batch, layers=["model.layers.0", "model.layers.1"])
    assert signals.hidden is not None and signals.hidden.dtype == torch.bfloat16
    assert [tuple(x.shape) for x in signals.layers] == [(1, trained.TOKENS, 16)] * 2
    assert signals.logits is None
    logits = teacher(batch, route="logits").logits
    assert logits is not None and logits["logits"].shape[-1] == VOCAB
    # Its padding, packing and positions are the student's.
    moved = {**batch, "position_ids": torch.arange(trained.TOKENS)[None] + 3}
    assert not torch.equal(teacher(moved).hidden, signals.hidden)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        hf.prepare_teacher(3)  # type: ignore[arg-type]
    model.is_quantized = True
    with pytest.raises(ValueError, match="dtype must not be given for a quantised model"):
        hf.prepare_teacher(model, dtype=torch.float16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_teacher(tmp_path: Path) -> None:
    """All linear layers of 8 bits but the head, which is read."""
    teacher = lm(2, 32, seed=5, tie_word_embeddings=False)
    expected = distilled(tmp_path, teacher=teacher)
    expected.train()
    layers = teacher.model.layers
    teacher.model.layers = torch.ao.quantization.quantize_dynamic(layers, {torch.nn.Linear})
    trainer = distilled(tmp_path, teacher=teacher)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=0.05)
    assert losses(trainer) != losses(expected)
