"""Reads tasks over several domains: published data sets, and the user's own file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kdkernels.api.distill import fetch, glue, multiemo, own_data, sentiment
from kdkernels.api.distill.amazon import load_amazon
from kdkernels.api.distill.data import divide
from kdkernels.api.distill.domains import SPLITS, DomainExamples, Row, gather
from kdkernels.api.distill.errors import require

TASKS = ("sentiment", "multiemo", "mnli", "amazon")
FOLDERS = ("mnli", "amazon")  # whose files the user has to have
DEV_SHARE = 0.10  # of sentiment


def load_domains(
    task: str, data: Path | None, notify: fetch.Notify, column: str = "domain"
) -> DomainExamples:
    """The domains of a task, or of the user's own file.

    Args:
        task: One of ``TASKS``; not looked at where ``data`` is a file.
        data: A CSV, TSV or JSONL file of the user's own; the folder of ``mnli`` or ``amazon``; None
            for the others, which are downloaded by checksum.
        notify: Told about a download.
        column: Of the user's own file: the column that names the domain.

    Raises:
        DistillError: Files are missing or break their contract.
    """
    if data is not None and data.is_file():
        return load_own_domains(data, column)
    require(task in TASKS, "task", f"be one of {', '.join(TASKS)}", repr(task))
    if task in FOLDERS:
        require(data is not None, "data", f"name the folder of {task}", "none")
        assert data is not None
        return load_mnli_genres(data) if task == "mnli" else load_amazon(data)
    require(data is None, "data", f"be a file, or be left out for {task}", data)
    if task == "sentiment":
        return load_sentiment_domains(fetch.fetch(fetch.SENTIMENT, notify))
    return load_multiemo_domains(fetch.fetch_members(fetch.MULTIEMO, notify))


def load_sentiment_domains(archive: Path) -> DomainExamples:
    """The demo's short texts by domain; no document is in two splits.

    Test texts are the demo's, whose students they have not seen either.

    Args:
        archive: The verified source archive.
    """
    documents = sentiment.documents(sentiment.read_snippets(archive))
    total = sum(len(document) for document in documents)
    parts: dict[str, list[Row]] = {"test": [], "dev": [], "train": []}
    sizes = {"test": round(sentiment.TEST_SHARE * total), "dev": round(DEV_SHARE * total)}
    for document in documents:
        split = next((name for name, size in sizes.items() if len(parts[name]) < size), "train")
        domain = document[0].document.partition("/")[0]
        parts[split] += [Row(domain, s.text, sentiment.LABELS[s.label]) for s in document]
    names = [name for name, _ in sentiment.SENTIMENT_FILES]
    return gather(parts, names, sentiment.LABELS, sentiment.SOURCE)


def load_multiemo_domains(folder: Path) -> DomainExamples:
    """MultiEmo's sentences by domain, in the splits of the mixed task.

    Args:
        folder: The verified files.
    """
    rows = []
    for domain in multiemo.DOMAINS:
        content = (folder / multiemo.file_name(domain)).read_text(encoding="utf-8")
        found = multiemo.read_examples(content, domain)
        rows += [Row(domain, text, label) for label, text in found]
    train, test, dev = divide(rows, lambda row: row.text, multiemo.SHARES)
    parts = {"train": train, "dev": dev, "test": test}
    return gather(parts, multiemo.DOMAINS, multiemo.LABELS, multiemo.SOURCE)


def load_mnli_genres(folder: Path, mismatched: bool = False) -> DomainExamples:
    """MNLI's pairs of sentences by genre.

    The labels of its own test files are hidden: half of each genre's pairs in ``dev_matched.tsv``
    are for dev and half for test, always the same ones; equal pairs are on one side.

    Args:
        folder: As :func:`kdkernels.api.distill.glue.find_files` takes it.
        mismatched: The genres of ``dev_mismatched.tsv`` instead, of which there is nothing to train
            on.

    Raises:
        DistillError: A file is missing or breaks its contract; the message names the line.
    """
    task = glue.TASKS["mnli"]
    with_genre = replace(task, texts=(*task.texts, "genre"))
    names = list(task.classes)

    def read(path: Path) -> dict[str, list[Row]]:
        genres: dict[str, list[Row]] = {}
        for example in glue.parse_tsv(glue.decoded(path), path.name, with_genre)[0]:
            first, second, genre = example.texts
            row = Row(genre, first, names[int(example.label)], second)
            genres.setdefault(genre, []).append(row)
        return {genre: genres[genre] for genre in sorted(genres)}

    train_file, *scored_files = glue.find_files("mnli", folder)
    scored_file = scored_files[mismatched]
    scored = read(scored_file)
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for rows in scored.values():
        test, dev = divide(rows, _pair_key, [0.5])
        parts["test"] += test
        parts["dev"] += dev
    for genre, rows in ({} if mismatched else read(train_file)).items():
        contract = f"have pairs of each genre of {train_file.name} in {scored_file.name}"
        require(genre in scored, "data", contract, f"none of {genre}")
        parts["train"] += divide(rows, _pair_key, [])[0]
    source = f"MNLI by genre, scored on {scored_file.name}"
    return gather(parts, list(scored), names, source, SPLITS[mismatched:])


def load_own_domains(path: Path, column: str = "domain") -> DomainExamples:
    """Reads a task over several domains from a file.

    Columns are ``text``, ``label``, the domain's, and perhaps ``split``. Without a ``split`` a
    fifth of each domain's labelled rows is held out for test and a tenth for dev, and a text that
    occurs twice is taken once.

    Args:
        path: ``.csv``, ``.tsv`` or ``.jsonl`` file.
        column: Name of the column that names the domain.

    Raises:
        DistillError: The file breaks its contract; the message names the line.
    """
    rows = own_data.read_rows(path, column)
    labelled = [row for row in rows if row.label]
    if not any(row.split for row in labelled):
        labelled = own_data.without_repeats(labelled)
    domain_names = list(dict.fromkeys(row.domain for row in rows))
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": [], "unlabelled": []}
    for domain in domain_names:
        splits = own_data.assign([row for row in labelled if row.domain == domain])
        splits["unlabelled"] = splits.pop("transfer")
        splits["unlabelled"] += [r for r in rows if not r.label and r.domain == domain]
        for split, found in splits.items():
            known = split != "unlabelled"
            parts[split] += [Row(domain, r.text, r.label if known else None) for r in found]
    source = f"{path.name}, {len(rows)} rows of {len(domain_names)} domains"
    return gather(parts, domain_names, own_data.label_names(rows), source)


def _pair_key(row: Row) -> str:
    """What makes two pairs the same."""
    return "\t".join(" ".join(text.lower().split()) for text in (row.text, row.pair or ""))
