"""Tables, verdict and picture of a run of sparse teachers."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdkernels.api.distill import plot
from kdkernels.api.distill.arm_report import DIFFERENCE_COLUMNS, difference_cells, findings
from kdkernels.api.distill.arm_results import Arm, ArmResults, as_json, mean_text
from kdkernels.api.distill.report import closing
from kdkernels.api.distill.results import TEACHER
from kdkernels.api.distill.stark_config import PLAIN, Cut, StarkConfig
from kdkernels.api.distill.store import write_file, write_text
from kdkernels.api.distill.tables import markdown_table, rich_table
from kdkernels.api.distill.task import Task
from kdkernels.api.distill.train import Runtime

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

COLOURS = {PLAIN: "#555555", "stark": "#0072B2", "random": "#E69F00", TEACHER: "#CC79A7"}


@dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
        config: Its configuration.
        results: Students of every arm.
        cuts: The arms by name.
        teachers: Figures and size of the dense teacher and of those that scores cut, by arm.
        speed: How much faster than the dense one each teacher of the first lam is.
        task: What was learnt.
        runtime: Device and precision.
    """

    config: StarkConfig
    results: ArmResults
    cuts: Mapping[str, Cut]
    teachers: Mapping[str, Mapping[str, Any]]
    speed: Mapping[str, Any]
    task: Task[Any]
    runtime: Runtime

    def _arm(self, kind: str, level: float, lam: float | None = None) -> Arm | None:
        return self.results.arm(Cut(kind, level, lam).name)

    @property
    def _levels(self) -> list[float]:
        return sorted({cut.level for cut in self.cuts.values() if cut.level > 0})

    def _curve(self, kind: str, lam: float | None = None) -> list[Arm]:
        """The arms of a kind by level."""
        found = (self._arm(kind, level, lam) for level in self._levels)
        return [arm for arm in found if arm is not None]

    def _best(self, arms: Sequence[Arm]) -> Arm:
        """The level with the best mean dev figure; of equal ones the lowest."""
        sign = 1 if self.results.higher_is_better else -1
        return max(arms, key=lambda arm: sign * statistics.mean(arm.of("kept", "dev")))

    @cached_property
    def chosen(self) -> ArmResults:
        """The results, where the levels that dev chose are compared with the other arms."""
        pairs = []
        for lam in self.config.lams if "stark" in self.config.arms else ():
            best = self._best(self._curve("stark", lam))
            pairs.append((best.name, PLAIN))
            other = self._arm("random", self.cuts[best.name].level)
            if other is not None:
                pairs.append((best.name, other.name))
        if "random" in self.config.arms:
            pairs.append((self._best(self._curve("random")).name, PLAIN))
        return dataclasses.replace(self.results, pairs=tuple(pairs))

    def write(self, folder: Path) -> None:
        """Writes the picture, the report and the results into the run's folder."""
        write_file(folder / "levels.png", self._save_plot)
        results = as_json(self.chosen) | {"teachers": self.teachers, "speed": self.speed}
        write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
        write_text(folder / "report.md", self.markdown())

    def show(self, console: Console, folder: Path) -> None:
        """Prints the tables and where everything lies."""
        title = f"{self.results.metric} by level (seeds: {len(self.config.seeds)})"
        console.print(rich_table(title, *self.table()))
        differences = [difference_cells(difference) for difference in self.chosen.differences]
        console.print(rich_table("levels chosen on dev", DIFFERENCE_COLUMNS, differences))
        for sentence in (*findings(self.chosen), self.verdict()):
            console.print(sentence, highlight=False)
        console.print(f"model:  {folder / 'student'}\nreport: {folder / 'report.md'}", markup=False)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """A line a level: the teacher, and the students of it."""
        metric, lam = self.results.metric, self.config.lams[0]
        stark, random = (kind in self.config.arms for kind in ("stark", "random"))
        columns = ["level"]
        if stark:
            columns += ["teacher\nparameters", "times as\nfast", f"teacher\ntest {metric}"]
            columns += [f"student\ntest {metric}", f"student\ndev {metric}"]
        if random:
            columns += [f"cut at random:\nstudent\ntest {metric}", "student\ndev"]
        lines = []
        for level in (0.0, *self._levels):
            cut = Cut("stark", level, lam) if level else Cut(PLAIN)
            cells = [f"{level:.0%}"]
            if stark:
                teacher = self.teachers[cut.name]
                cells += [
                    f"{teacher['parameters'] / 1e6:.2f} M",
                    f"{self.speed['faster'][cut.name]:.2f}",
                    f"{teacher['kept']['test'][metric]:.2f}",
                    *self._student(self.results.arm(cut.name)),
                ]
            if random:
                cells += self._student(self._arm("random", level)) if level else ["-", "-"]
            lines.append(tuple(cells))
        if not stark:
            plain = self._student(self.results.arm(PLAIN))
            lines[0] = (lines[0][0], *plain)
        return tuple(columns), lines

    @staticmethod
    def _student(arm: Arm | None) -> list[str]:
        assert arm is not None
        return [mean_text(arm.test), mean_text(arm.of("kept", "dev"))]

    def verdict(self) -> str:
        """Which teacher dev chooses, the dense one among them."""
        best = self._best([self.results.arm(name) for name in self.cuts])  # type: ignore[misc]
        if best.name == PLAIN:
            return "Of all teachers, the dense one is the best on dev: no level is worth its loss."
        return f"Of all teachers, the dense one among them, that of {best.name} is the best on dev."

    def lams(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """A line a lam: the students of every level."""
        columns = ("lam", *(f"{level:.0%}" for level in self._levels), "chosen\non dev")
        lines = []
        for lam in self.config.lams:
            arms = self._curve("stark", lam)
            best = f"{self.cuts[self._best(arms).name].level:.0%}"
            lines.append((f"{lam:g}", *(mean_text(arm.test) for arm in arms), best))
        return columns, lines

    def markdown(self) -> str:
        """The report as Markdown."""
        config, found = self.config, self.chosen
        several = len(config.lams) > 1 and "stark" in config.arms
        each = "\n".join(
            f"- {arm.title}: " + ", ".join(f"{value:.2f}" for value in arm.test)
            for arm in found.arms
        )
        parts = [
            f"# Sparse teachers, run `{config.name}`",
            markdown_table(*self.table()),
            f"Level: share of heads and of feed-forward neurons that are cut. Mean and standard "
            f"deviation over seeds {', '.join(map(str, config.seeds))}; students of level 0 are "
            f"plain distillation. {self._how()}",
            markdown_table(DIFFERENCE_COLUMNS, list(map(difference_cells, found.differences))),
            f"Levels are those with the best mean dev figure of each kind. {self.verdict()}",
            "\n".join(findings(found)),
            "![Students' and teachers' figures by level](levels.png)",
            f"## Share of expressiveness\n\n{markdown_table(*self.lams())}" if several else "",
            f"Test figure of each seed:\n\n{each}",
            f"## Data\n\n{self.task.source}. {self._scored_by()} The dev examples chose the levels "
            f"and which model is in `student/` ({found.best}); the test examples chose nothing.",
            *closing(self.task.licences, config, found.phases, self.runtime),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _how(self) -> str:
        config = self.config
        student = (
            f"layers {', '.join(map(str, config.student_layers))} of the teacher"
            if config.student_kind == "dropped"
            else f"the teacher cut by {config.student_level:.0%} by expressiveness"
        )
        return (
            f"Students: {student}, each from the same weights. Score: {config.lams[0]:g} "
            f"expressiveness, the rest friendliness, per {config.per}. Speed: seconds of the dense "
            f"teacher by those of the cut one, the same {self.speed['tokens']:,} tokens in turn."
        )

    def _scored_by(self) -> str:
        if self.config.faithful:
            return "The dev examples gave the scores."
        share = f"{self.config.held_out:.0%}"
        return f"Further training examples ({share} of all) gave the scores and trained nothing."

    def _save_plot(self, path: Path) -> None:
        figure, (students, teachers) = plot.panels()
        self._draw_students(students)
        self._draw_teachers(teachers)
        figure.savefig(path, dpi=150)

    def _draw_students(self, axes: Axes) -> None:
        """Test figures by level: a line through the means, a dot a seed."""
        plain = self.results.arm(PLAIN)
        assert plain is not None
        axes.axhline(statistics.mean(plain.test), color=COLOURS[PLAIN], linestyle="--", zorder=1)
        axes.scatter([0.0] * len(plain.test), plain.test, s=14, color=COLOURS[PLAIN], label="dense")
        names = [("stark", lam) for lam in self.config.lams] + [("random", None)]
        for i, (kind, lam) in enumerate(names):
            arms = self._curve(kind, lam)
            if not arms:
                continue
            levels = [100 * self.cuts[arm.name].level for arm in arms]
            label = kind if lam is None else f"StarK, lam {lam:g}"
            style = {"color": COLOURS[kind], "alpha": 1.0 if i in (0, len(names) - 1) else 0.5}
            means = [statistics.mean(arm.test) for arm in arms]
            axes.plot(levels, means, marker="o", ms=4, label=label, **style)  # type: ignore[arg-type]
            for level, arm in zip(levels, arms, strict=True):
                axes.scatter([level] * len(arm.test), arm.test, s=6, **style)  # type: ignore[arg-type]
        axes.set(xlabel="level: share cut of the teacher, %", ylabel=f"test {self.results.metric}")
        axes.set_title("students (dots: seeds; dashed: plain)", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)

    def _draw_teachers(self, axes: Axes) -> None:
        """Test figure and speed of the teachers by level."""
        lam = self.config.lams[0]
        names = [PLAIN, *(arm.name for arm in self._curve("stark", lam))]
        levels = [100 * self.cuts[name].level for name in names]
        figures = [self.teachers[name]["kept"]["test"][self.results.metric] for name in names]
        axes.plot(levels, figures, marker="o", ms=4, color=COLOURS[TEACHER], label="test figure")
        axes.set(xlabel="level, %", ylabel=f"teacher's test {self.results.metric}")
        right = axes.twinx()
        right.spines["top"].set_visible(False)
        faster = [self.speed["faster"][name] for name in names]
        right.plot(levels, faster, marker="s", ms=4, color=COLOURS["stark"], label="speed")
        right.set_ylabel("times as fast as dense")
        lines = [*axes.get_lines(), *right.get_lines()]
        axes.legend(handles=lines, frameon=False, fontsize=8, loc="upper center")
        axes.set_title("teachers", loc="left", fontsize=10)
