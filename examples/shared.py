"""What the examples of classifiers begin with: options, texts, models and batches."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdkernels.api.distill import fetch
from kdkernels.api.distill.bert_tiny import bert_tiny_folder
from kdkernels.api.distill.data import Corpus, Limits
from kdkernels.api.distill.own_data import load_own
from kdkernels.api.distill.sentiment import load_sentiment

BATCH = 32


def arguments(description):
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", help="CSV: text, label (empty: no label)")
    parser.add_argument("--teacher", help="a transformers folder")
    parser.add_argument("--student", help="one with the same vocabulary")
    parser.add_argument("--quick", action="store_true", help="few texts, one epoch")
    return parser.parse_args()


def load_models(args, corpus):
    """Tokenizer, teacher and student: all-MiniLM-L6-v2 and BERT-Tiny, downloaded once, or yours."""
    folders = [args.teacher or fetch.teacher_folder(print), args.student or bert_tiny_folder(print)]
    classes = len(corpus.label_names)
    teacher, student = (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
        for folder in folders
    )
    return AutoTokenizer.from_pretrained(folders[0]), teacher, student


def load_texts(data: str | None, quick: bool) -> Corpus:
    """A CSV file with ``text`` and ``label`` (empty: unlabelled), or sentiment, downloaded once."""
    limits = Limits(64, 128, 100, exact=False) if quick else Limits(2000, 10000, exact=False)
    if data is not None:
        return load_own(Path(data), limits)
    return load_sentiment(fetch.fetch(fetch.SENTIMENT, print), limits)


def batches(tokenizer, texts, labels=None, seed=None):
    """Padded batches, with ``labels`` if there are any; shuffled if there is a seed."""
    rows = torch.arange(len(texts))
    if seed is not None:
        rows = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    for part in rows.split(BATCH):
        chosen = [texts[row] for row in part.tolist()]
        batch = tokenizer(chosen, padding=True, truncation=True, max_length=64, return_tensors="pt")
        yield {**batch, **({} if labels is None else {"labels": torch.tensor(labels)[part]})}
