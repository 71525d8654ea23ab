"""What a run of Meta-KD found, gathered from its completed units."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdkernels.api.distill.metakd_config import (
    META,
    PLAIN,
    TEACHERS,
    MetaKdConfig,
    loss_of,
    teacher_of,
)

TEACHER_TITLES = {
    "own": "own domain's teacher",
    "mixed": "mixed teacher",
    "meta": "meta-teacher",
}
LOSS_TITLES = {
    PLAIN: "TinyBERT-KD",
    META: "Meta-KD",
    "no-weights": "Meta-KD without weights",
    "no-transfer": "Meta-KD without transferable term",
    "no-scores": "Meta-KD without prototype scores",
    "no-hidden": "Meta-KD without hidden states",
    "no-attention": "Meta-KD without attention",
    "code": "Meta-KD as released",
}
HEADLINE = f"meta-{META}"


def title_of(arm: str) -> str:
    """An arm's name for people."""
    return f"{TEACHER_TITLES[teacher_of(arm)]}, {LOSS_TITLES[loss_of(arm)]}"


def slug(domain: str) -> str:
    """A domain's name in files."""
    return re.sub(r"[^\w.-]", "_", domain)


def teacher_unit(kind: str, domain: str) -> str:
    """Name of a teacher's unit."""
    return f"teacher-{kind}" + (f"-{slug(domain)}" if domain else "")


def student_unit(arm: str, domain: str, share: float, seed: int) -> str:
    """Name of a student's unit."""
    return f"{arm}-{slug(domain)}-share{share:g}-seed{seed}"


@dataclass(frozen=True)
class Arm:
    """One arm at one share of the labels.

    Attributes:
        name: Teacher and loss.
        share: Share of a domain's labels.
        test: Test accuracy of each seed, by domain.
        dev: Likewise.
    """

    name: str
    share: float
    test: Mapping[str, Sequence[float]]
    dev: Mapping[str, Sequence[float]]

    @property
    def title(self) -> str:
        """Its name for people."""
        return title_of(self.name)

    @property
    def average(self) -> list[float]:
        """Mean over domains of each seed."""
        return [statistics.mean(same) for same in zip(*self.test.values(), strict=True)]


@dataclass(frozen=True)
class Difference:
    """One arm against another, seed by seed, over the average of the domains.

    Attributes:
        arm: Better where positive.
        mean: Of the differences.
        interval: Half the width of its 95 % confidence interval; None for one seed.
        p: Of the paired t-test, two-sided; None for one seed.
        wins: Pairs of domain and seed where it is better.
        pairs: How many such pairs there are.
    """

    arm: str
    against: str
    share: float
    mean: float
    interval: float | None
    p: float | None
    wins: int
    pairs: int


@dataclass(frozen=True)
class Teacher:
    """A teacher's test accuracy in each domain; of several ``own`` ones each in its own."""

    kind: str
    test: Mapping[str, float]
    elsewhere: float | None  # of own ones: mean over the other domains


@dataclass(frozen=True)
class MetaKdResults:
    """Everything the tables, the picture and the report show."""

    domains: list[str]
    teachers: list[Teacher]
    arms: list[Arm]
    scores: Mapping[str, float]
    kept: Mapping[str, str | None]
    phases: Mapping[str, float]

    @property
    def shares(self) -> list[float]:
        """Shares of the labels, the largest first."""
        return sorted({arm.share for arm in self.arms}, reverse=True)

    def at(self, share: float) -> list[Arm]:
        """The arms at a share."""
        return [arm for arm in self.arms if arm.share == share]

    @property
    def differences(self) -> list[Difference]:
        """Meta-KD against every other arm, and against plain distillation from each teacher."""
        found = []
        for share in self.shares:
            arms = {arm.name: arm for arm in self.at(share)}
            pairs = [(HEADLINE, name) for name in arms if name != HEADLINE]
            pairs += [(f"{kind}-{META}", f"{kind}-{PLAIN}") for kind in TEACHERS if kind != "meta"]
            pairs += [(f"meta-{PLAIN}", f"mixed-{PLAIN}")]
            for one, other in pairs:
                if one in arms and other in arms:
                    found.append(_difference(arms[one], arms[other]))
        return found


def _difference(arm: Arm, other: Arm) -> Difference:
    by_seed = [a - b for a, b in zip(arm.average, other.average, strict=True)]
    both = [
        (a, b)
        for domain in arm.test
        for a, b in zip(arm.test[domain], other.test[domain], strict=True)
    ]
    mean, interval, p = statistics.mean(by_seed), None, None
    # Equal differences but for rounding have no spread to test against.
    if len(by_seed) > 1 and statistics.stdev(by_seed) > 1e-9:
        from scipy import stats

        test = stats.ttest_1samp(by_seed, 0.0)
        low, high = test.confidence_interval(0.95)
        interval, p = float(high - low) / 2, float(test.pvalue)
    wins = sum(a > b for a, b in both)
    return Difference(arm.name, other.name, arm.share, mean, interval, p, wins, len(both))


def gather(
    units: Mapping[str, dict[str, Any]],
    config: MetaKdConfig,
    names: Sequence[str],
    students: Sequence[str],
) -> MetaKdResults:
    """Builds the results from the units' result files.

    Args:
        units: Result of every unit by name.
        config: The run's configuration.
        names: All domains.
        students: Those that there are students of.
    """
    arms, phases = [], {"prototype scores": units["scores"]["seconds"]}
    teachers = []
    for kind in TEACHERS:
        if any(teacher_of(arm) == kind for arm in config.arms):
            made = {d: units[teacher_unit(kind, d)] for d in (students if kind == "own" else [""])}
            teachers.append(_teacher(kind, made, names))
            phases[TEACHER_TITLES[kind]] = sum(unit["seconds"] for unit in made.values())
    for share in config.share:
        for name in config.arms:
            chosen = {
                domain: [units[student_unit(name, domain, share, seed)] for seed in config.seeds]
                for domain in students
            }
            figures = {
                split: {domain: [unit[split] for unit in made] for domain, made in chosen.items()}
                for split in ("test", "dev")
            }
            arms.append(Arm(name, share, figures["test"], figures["dev"]))
            spent = sum(unit["seconds"] for made in chosen.values() for unit in made)
            phases[title_of(name)] = phases.get(title_of(name), 0.0) + spent
    mean, kept = units["scores"]["mean"], units["students"]["kept"]
    return MetaKdResults(list(students), teachers, arms, mean, kept, phases)


def _teacher(kind: str, made: Mapping[str, dict[str, Any]], names: Sequence[str]) -> Teacher:
    if kind != "own":
        return Teacher(kind, made[""]["test"], None)
    others = [unit["test"][name] for own, unit in made.items() for name in names if name != own]
    own = {domain: unit["test"][domain] for domain, unit in made.items()}
    return Teacher(kind, own, statistics.mean(others) if others else None)


def mean_text(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, as in tables."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def as_json(found: MetaKdResults) -> dict[str, Any]:
    """The results for ``results.json``."""
    return {
        "metric": "accuracy (%)",
        "domains": found.domains,
        "scores": found.scores,
        "teachers": {t.kind: {"test": t.test, "elsewhere": t.elsewhere} for t in found.teachers},
        "arms": [
            {"arm": a.name, "share": a.share, "test": a.test, "dev": a.dev, "average": a.average}
            for a in found.arms
        ],
        "differences": [vars(difference) for difference in found.differences],
        "students": found.kept,
        "seconds": found.phases,
    }
