"""A classification task whose texts belong to domains: disjoint splits of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kdkernels.api.distill.data import Corpus, Labelled
from kdkernels.api.distill.errors import require

SPLITS = ("train", "dev", "test")
NO_LABEL = -1


class Row(NamedTuple):
    """A text, or a pair of texts, of a domain."""

    domain: str
    text: str
    label: str | None = None
    pair: str | None = None


@dataclass(frozen=True)
class DomainTexts:
    """Texts with numbers of classes and domains.

    Attributes:
        texts: The texts; of pairs the first ones.
        pairs: The second ones; None where texts stand alone.
        labels: Class of each; -1 where it is not known.
        domains: Domain of each.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[int]
    domains: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def of(self, domain: int) -> Labelled:
        """The texts of one domain."""
        rows = [row for row, number in enumerate(self.domains) if number == domain]
        pairs = None if self.pairs is None else [self.pairs[row] for row in rows]
        texts, labels = [self.texts[row] for row in rows], [self.labels[row] for row in rows]
        return Labelled(texts, labels, pairs)


@dataclass(frozen=True)
class DomainExamples:
    """A task over several domains, whose classes are the same.

    Attributes:
        train: The labels there are.
        dev: Held out to choose by.
        test: Held out to score.
        unlabelled: Texts without labels.
        domain_names: Names of the domains, by number.
        label_names: Names of the classes, by number.
        source: One sentence on where the texts come from.
    """

    train: DomainTexts
    dev: DomainTexts
    test: DomainTexts
    unlabelled: DomainTexts
    domain_names: list[str]
    label_names: list[str]
    source: str

    def corpus(self, domain: str) -> Corpus:
        """The task of one domain.

        Raises:
            DistillError: There is no such domain.
        """
        known = f"be one of {', '.join(self.domain_names)}"
        require(domain in self.domain_names, "domain", known, repr(domain))
        number = self.domain_names.index(domain)
        train, dev, test = (getattr(self, split).of(number) for split in SPLITS)
        transfer = self.unlabelled.of(number).texts
        return Corpus(train, dev, test, transfer, self.label_names, self.source)

    def corpora(self) -> dict[str, Corpus]:
        """The task of each domain, in the order of their numbers."""
        return {name: self.corpus(name) for name in self.domain_names}


def gather(
    splits: Mapping[str, Iterable[Row]],
    domain_names: Sequence[str],
    label_names: Sequence[str],
    source: str,
    needed: Sequence[str] = SPLITS,
) -> DomainExamples:
    """Numbers the domains and classes of rows that a reader has found.

    Args:
        splits: The rows of ``train``, ``dev`` and ``test``, perhaps of ``unlabelled``.
        domain_names: All domains.
        label_names: All classes.
        source: One sentence on where they come from.
        needed: Splits in which each domain must have texts.

    Raises:
        DistillError: A domain has no text in one of those splits, or there is one domain only.
    """
    contract = "have texts of two domains or more"
    require(len(domain_names) >= 2, "data", contract, ", ".join(domain_names) or "none")
    domains = {name: number for number, name in enumerate(domain_names)}
    classes = {name: number for number, name in enumerate(label_names)}

    def numbered(rows: Iterable[Row]) -> DomainTexts:
        rows = list(rows)
        pairs = [row.pair for row in rows if row.pair is not None]
        return DomainTexts(
            [row.text for row in rows],
            pairs if pairs else None,
            [NO_LABEL if row.label is None else classes[row.label] for row in rows],
            [domains[row.domain] for row in rows],
        )

    parts = {name: numbered(splits[name]) for name in SPLITS}
    for split in needed:
        there = set(parts[split].domains)
        missing = [name for name, number in domains.items() if number not in there]
        contract = f"have labelled rows of every domain for {split}"
        require(not missing, "data", contract, f"none of {', '.join(missing)}")
    unlabelled = numbered(splits.get("unlabelled", ()))
    names = list(domain_names), list(label_names)
    return DomainExamples(parts["train"], parts["dev"], parts["test"], unlabelled, *names, source)
