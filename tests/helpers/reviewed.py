"""Texts of two classes that a tiny model can tell apart, and that model."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch

GOOD = ["good", "great", "lovely", "fine", "happy"]
BAD = ["bad", "awful", "dull", "poor", "sad"]
NEUTRAL = ["the", "film", "phone", "story", "battery", "was", "and", "it", "very", "day"]


def make_text(label: int, source: random.Random, telling: int = 2) -> str:
    """A few neutral words and some that give the label away, in random order."""
    words = source.choices(NEUTRAL, k=source.randint(3, 9))
    words += source.sample(GOOD if label else BAD, telling)
    source.shuffle(words)
    return " ".join(words)


def save_encoder(folder: Path, layers: int, *more: str) -> Path:
    """A random BERT encoder that knows the words, and more of them, as a transformers folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *NEUTRAL, *more]
    folder.mkdir()
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    return folder


def write_reviews(path: Path) -> Path:
    """150 labelled and 90 unlabelled texts as a CSV file."""
    source = random.Random(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(240):
            label = i % 2
            writer.writerow([make_text(label, source), ("neg", "pos")[label] if i < 150 else ""])
    return path


def write_lines(path: Path) -> Path:
    """600 lines of text; what follows a word depends on it."""
    source = random.Random(0)
    words = [*GOOD, *BAD, *NEUTRAL]
    after = {word: source.sample(words, 3) for word in words}
    lines = []
    for _ in range(600):
        line = [source.choice(words)]
        while len(line) < 12:
            line.append(source.choice(after[line[-1]]))
        lines.append(" ".join(line))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_language_model(folder: Path, text: Path) -> Path:
    """A Llama of six layers with a tied head, trained a little on a text, as a folder."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pairs = Tokenizer(BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    pairs.train([str(text)], trainer)
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
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"][0]
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in blocks[:192].split(16):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder
