"""What a run that compares arms found, gathered from its completed units."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdkernels.api.distill.results import TEACHER, unit_name

TITLES = {
    TEACHER: "teacher",
    "ft": "fine-tuning",
    "swa": "SWA",
    "kd": "distilled",
    "kd-swa": "distilled, SWA",
    "diito": "distilled, DIITO",
    "kd-time": "distilled, same time",
}
# Which arm each one is compared with: it differs in one thing.
AGAINST = {"swa": "ft", "kd": "ft", "kd-swa": "kd", "diito": "kd", "kd-time": "diito"}


def title_of(name: str) -> str:
    """An arm's name for people."""
    return TITLES.get(name, name)


Figures = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Arm:
    """One arm over its seeds.

    Attributes:
        name: As in ``TITLES``, or what it is called in tables too.
        metric: The figure that chooses.
        units: The result of each seed.
    """

    name: str
    metric: str
    units: Sequence[Mapping[str, Any]]

    @property
    def title(self) -> str:
        """Its name for people."""
        return title_of(self.name)

    @property
    def averages(self) -> list[str]:
        """Keys of the averages, none of an arm without."""
        return list(self.units[0]["averages"])

    def of(self, figures: str, split: str) -> list[float]:
        """A figure of each seed: ``kept`` (what the arm gives), ``live``, or that of an average."""
        return [self._figures(unit, figures)[split][self.metric] for unit in self.units]

    @property
    def test(self) -> list[float]:
        """The test figure of each seed."""
        return self.of("kept", "test")

    @property
    def curves(self) -> list[list[Mapping[str, float]]]:
        """The points of each seed while training."""
        return [list(unit["curve"]) for unit in self.units]

    def other(self, name: str) -> list[float]:
        """A further test figure of each seed."""
        return [unit["kept"]["test"][name] for unit in self.units]

    @staticmethod
    def _figures(unit: Mapping[str, Any], figures: str) -> Figures:
        found: Figures = unit[figures] if figures in ("kept", "live") else unit["averages"][figures]
        return found


@dataclass(frozen=True)
class Difference:
    """One arm against another, seed by seed.

    Attributes:
        arm: Better where positive, whichever way the figure goes.
        mean: Of the differences.
        interval: Half the width of its 95 % confidence interval; None for one seed.
        p: Of the paired t-test, two-sided; None for one seed.
    """

    arm: str
    against: str
    mean: float
    interval: float | None
    p: float | None


@dataclass(frozen=True)
class ArmResults:
    """Everything the tables, the picture and the report show.

    Attributes:
        pairs: Which arms are compared, each with another one.
    """

    arms: list[Arm]
    higher_is_better: bool
    phases: dict[str, float]
    best: str
    pairs: Sequence[tuple[str, str]] = tuple(AGAINST.items())

    @property
    def metric(self) -> str:
        """The figure that chooses."""
        return self.arms[0].metric

    def arm(self, name: str) -> Arm | None:
        """An arm, if the run has it."""
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def plain(self) -> bool:
        """Whether all there is is fine-tuning."""
        return [arm.name for arm in self.arms] == ["ft"]

    @property
    def trained(self) -> list[Arm]:
        """The arms, without the teacher."""
        return [arm for arm in self.arms if arm.name != TEACHER]

    @property
    def differences(self) -> list[Difference]:
        """Each arm against the one it is compared with."""
        found = []
        for name, against in self.pairs:
            arm, other = self.arm(name), self.arm(against)
            if arm is not None and other is not None:
                found.append(self._difference(arm, other))
        return found

    def _difference(self, arm: Arm, other: Arm) -> Difference:
        sign = 1.0 if self.higher_is_better else -1.0
        by_seed = [sign * (a - b) for a, b in zip(arm.test, other.test, strict=True)]
        mean = statistics.mean(by_seed)
        if len(by_seed) < 2 or statistics.stdev(by_seed) == 0:
            return Difference(arm.name, other.name, mean, None, None)
        from scipy import stats

        test = stats.ttest_1samp(by_seed, 0.0)
        low, high = test.confidence_interval(0.95)
        return Difference(arm.name, other.name, mean, float(high - low) / 2, float(test.pvalue))


def mean_text(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, as in tables."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def gather(
    units: Mapping[str, dict[str, Any]],
    arms: Sequence[str],
    seeds: Sequence[int],
    metric: str,
    higher_is_better: bool,
) -> ArmResults:
    """Builds the results from the units' result files.

    Args:
        units: Result of every unit by name.
        arms: The run's arms, in order.
        seeds: The run's seeds.
        metric: The figure that chooses.
        higher_is_better: Whether more of it is better.
    """
    found, phases = [], {}
    if TEACHER in units:
        found.append(Arm(TEACHER, metric, [units[TEACHER]]))
        phases[TEACHER] = units[TEACHER]["seconds"]
    for name in arms:
        chosen = [units[unit_name(name, seed)] for seed in seeds]
        found.append(Arm(name, metric, chosen))
        phases[title_of(name)] = sum(unit["seconds"] for unit in chosen)
    return ArmResults(found, higher_is_better, phases, units["student"]["best"])


def as_json(found: ArmResults) -> dict[str, Any]:
    """The results for ``results.json``."""
    return {
        "metric": found.metric,
        "arms": {
            arm.name: {
                "test": arm.test,
                "figures": {name: arm.other(name) for name in arm.units[0]["kept"]["test"]},
                "dev": arm.of("kept", "dev"),
                "live_test": arm.of("live", "test"),
                "averages": {
                    key: {split: arm.of(key, split) for split in ("dev", "test")}
                    for key in arm.averages
                },
                "curves": arm.curves,
            }
            for arm in found.arms
        },
        "differences": [vars(difference) for difference in found.differences],
        "student": found.best,
        "seconds": found.phases,
    }
