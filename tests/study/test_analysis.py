"""Statistics against scipy and by hand, and what is made of them in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from kdkernels.api.study import analysis, report
from kdkernels.api.study.analysis import Analysis, Row, analyse
from kdkernels.api.study.verdict import verdict

METRIC = "accuracy (%)"
PLAIN = [80.0, 81.0, 79.5, 80.5, 80.2]


def rows(
    arm: str,
    test: Sequence[float],
    dev: float = 80.0,
    candidate: str = "lr=0.1",
    start: str = "pretrained",
    teacher: str | None = None,
    higher: bool = True,
    task: str = "reviews",
) -> list[Row]:
    """The trials of one arm."""
    found = []
    for seed, figure in enumerate(test):
        facts = {"fit_seconds": 30.0, "pass_seconds": 2.0, "examples": 500}
        facts["figures"] = {"test": {METRIC: 90.0}}
        result: dict[str, Any] = {
            "metric": METRIC, "higher_is_better": higher, "seconds": 10.0, "memory_mb": 100.0,
            "steps_per_second": 20.0, "trained": 10, "machine": "m", "source": "s", "licences": [],
            "figures": {"dev": {METRIC: dev}, "test": {METRIC: figure}},
            "teacher": facts if teacher else None,
        }  # fmt: skip
        found.append(Row(task, "tiny", start, arm, candidate, seed, teacher, result))
    return found


def shifted(by: Sequence[float]) -> list[float]:
    return [plain + change for plain, change in zip(PLAIN, by, strict=True)]


BETTER = [2.0, 2.2, 1.9, 2.1, 2.0]
SAME = [0.05, -0.05, 0.1, -0.1, 0.02]
NOISE = [3.0, -2.0, 1.0, -3.0, 2.0]


def study(*arms: list[Row], wanted: int | None = None) -> Analysis:
    found = [row for arm in (rows("ft", PLAIN), *arms) for row in arm]
    return analyse(found, margin=0.5, level=0.05, wanted=len(found) if wanted is None else wanted)


def test_figures_are_scipys() -> None:
    found = study(rows("ls", shifted(NOISE))).cells[0].comparisons[0]
    test = stats.ttest_rel(shifted(NOISE), PLAIN)
    low, high = test.confidence_interval(0.95)
    assert found.p == found.holm == pytest.approx(test.pvalue)
    assert found.interval == pytest.approx((low, high))
    above = stats.ttest_1samp(NOISE, -0.5, alternative="greater").pvalue
    below = stats.ttest_1samp(NOISE, 0.5, alternative="less").pvalue
    assert found.tost == pytest.approx(max(above, below))
    assert found.bootstrap is not None and min(NOISE) <= found.bootstrap[0] < found.bootstrap[1]
    assert found.mean == pytest.approx(0.2) and found.seeds == 5


def test_holm_by_hand() -> None:
    made = [analysis.Comparison(n, "ft", 5, 1.0, p=p, tost=1.0) for n, p in
            (("a", 0.01), ("b", 0.04), ("c", 0.03), ("d", None))]  # fmt: skip
    found = {c.arm: c.holm for c in analysis.corrected(made, 0.05)}
    assert found == {"a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": pytest.approx(0.06),
                     "d": None}  # fmt: skip


def test_decisions() -> None:
    found = study(
        rows("ls", shifted(BETTER)),
        rows("kd", shifted([-b for b in BETTER]), teacher="teacher"),
        rows("tf_reg", shifted(SAME)),
        rows("self_kd", shifted(NOISE), teacher="self"),
    )
    decided = {c.arm: c.decision for c in found.cells[0].comparisons}
    assert decided == {
        "ls": "better", "kd": "worse", "tf_reg": "equivalent", "self_kd": "not enough evidence",
    }  # fmt: skip


def test_less_is_better_where_the_metric_says_so() -> None:
    plain = rows("ft", PLAIN, higher=False)
    lower = rows("ls", [p - 2 + d for p, d in zip(PLAIN, SAME, strict=True)], higher=False)
    found = analyse([*plain, *lower], 0.5, 0.05, 10).cells[0].comparisons[0]
    assert found.mean == pytest.approx(2.0, abs=0.01) and found.decision == "better"


@pytest.mark.parametrize("figures", [[81.0], PLAIN])
def test_nothing_to_test_with_decides_nothing(figures: list[float]) -> None:
    """One seed, or seeds that agree to the last digit."""
    found = study(rows("ls", figures)).cells[0].comparisons[0]
    assert found.p is found.tost is found.interval is None
    assert found.decision == "not enough evidence"


def test_only_seeds_of_both_count() -> None:
    found = study(rows("ls", shifted(NOISE)[:3])).cells[0].comparisons[0]
    assert found.seeds == 3 and found.mean == pytest.approx(sum(NOISE[:3]) / 3)


def test_candidates_are_chosen_on_dev_alone() -> None:
    worse_on_dev = rows("ls", shifted(BETTER), dev=70.0, candidate="label_smoothing=0.2 lr=0.1")
    better_on_dev = rows("ls", shifted(SAME), dev=75.0, candidate="label_smoothing=0.1 lr=0.1")
    arm = study([*worse_on_dev, *better_on_dev]).cells[0].arm("ls")
    assert arm.candidate == "label_smoothing=0.1 lr=0.1" and arm.candidates == 2
    assert arm.mean == pytest.approx(sum(shifted(SAME)) / 5)


def test_a_candidate_of_fewer_seeds_is_not_chosen() -> None:
    lucky = rows("ls", [99.0], dev=99.0, candidate="lr=0.2")
    assert study([*rows("ls", shifted(SAME)), *lucky]).cells[0].arm("ls").candidate == "lr=0.1"


def test_teachers_meet_the_best_without_them() -> None:
    found = study(
        rows("ls", shifted(BETTER), dev=82.0),
        rows("kd", shifted([b + 1.5 for b in BETTER[::-1]]), teacher="teacher"),
    )
    (worth,) = found.cells[0].worth
    assert (worth.arm, worth.against, worth.decision) == ("kd", "ls", "better")
    assert worth.mean == pytest.approx(1.5)
    kd = found.cells[0].arm("kd")
    assert (kd.teacher_seconds, kd.seconds) == (32.0, 42.0)
    text = verdict(found)
    assert "beats the best method without them in 1 of 1 comparisons (kd on reviews" in text
    assert "takes 3.2 times as long as training that student" in text


@pytest.mark.parametrize(
    ("arms", "wanted"),
    [
        ([SAME, SAME], "So no regulariser changes the result by 0.5 points: none is needed."),
        ([NOISE, NOISE], "there is not enough evidence that any regulariser helps, or that none"),
        ([BETTER, NOISE], "So here label regularisation helps, where named, by a; elsewhere no"),
        ([BETTER, BETTER], "So here label regularisation helps, where named, by a and b."),
        ([SAME, NOISE], "that it makes no difference is shown for 1 of 2."),
        ([[-b for b in BETTER], NOISE], "no regulariser is shown to help, and those named do harm"),
    ],
)
def test_conclusions(arms: list[list[float]], wanted: str) -> None:
    found = study(*(rows(name, shifted(by)) for name, by in zip("ab", arms, strict=True)))
    assert wanted in verdict(found)


def test_verdict_tells_initialisations_apart_and_what_is_missing() -> None:
    scratch = [*rows("ft", PLAIN, start="scratch"), *rows("ls", shifted(BETTER), start="scratch")]
    text = verdict(study(rows("ls", shifted(SAME)), scratch, wanted=30))
    assert text.startswith("20 of 30 trials are done.")
    before, after = text.split("Students trained from scratch")
    assert "Students that start pretrained: of 1 comparisons" in before
    assert "1 equivalent within ±0.5 points" in before
    assert "1 are better (ls on reviews with tiny +2.04)" in after


def test_findings_of_several_tables_come_with_their_chance() -> None:
    alone = study(rows("ls", shifted(BETTER)))
    assert "tables would still name one" not in verdict(alone)
    others = [*rows("ft", PLAIN, task="b"), *rows("ls", shifted(NOISE), task="b")]
    text = verdict(study(rows("ls", shifted(BETTER)), others))
    assert "2 tables would still name one in 10 % of such studies" in text


def test_nothing_to_compare_with_yet() -> None:
    found = analyse(rows("ls", PLAIN), 0.5, 0.05, 10)
    assert "nothing to compare yet" in verdict(found)


class Loads(HTMLParser):
    """Whatever an HTML file would load, and the numbers of its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "svg"
        if tag in ("script", "link", "img", "iframe"):
            self.found.append(tag)
        self.found += [
            value for name, value in attrs
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#")
        ]  # fmt: skip


def test_report_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    found = study(
        rows("ls", shifted(BETTER)),
        rows("kd", shifted(NOISE), teacher="teacher"),
        rows("ft", PLAIN, task="other <task>"),
    )
    report.write(tmp_path, "My study", found, ["Texts of somebody."])
    html = (tmp_path / "report.html").read_text()
    loads = Loads()
    loads.feed(html)
    assert loads.found == [] and loads.pictures == 2 and "url(http" not in html
    assert "other &lt;task&gt;" in html and "Texts of somebody." in html
    markdown = (tmp_path / "report.md").read_text()
    assert verdict(found) in markdown
    for picture in re.findall(r"\]\(([^)]+)\)", markdown):
        assert (tmp_path / picture).read_text().startswith("<svg")
    ls = next(c for c in found.cells[0].comparisons if c.arm == "ls")
    assert ls.interval is not None
    shown = f"| ls | +2.04 | {ls.interval[0]:+.2f} to {ls.interval[1]:+.2f} |"
    assert shown in markdown
    assert "| kd | 20.0 | 10.0 | 32.0 | 100 | 0.00 | 500, once |" in markdown
    assert "The teacher on reviews: test accuracy (%) 90.00." in markdown
    again = tmp_path / "again"
    again.mkdir()
    report.write(again, "My study", found, ["Texts of somebody."])
    assert (again / "report.html").read_text() == html
