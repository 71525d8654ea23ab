"""A tiny teacher, a task it can learn, the command as users call it, and a finished run."""

from __future__ import annotations

import csv
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from helpers import reviewed
from typer.testing import CliRunner

GLUE_HEADER = {"RTE": "index\tsentence1\tsentence2\tlabel", "STS-B": "sentence1\tsentence2\tscore"}


@pytest.fixture
def make_text() -> Callable[[int, random.Random], str]:
    """Makes a text of a class, 0 or 1."""
    return reviewed.make_text


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT encoder with four layers, saved as a transformers folder."""
    return reviewed.save_encoder(tmp_path_factory.mktemp("models") / "teacher", 4)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 labelled and 90 unlabelled rows in a CSV file; copy it to change it."""
    source = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(240):
            label = i % 2
            writer.writerow(
                [reviewed.make_text(label, source), ("neg", "pos")[label] if i < 150 else ""]
            )
    return path


@pytest.fixture
def glue_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTE and STS-B in a folder each; what decides is the first text alone."""
    source, above = random.Random(8), tmp_path_factory.mktemp("glue")
    for task, labels in (("RTE", ("not_entailment", "entailment")), ("STS-B", ("1.0", "4.0"))):
        (above / task).mkdir()
        for file, count in (("train.tsv", 130), ("dev.tsv", 40)):
            lines = [GLUE_HEADER[task]]
            for i in range(count):
                texts = f"{reviewed.make_text(i % 2, source)}\tthe day {i}\t{labels[i % 2]}"
                lines.append(f"{i}\t{texts}" if task == "RTE" else texts)
            (above / task / file).write_text("\n".join(lines), encoding="utf-8")
    return above


@pytest.fixture(scope="session")
def invoke() -> Callable[..., Result]:
    """Calls ``kdkernels distill`` in this process."""
    from kdkernels.api.cli.distill import distill

    app = typer.Typer()
    app.command()(distill)
    return lambda *arguments: CliRunner().invoke(app, [str(item) for item in arguments])


@pytest.fixture
def command(
    invoke: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Calls ``kdkernels distill`` in an empty folder with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    return invoke


@pytest.fixture(scope="session")
def small_run(tiny_teacher: Path, reviews: Path) -> list[str]:
    """Options of a run that takes a second or two; the name comes last."""
    options = ["--data", str(reviews), "--teacher", str(tiny_teacher), "--student-layers", "0,3"]
    options += ["--epochs", "4", "--label-epochs", "4", "--teacher-epochs", "6", "--lr", "3e-3"]
    options += ["--teacher-lr", "3e-3", "--batch-size", "16", "--seeds", "0,1", "--no-throughput"]
    return [*options, "--precision", "fp32", "--train-embeddings", "--name", "small"]


@pytest.fixture(scope="session")
def finished(
    invoke: Callable[..., Result], small_run: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run; copy it to change it."""
    out = tmp_path_factory.mktemp("finished")
    done = invoke(*small_run, "--out", out)
    assert done.exit_code == 0, done.output
    return out / "small"


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run to change, in ``runs`` of the test's folder."""
    return shutil.copytree(finished, tmp_path / "runs" / "small")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 600 lines; what follows a word depends on it."""
    source = random.Random(0)
    words = [*reviewed.GOOD, *reviewed.BAD, *reviewed.NEUTRAL]
    after = {word: source.sample(words, 3) for word in words}
    lines = []
    for _ in range(600):
        line = [source.choice(words)]
        while len(line) < 12:
            line.append(source.choice(after[line[-1]]))
        lines.append(" ".join(line))
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_lm(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six layers with a tied head, trained a little on the text, as a folder."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "lm"
    pairs = Tokenizer(BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    pairs.train([str(tiny_text)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    ids = tokenizer(tiny_text.read_text(), return_tensors="pt")["input_ids"][0]
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in blocks[:192].split(16):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_lm_run(tiny_lm: Path, tiny_text: Path) -> list[str]:
    """Options of a run of the language-model objective; the name comes last."""
    options = ["--objective", "lm", "--model", str(tiny_lm), "--data", str(tiny_text)]
    options += ["--layers", "2", "--seq-len", "32", "--tokens", "4096", "--eval-tokens", "512"]
    options += ["--batch-size", "8", "--epochs", "2", "--top-k", "16", "--lr", "3e-3", "--quick"]
    return [*options, "--precision", "fp32", "--train-embeddings", "--name", "small"]


@pytest.fixture(scope="session")
def finished_lm(
    invoke: Callable[..., Result], small_lm_run: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run; copy it to change it."""
    out = tmp_path_factory.mktemp("finished-lm")
    done = invoke(*small_lm_run, "--out", out)
    assert done.exit_code == 0, done.output
    return out / "small"
