"""What the results of a study say: means, paired tests over seeds, intervals, costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdkernels.api.study.config import BASELINE

BETTER, WORSE, EQUIVALENT, UNDECIDED = "better", "worse", "equivalent", "not enough evidence"
BOOTSTRAP_SAMPLES = 9999
BOOTSTRAP_SEED = 0
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """The result of one trial, with what it is of."""

    task: str
    student: str
    initialisation: str
    arm: str
    candidate: str
    seed: int
    teacher: str | None
    result: Mapping[str, Any]

    @property
    def cell(self) -> tuple[str, str, str]:
        """What arms are compared within."""
        return self.task, self.student, self.initialisation

    def figure(self, split: str) -> float:
        """The figure that counts."""
        value: float = self.result["figures"][split][self.result["metric"]]
        return value


@dataclass(frozen=True)
class Arm:
    """One arm of a cell, with the candidate that did best on dev.

    Attributes:
        name: Its name.
        candidate: Its parameters and learning rate.
        candidates: How many there were to choose from.
        rows: Its trials by seed.
        teacher: ``teacher`` or ``self`` where it learns from logits.
    """

    name: str
    candidate: str
    candidates: int
    rows: tuple[Row, ...]

    @property
    def teacher(self) -> str | None:
        """Whose logits it learns from."""
        return self.rows[0].teacher

    @property
    def seeds(self) -> dict[int, float]:
        """The test figure of each seed."""
        return {row.seed: row.figure("test") for row in self.rows}

    @property
    def mean(self) -> float:
        """Of the test figures."""
        return statistics.mean(self.seeds.values())

    @property
    def spread(self) -> float | None:
        """Their standard deviation; None for one seed."""
        return statistics.stdev(self.seeds.values()) if len(self.rows) > 1 else None

    @property
    def dev(self) -> float:
        """The mean dev figure."""
        return statistics.mean(row.figure("dev") for row in self.rows)

    def cost(self, key: str) -> float | None:
        """The mean of one of the results' numbers over seeds."""
        values = [row.result[key] for row in self.rows]
        return None if any(v is None for v in values) else statistics.mean(values)

    @property
    def teacher_seconds(self) -> float:
        """Fine-tuning a teacher and passing the examples through it once, for one model."""
        facts = [row.result["teacher"] for row in self.rows]
        return statistics.mean(
            0.0 if fact is None else fact["fit_seconds"] + fact["pass_seconds"] for fact in facts
        )

    @property
    def seconds(self) -> float:
        """Of training one model, its teacher's included."""
        return statistics.mean(row.result["seconds"] for row in self.rows) + self.teacher_seconds


@dataclass(frozen=True)
class Comparison:
    """One arm against another, seed by seed; positive where the arm is better.

    Attributes:
        arm: The arm.
        against: What it is compared with.
        seeds: How many seeds both have.
        mean: Of the differences, in points of the metric.
        interval: Its 95 % interval by Student's t. Like all that follow None for one seed, and
            for seeds that agree to the last digit: without variance there is nothing to test with.
        bootstrap: Its 95 % interval by resampling the seeds.
        p: Of the paired t-test, two-sided.
        holm: The same, corrected for the arms of the family.
        tost: Of the test that the difference is outside of the margin; small: it is inside.
        decision: ``better``, ``worse``, ``equivalent`` or ``not enough evidence``.
    """

    arm: str
    against: str
    seeds: int
    mean: float
    interval: tuple[float, float] | None = None
    bootstrap: tuple[float, float] | None = None
    p: float | None = None
    holm: float | None = None
    tost: float | None = None
    decision: str = UNDECIDED


@dataclass(frozen=True)
class Cell:
    """One task with one student and one initialisation.

    Attributes:
        arms: The arms that have results, the baseline first.
        comparisons: Each other arm against the baseline.
        worth: Each arm with a teacher against the arm without that did best on dev.
    """

    task: str
    student: str
    initialisation: str
    metric: str
    higher_is_better: bool
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    worth: tuple[Comparison, ...]

    @property
    def title(self) -> str:
        """Its name for people."""
        return f"{self.task}, {self.student}, {self.initialisation}"

    def arm(self, name: str) -> Arm:
        """An arm by name."""
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Analysis:
    """Everything that a report shows.

    Attributes:
        trials: How many results there are.
        wanted: How many trials the study has.
    """

    cells: tuple[Cell, ...]
    margin: float
    level: float
    trials: int
    wanted: int


def analyse(rows: Sequence[Row], margin: float, level: float, wanted: int) -> Analysis:
    """Compares the arms of every cell.

    The learning rate and the method's parameters of an arm are those with the best mean dev figure
    over its seeds. Holm's correction is over the arms of a cell, for the comparisons with a teacher
    over all cells.

    Args:
        rows: The results.
        margin: Half the width of what counts as no difference.
        level: Level of the tests.
        wanted: How many trials the study has.
    """
    cells = [
        _cell([row for row in rows if row.cell == cell], margin, level)
        for cell in dict.fromkeys(row.cell for row in rows)
    ]
    worth = corrected([c for cell in cells for c in cell.worth], level)
    done, begin = [], 0
    for cell in cells:
        end = begin + len(cell.worth)
        done.append(replace(cell, worth=tuple(worth[begin:end])))
        begin = end
    return Analysis(tuple(done), margin, level, len(rows), wanted)


def _cell(rows: list[Row], margin: float, level: float) -> Cell:
    sign = 1.0 if rows[0].result["higher_is_better"] else -1.0
    names = sorted(dict.fromkeys(row.arm for row in rows), key=lambda name: name != BASELINE)
    arms = [best_arm([row for row in rows if row.arm == name], sign) for name in names]
    baseline = [arm for arm in arms if arm.name == BASELINE]
    others = [arm for arm in arms if arm.name != BASELINE]
    found = [compare(arm, plain, sign, margin) for plain in baseline for arm in others]
    free = [arm for arm in arms if arm.teacher is None]
    worth = []
    if free:
        rival = max(free, key=lambda arm: sign * arm.dev)
        worth = [compare(arm, rival, sign, margin) for arm in arms if arm.teacher is not None]
    return Cell(
        *rows[0].cell,
        metric=rows[0].result["metric"],
        higher_is_better=sign > 0,
        arms=tuple(arms),
        comparisons=tuple(corrected(found, level)),
        worth=tuple(worth),
    )


def best_arm(rows: Sequence[Row], sign: float) -> Arm:
    """The candidate with the best mean dev figure, of those that have most seeds."""
    by_candidate = {
        candidate: tuple(
            sorted((r for r in rows if r.candidate == candidate), key=lambda r: r.seed)
        )
        for candidate in dict.fromkeys(row.candidate for row in rows)
    }
    arms = [
        Arm(rows[0].arm, candidate, len(by_candidate), found)
        for candidate, found in by_candidate.items()
    ]
    most = max(len(arm.rows) for arm in arms)
    return max((arm for arm in arms if len(arm.rows) == most), key=lambda arm: sign * arm.dev)


def compare(arm: Arm, other: Arm, sign: float, margin: float) -> Comparison:
    """One arm against another over the seeds that both have, not yet corrected or decided."""
    theirs = other.seeds
    by_seed = [sign * (v - theirs[seed]) for seed, v in arm.seeds.items() if seed in theirs]
    if not by_seed:
        return Comparison(arm.name, other.name, 0, 0.0)
    mean = statistics.mean(by_seed)
    found = Comparison(arm.name, other.name, len(by_seed), mean)
    if len(by_seed) < 2 or max(by_seed) == min(by_seed):
        return found
    from scipy import stats

    test = stats.ttest_1samp(by_seed, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    resampled = stats.bootstrap(
        (by_seed,),
        statistics_mean,
        n_resamples=BOOTSTRAP_SAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=BOOTSTRAP_SEED,
    ).confidence_interval
    above = stats.ttest_1samp(by_seed, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(by_seed, margin, alternative="less").pvalue
    return replace(
        found,
        interval=(float(low), float(high)),
        bootstrap=(float(resampled.low), float(resampled.high)),
        p=float(test.pvalue),
        tost=float(max(above, below)),
    )


def statistics_mean(sample: Any, axis: int = -1) -> Any:
    """The mean along an axis, as scipy calls it."""
    return sample.mean(axis=axis)


def corrected(comparisons: Sequence[Comparison], level: float) -> list[Comparison]:
    """The comparisons of one family with Holm's correction and the decisions it leads to."""
    tested = sorted(
        (i for i, c in enumerate(comparisons) if c.p is not None),
        key=lambda i: comparisons[i].p or 0.0,
    )
    adjusted: dict[int, float] = {}
    highest = 0.0
    for rank, i in enumerate(tested):
        p = comparisons[i].p
        assert p is not None
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = highest
    return [
        replace(c, holm=adjusted.get(i), decision=_decide(c, adjusted.get(i), level))
        for i, c in enumerate(comparisons)
    ]


def _decide(found: Comparison, holm: float | None, level: float) -> str:
    if holm is not None and holm < level:
        return BETTER if found.mean > 0 else WORSE
    if found.tost is not None and found.tost < level:
        return EQUIVALENT
    return UNDECIDED
