"""A text classification task: disjoint splits, with labels and without."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kdkernels.api.distill.errors import require

# The splits are part of the task: they stay the same whatever the training seed.
SPLIT_SEED = 2014

Item = TypeVar("Item")


@dataclass(frozen=True)
class Labelled:
    """Texts with class numbers; of pairs of texts ``pairs`` are the second ones."""

    texts: list[str]
    labels: list[int]
    pairs: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, count: int | None) -> Labelled:
        """The first ``count`` texts; all of them for None."""
        pairs = None if self.pairs is None else self.pairs[:count]
        return Labelled(self.texts[:count], self.labels[:count], pairs)


@dataclass(frozen=True)
class Corpus:
    """A task: disjoint splits and the names of its classes.

    Attributes:
        train: The labels there are.
        dev: Held out for the curves and for choosing which seed's student to keep.
        test: Held out for the final table.
        transfer: Texts without labels, for the teacher to label.
        label_names: Names of the classes, by number.
        source: One sentence on where the texts come from.
    """

    train: Labelled
    dev: Labelled
    test: Labelled
    transfer: list[str]
    label_names: list[str]
    source: str

    def relabelled(self, names: list[str]) -> Corpus:
        """The same task with its classes numbered in the order of ``names``."""
        number = [names.index(name) for name in self.label_names]

        def renumber(part: Labelled) -> Labelled:
            return Labelled(part.texts, [number[label] for label in part.labels], part.pairs)

        return dataclasses.replace(
            self,
            train=renumber(self.train),
            dev=renumber(self.dev),
            test=renumber(self.test),
            label_names=names,
        )


@dataclass(frozen=True)
class Limits:
    """How much of a corpus to use; None means all. ``exact`` makes too large a number an error."""

    labels: int | None = None
    transfer: int | None = None
    test: int | None = None
    exact: bool = True


def limit_transfer(texts: list[str], limits: Limits) -> list[str]:
    """The first ``limits.transfer`` texts; asking for more than there are is an error."""
    if limits.transfer is not None and limits.exact:
        contract = f"be at most {len(texts)}, the unlabelled texts there are"
        require(limits.transfer <= len(texts), "transfer", contract, limits.transfer)
    return texts[: limits.transfer]


def divide(
    items: Sequence[Item], group: Callable[[Item], str], shares: Sequence[float]
) -> list[list[Item]]:
    """Splits examples at random, always in the same way; those of one group stay together.

    Args:
        items: The examples.
        group: What must not be on two sides.
        shares: How much of the examples each part but the first gets, at least.

    Returns:
        The rest, then one part for each share, each in a random order.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(group(item), []).append(item)
    shuffler = random.Random(SPLIT_SEED)
    order = sorted(groups)
    shuffler.shuffle(order)
    parts: list[list[Item]] = []
    for share in shares:
        part: list[Item] = []
        while order and len(part) < share * len(items):
            part += groups[order.pop()]
        parts.append(part)
    parts.insert(0, [item for name in order for item in groups[name]])
    for part in parts:
        shuffler.shuffle(part)
    return parts
