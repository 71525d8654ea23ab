"""Texts of two classes that a tiny model can tell apart, and that model."""

from __future__ import annotations

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
