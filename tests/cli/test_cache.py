"""``kdkernels cache``: a tiny language model over a small text, and what it left."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from kdkernels import TeacherCache
from kdkernels.api.cli import app

pytest.importorskip("transformers")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "far", "away"]
K, LENGTH = 5, 16


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,  # with padding, as many real heads have
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred words in lines of ten."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (30, 10), generator=generator).tolist()
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text("\n".join(" ".join(WORDS[i] for i in line) for line in drawn) + "\n")
    return path


def arguments(teacher: Path, text: Path, out: Path, *more: object) -> list[str]:
    fixed = ["cache", "build", "--model", teacher, "--data", text, "--out", out, "--k", K]
    fixed += ["--seq-len", LENGTH, "--shard-rows", 4 * LENGTH, "--device", "cpu"]
    fixed += ["--max-tokens", 16 * LENGTH]
    return [str(item) for item in (*fixed, *more)]


def call(*command: object) -> Result:
    # Wide enough that no line is wrapped.
    return CliRunner().invoke(app, [str(item) for item in command], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def built(teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache at temperature 2, and what was printed."""
    out = tmp_path_factory.mktemp("cache")
    done = call(*arguments(teacher, text, out, "--temperature", 2))
    assert done.exit_code == 0, done.output
    return out, done.output


def blocks(teacher: Path, text: Path) -> list[Any]:
    from transformers import AutoTokenizer

    from kdkernels.api.distill.lm_data import lm_blocks

    return lm_blocks(
        str(text), AutoTokenizer.from_pretrained(teacher), "train", LENGTH, 16 * LENGTH
    )


def test_stored_rows_are_the_models(built: tuple[Path, str], teacher: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    cache = TeacherCache(built[0], tokenizer=tokenizer, vocab_size=20, temperature=2.0, shift=1)
    assert cache.manifest.k == K and cache.manifest.teacher == "tiny"
    model = AutoModelForCausalLM.from_pretrained(teacher)
    found = blocks(teacher, text)
    assert len(cache) == len(found) == 16
    for name, tokens in found:
        with torch.no_grad():
            whole = (model(input_ids=tokens[None]).logits[0].float() / 2.0).log_softmax(-1)
        ids, logprobs = cache.get(name, tokens)
        # The right classes, and row t is of what follows token t.
        assert (whole.gather(-1, ids) - logprobs).abs().max() < 0.02
        masses = (whole.gather(-1, ids).exp().sum(-1), whole.topk(K)[0].exp().sum(-1))
        assert (masses[0] - masses[1]).abs().max() < 1e-5


def test_a_model_that_caps_its_logits_is_read_from_them(teacher: Path) -> None:
    from transformers import AutoModelForCausalLM

    from kdkernels.api.cache import build

    class Capped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(teacher)

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "model" else getattr(self.model, name)

        def forward(self, **inputs: Any) -> Any:
            out = self.model(**inputs)
            out.logits = 3 * torch.tanh(out.logits / 3)
            return out

    model, tokens = Capped().eval(), torch.arange(8)[None]
    assert not build._by_head(model) and build._by_head(model.model)
    ids, logprobs = build.topk_rows(model, tokens, K, 1.0, by_head=False)
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits.log_softmax(-1)
    assert torch.allclose(logprobs, wanted.gather(-1, ids), atol=1e-5)
    assert torch.allclose(logprobs, wanted.topk(K)[0], atol=1e-5)


def test_estimate_comes_first_and_the_same_command_continues(
    built: tuple[Path, str], teacher: Path, text: Path, tmp_path: Path
) -> None:
    lines = [line for line in built[1].splitlines() if line.strip()]
    assert lines[0].startswith("16 examples, 256 rows of 5 of 20 classes: about 0.0 MB, 3.")
    assert "wrote 16 examples" in lines[-1]
    part = arguments(teacher, text, tmp_path, "--temperature", 2)
    assert call(*part, "--max-tokens", 5 * LENGTH).exit_code == 0
    assert len(TeacherCache(tmp_path)) == 5
    done = call(*part)
    assert "5 of 16 examples are there already" in done.output
    assert "wrote 11 examples" in done.output
    whole, pieces = TeacherCache(built[0]), TeacherCache(tmp_path)
    asked = blocks(teacher, text)
    assert list(whole) == list(pieces)
    for one, other in zip(whole.rows(asked), pieces.rows(asked), strict=True):
        assert torch.equal(one, other)
    assert "wrote 0 examples" in call(*part).output


def test_info_and_verify(built: tuple[Path, str]) -> None:
    found = json.loads(call("cache", "info", built[0], "--json").output)
    assert (found["examples"], found["rows"], found["shards"], found["k"]) == (16, 256, 4, K)
    size = sum(path.stat().st_size for path in built[0].glob("*.safetensors"))
    assert found["bytes"] == size
    assert found["bytes_an_entry"] == pytest.approx(size / 256 / K, abs=1e-3)
    shown = call("cache", "info", built[0]).output
    assert "temperature     2.0" in shown and "teacher         tiny" in shown
    done = call("cache", "verify", built[0])
    assert done.exit_code == 0 and "4 shards are whole" in done.output


def test_each_rank_takes_its_share(
    built: tuple[Path, str],
    teacher: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torchrun starts them; tests/cache has real processes at once."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, spoken in (("1", ""), ("0", "16 examples, 256 rows")):
        monkeypatch.setenv("RANK", rank)
        done = call(*arguments(teacher, text, tmp_path, "--temperature", 2))
        assert done.exit_code == 0, done.output
        assert done.output.startswith(spoken) and bool(done.output) == bool(spoken)
    shards = [TeacherCache(tmp_path)._shards[i] for i in (0, -1)]
    assert [shard.path.name[:9] for shard in shards] == ["rank00000", "rank00001"]
    whole, shared = TeacherCache(built[0]), TeacherCache(tmp_path)
    assert shared.num_rows == 256
    asked = blocks(teacher, text)
    for one, other in zip(whole.rows(asked), shared.rows(asked), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "absent"], "cache build: model must be .*, got absent"),
        (["--data", "absent.txt"], "cache build: data must be .*, got absent.txt"),
        (["--batch-size", "0"], "cache build: batch-size must be at least 1, got 0"),
        (["--device", "tpu"], "cache build: device must be auto, cpu or cuda, got 'tpu'"),
        (["--k", "21"], "TopKCodec: k must be at most vocab_size 20, got 21"),
        (["--temperature", "3"], "TeacherCacheWriter: temperature must be 2.0, .* got 3.0"),
    ],
)
def test_build_refuses(
    built: tuple[Path, str], teacher: Path, text: Path, change: list[str], message: str
) -> None:
    done = call(*arguments(teacher, text, built[0], *change))
    assert done.exit_code == 1
    said = done.output if isinstance(done.exception, SystemExit) else str(done.exception)
    assert re.search(message, said), said


def test_no_cache_is_said_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdkernels", "cache", "info", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "path must be a teacher cache, got" in done.stderr
    assert len(done.stderr.splitlines()) == 1
