"""Tasks over several domains, on small files of the published layouts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from distill.test_glue import DEV_HEADERS, DEV_ROWS, HEADERS, ROWS
from distill.test_sentiment import archive  # noqa: F401  # a fixture

from kdkernels.api.distill import multiemo
from kdkernels.api.distill.amazon import load_amazon, read_reviews
from kdkernels.api.distill.data import Limits
from kdkernels.api.distill.domain_readers import (
    load_domains,
    load_mnli_genres,
    load_multiemo_domains,
    load_own_domains,
    load_sentiment_domains,
)
from kdkernels.api.distill.domains import DomainExamples, DomainTexts
from kdkernels.api.distill.errors import DistillError
from kdkernels.api.distill.sentiment import load_sentiment


def splits(found: DomainExamples) -> dict[str, DomainTexts]:
    return {"train": found.train, "dev": found.dev, "test": found.test}


def check(found: DomainExamples) -> None:
    """Every text in one split, every domain in every split, corpora that are parts of it."""
    homes: dict[tuple[str, str], set[str]] = {}
    for split, part in splits(found).items():
        pairs = part.pairs or [""] * len(part)
        assert len(part.labels) == len(part.domains) == len(part.texts) == len(pairs)
        for text, pair in zip(part.texts, pairs, strict=True):
            homes.setdefault((text.lower(), pair.lower()), set()).add(split)
        assert set(part.domains) == set(range(len(found.domain_names)))
        assert set(part.labels) <= set(range(len(found.label_names)))
    assert all(len(home) == 1 for home in homes.values())
    corpora = found.corpora()
    assert list(corpora) == found.domain_names
    for split, part in splits(found).items():
        assert sum(len(getattr(c, split)) for c in corpora.values()) == len(part)
    for number, corpus in enumerate(corpora.values()):
        own = [
            t for t, d in zip(found.train.texts, found.train.domains, strict=True) if d == number
        ]
        assert corpus.train.texts == own and corpus.label_names == found.label_names
        head = corpus.train.head(1)
        assert (head.pairs is None) == (found.train.pairs is None) and len(head) == 1


def test_sentiment(archive: Path) -> None:  # noqa: F811
    found = load_sentiment_domains(archive)
    check(found)
    assert found.domain_names == ["movie", "amazon", "nyt", "tweets"]
    assert sorted(found.test.texts) == sorted(load_sentiment(archive, Limits()).test.texts)
    documents: dict[tuple[str, ...], set[str]] = {}
    for split, part in splits(found).items():
        for text, domain in zip(part.texts, part.domains, strict=True):
            assert text.split()[0] == found.domain_names[domain]
            documents.setdefault(tuple(text.split()[:2]), set()).add(split)
    assert all(len(home) == 1 for home in documents.values())
    assert len(found.unlabelled) == 0 and found.label_names == ["negative", "positive"]


def test_multiemo(tmp_path: Path) -> None:
    for domain in multiemo.DOMAINS:
        examples = [
            {
                # Every fifth is the same in all domains.
                "input": f"{'same' if i % 5 == 0 else domain} {i}",
                "target_scores": {k: int(n == i % 4) for n, k in enumerate(multiemo.LABELS)},
            }
            for i in range(40)
        ]
        path = tmp_path / multiemo.file_name(domain)
        path.parent.mkdir()
        path.write_text(json.dumps({"examples": examples}))
    found = load_multiemo_domains(tmp_path)
    check(found)
    mixed = multiemo.load_multiemo(tmp_path)
    for split, part in splits(found).items():
        assert sorted(part.texts) == sorted(getattr(mixed, split).texts)
        for text, label, domain in zip(part.texts, part.labels, part.domains, strict=True):
            assert label == int(text.split()[1]) % 4
            assert text.split()[0] in ("same", found.domain_names[domain])


# ---- MNLI ----------------------------------------------------------------------------------------

LABELS = ("contradiction", "entailment", "neutral")


def write_mnli(folder: Path) -> None:
    def content(kind: str, genres: tuple[str, ...], count: int, dev: bool) -> str:
        header, row = (DEV_HEADERS, DEV_ROWS) if dev else (HEADERS, ROWS)
        lines = [header["mnli"]]
        for genre in genres:
            for i in range(count):
                filled = row["mnli"].format(a=f"{kind} {genre} {i}", b="it", label=LABELS[i % 3])
                lines.append(filled.replace("\ttravel\t", f"\t{genre}\t"))
        return "\n".join(lines) + "\n"

    genres = ("fiction", "government", "slate", "telephone", "travel")
    others = ("facetoface", "letters")
    for name, kind, names, count in (
        ("train", "train", genres, 30),
        ("dev_matched", "dev", genres, 12),
        ("dev_mismatched", "other", others, 9),
    ):
        text = content(kind, names, count, name != "train")
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")


def test_mnli(tmp_path: Path) -> None:
    write_mnli(tmp_path)
    found = load_domains("mnli", tmp_path, print)
    check(found)
    assert found.domain_names == ["fiction", "government", "slate", "telephone", "travel"]
    assert [len(part) for part in splits(found).values()] == [150, 30, 30]
    assert Counter(found.dev.domains) == dict.fromkeys(range(5), 6)
    for part in splits(found).values():
        assert part.pairs == ["it"] * len(part)
        for text, label, domain in zip(part.texts, part.labels, part.domains, strict=True):
            assert found.label_names[label] == LABELS[int(text.split()[2]) % 3]
            assert text.split()[1] == found.domain_names[domain]
    assert load_mnli_genres(tmp_path) == found
    others = load_mnli_genres(tmp_path, mismatched=True)
    assert others.domain_names == ["facetoface", "letters"] and len(others.train) == 0
    assert len(others.dev) + len(others.test) == 18


def test_mnli_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"got .* without train.tsv, dev_matched.tsv, dev_mism"):
        load_mnli_genres(tmp_path)
    write_mnli(tmp_path)
    train = tmp_path / "train.tsv"
    content = train.read_text()
    train.write_text(content.replace("\tslate\t", "\tletters\t"))
    with pytest.raises(
        DistillError, match="each genre of train.tsv in dev_matched.tsv, got none of"
    ):
        load_mnli_genres(tmp_path)
    train.write_text(content.replace("genre", "kind", 1))
    with pytest.raises(DistillError, match="got none called genre in line 1 of train.tsv"):
        load_mnli_genres(tmp_path)


# ---- Amazon --------------------------------------------------------------------------------------


def review(text: str) -> str:
    return (
        f"<review>\n<unique_id>\n1:a:b\n</unique_id>\n<rating>\n2.0\n</rating>\n<title>\nA & B\n"
        f"</title>\n<review_text>\n{text}\n</review_text>\n</review>\n"
    )


def write_amazon(folder: Path, count: int = 40) -> None:
    for domain in ("books", "dvd", "electronics", "kitchen_&_housewares"):
        home = folder / "sorted_data_acl" / domain
        home.mkdir(parents=True)
        for kind in ("positive", "negative", "unlabeled"):
            texts = [f"{domain}  {kind}\n{i}" for i in range(count)]
            texts.append(texts[3].replace("\n", " "))  # once more
            (home / f"{kind}.review").write_text("".join(map(review, texts)), encoding="latin-1")


def test_amazon(tmp_path: Path) -> None:
    write_amazon(tmp_path)
    found = load_domains("amazon", tmp_path, print)
    check(found)
    assert found.domain_names == ["books", "dvd", "electronics", "kitchen"]
    # Of each domain and class 4 of 40 for test, a tenth of the other 36 for dev.
    for part, size in ((found.test, 4), (found.dev, 4), (found.train, 32)):
        counts = Counter(zip(part.domains, part.labels, strict=True))
        assert counts == {(d, c): size for d in range(4) for c in range(2)}
        for text, label in zip(part.texts, part.labels, strict=True):
            assert text.split()[1] == found.label_names[label] and "  " not in text
    assert len(found.unlabelled) == 160 and set(found.unlabelled.labels) == {-1}
    assert len(found.corpus("dvd").transfer) == 40
    assert load_amazon(tmp_path / "sorted_data_acl") == found
    tests = [set(load_amazon(tmp_path, fold).test.texts) for fold in range(10)]
    assert sum(map(len, tests)) == len(set().union(*tests)) == 320


def test_amazon_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"data must be the folder of sorted_data_acl, with neg"):
        load_amazon(tmp_path)
    write_amazon(tmp_path, 5)
    with pytest.raises(DistillError, match=r"fold must lie in \[0, 10\), got 10"):
        load_amazon(tmp_path, 10)
    bad = tmp_path / "sorted_data_acl" / "dvd" / "negative.review"
    bad.write_text("great:1 a_great:2 #label#:positive\n")  # the data set's lists of words
    with pytest.raises(DistillError, match="<review> after <review>, got none in dvd/negative.rev"):
        load_amazon(tmp_path)
    bad.write_text(review("a") + "<review>\n<title>\nb\n</title>\n</review>\n")
    with pytest.raises(DistillError, match="got none in review 2 of dvd/negative.review"):
        load_amazon(tmp_path)


def test_texts_of_reviews(tmp_path: Path) -> None:
    path = tmp_path / "positive.review"
    path.write_bytes(review("Caf\xe9 &quot;A &amp; B&quot;\n\t& more <i>").encode("latin-1"))
    assert read_reviews(path) == ['Caf\xe9 "A & B" & more <i>']


# ---- the user's own ------------------------------------------------------------------------------


def own_lines(separator: str = ",", label: str = "{}") -> list[str]:
    return [
        separator.join((f"text {d} {i}", label.format("ab"[i % 2]), d))
        for d in ("news", "mail", "chat")
        for i in range(20)
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_own_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"own.{kind}"
    rows = [line.split(",") for line in own_lines()]
    rows += [["text news 1", "b", "news"], ["alone", "", "mail"]]
    if kind == "jsonl":
        records = [dict(zip(("text", "label", "area"), row, strict=True)) for row in rows]
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        separator = "\t" if kind == "tsv" else ","
        path.write_text("\n".join(map(separator.join, [["text", "label", "area"], *rows])))
    found = load_domains("sentiment", path, print, column="area")
    check(found)
    assert found.domain_names == ["news", "mail", "chat"] and found.label_names == ["a", "b"]
    assert [len(part) for part in splits(found).values()] == [42, 6, 12]
    assert Counter(found.test.domains) == dict.fromkeys(range(3), 4)
    assert found.unlabelled.texts == ["alone"] and found.unlabelled.domains == [1]
    for part in splits(found).values():
        for text, label, domain in zip(part.texts, part.labels, part.domains, strict=True):
            assert text.split()[1] == found.domain_names[domain]
            assert label == int(text.split()[2]) % 2


def test_own_splits_are_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    lines = [
        f"{line},{('train', 'train', 'dev', 'test')[i % 4]}" for i, line in enumerate(own_lines())
    ]
    path.write_text("\n".join(["text,label,domain,split", *lines]))
    found = load_own_domains(path)
    check(found)
    assert [len(part) for part in splits(found).values()] == [30, 15, 15]
    for split, part in splits(found).items():
        kinds = {int(text.split()[2]) % 4 for text in part.texts}
        assert kinds == {"train": {0, 1}, "dev": {2}, "test": {3}}[split]


def test_a_text_of_two_domains_is_in_one_split(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    lines = [f"same {i},{'ab'[i % 2]},{d}" for d in ("x", "y") for i in range(30)]
    extra = [f"own {i},{'ab'[i % 2]},x" for i in range(30)]
    path.write_text("\n".join(["text,label,domain", *lines, *extra]))
    check(load_own_domains(path))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["text,label,area", "a,x,n"],
            r"have a column 'domain', got columns \['area', 'label', 't",
        ),
        (["text,label,domain", "a,x,n", "b,y,"], "name a domain in every row, got none in line 3"),
        (
            ["text,label,domain", *[f"t {i},{i % 2},n" for i in range(20)]],
            "have texts of two domains or more, got n",
        ),
        (
            ["text,label,domain", *[f"t {i},{i % 2},n" for i in range(20)], "u,1,m"],
            "have labelled rows of every domain for train, got none of m",
        ),
        (["text,label,domain", "a,x,n", "b,x,m"], "have at least two different labels"),
        (["text,label,domain"], "have at least one row"),
    ],
)
def test_own_files_that_do_not_fit(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "own.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DistillError, match=f"^data must {message}"):
        load_own_domains(path)


def test_tasks_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="task must be one of sentiment, multiemo, mnli, amazon"):
        load_domains("news", None, print)
    with pytest.raises(DistillError, match="data must name the folder of mnli, got none"):
        load_domains("mnli", None, print)
    with pytest.raises(DistillError, match="data must be a file, or be left out for sentiment"):
        load_domains("sentiment", tmp_path, print)
    write_amazon(tmp_path, 20)
    found = load_amazon(tmp_path)
    with pytest.raises(DistillError, match="domain must be one of books, dvd, electronics, kitch"):
        found.corpus("toys")
