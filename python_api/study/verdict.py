"""The findings of a study in plain words, computed from the tests."""

from __future__ import annotations

from collections.abc import Sequence

from kdkernels.api.study.analysis import (
    BETTER,
    EQUIVALENT,
    UNDECIDED,
    WORSE,
    Analysis,
    Cell,
    Comparison,
)
from kdkernels.api.study.config import PRETRAINED, SCRATCH

STARTS = {PRETRAINED: "that start pretrained", SCRATCH: "trained from scratch"}
# How many comparisons are named.
NAMED = 3


def verdict(found: Analysis) -> str:
    """One paragraph: whether label regularisers help, for each initialisation, and the teacher."""
    parts = []
    if found.trials < found.wanted:
        parts.append(f"{found.trials} of {found.wanted} trials are done.")
    for initialisation in dict.fromkeys(cell.initialisation for cell in found.cells):
        cells = [cell for cell in found.cells if cell.initialisation == initialisation]
        parts.append(_of_initialisation(initialisation, cells, found))
    parts.append(_of_teachers(found))
    return " ".join(part for part in parts if part)


def _of_initialisation(initialisation: str, cells: Sequence[Cell], found: Analysis) -> str:
    named = [(cell, c) for cell in cells for c in cell.comparisons]
    students = f"Students {STARTS[initialisation]}"
    if not named:
        return f"{students}: nothing to compare yet."
    groups = {
        decision: [(cell, c) for cell, c in named if c.decision == decision]
        for decision in (BETTER, WORSE, EQUIVALENT, UNDECIDED)
    }
    seeds = sorted({c.seeds for _, c in named})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    text = (
        f"{students}: of {len(named)} comparisons with plain fine-tuning ({counted} seeds each), "
        f"{len(groups[BETTER])} are better{_names(groups[BETTER])}, "
        f"{len(groups[WORSE])} worse{_names(groups[WORSE])}, "
        f"{len(groups[EQUIVALENT])} equivalent within ±{found.margin:g} points, and for "
        f"{len(groups[UNDECIDED])} there is not enough evidence."
    )
    text = f"{text} {_conclusion(groups, len(named), found.margin)}"
    if len(cells) > 1 and (groups[BETTER] or groups[WORSE]):
        # Holm's correction holds within a cell.
        chance = 1.0 - (1.0 - found.level) ** len(cells)
        text += (
            f" (Were there no difference at all, {len(cells)} tables would still name one in "
            f"{100 * chance:.0f} % of such studies.)"
        )
    return text


def _conclusion(groups: dict[str, list[tuple[Cell, Comparison]]], count: int, margin: float) -> str:
    if groups[BETTER]:
        arms = _listed(sorted({c.arm for _, c in groups[BETTER]}))
        rest = count - len(groups[BETTER])
        tail = "; elsewhere no gain is shown" if rest else ""
        return f"So here label regularisation helps, where named, by {arms}{tail}."
    if len(groups[EQUIVALENT]) == count:
        return f"So no regulariser changes the result by {margin:g} points: none is needed."
    if len(groups[UNDECIDED]) == count:
        return "So there is not enough evidence that any regulariser helps, or that none does."
    if groups[WORSE]:
        return "So no regulariser is shown to help, and those named do harm."
    return (
        "So no regulariser is shown to help; that it makes no difference is shown for "
        f"{len(groups[EQUIVALENT])} of {count}."
    )


def _of_teachers(found: Analysis) -> str:
    named = [(cell, c) for cell in found.cells for c in cell.worth]
    if not named:
        return ""
    better = [(cell, c) for cell, c in named if c.decision == BETTER]
    costs = [(cell.arm(c.arm).teacher_seconds, cell.arm(c.against).seconds) for cell, c in named]
    ratio = sum(taught for taught, _ in costs) / max(1e-9, sum(plain for _, plain in costs))
    text = (
        f"Learning from logits, of a teacher or of the student's own copy, beats the best method "
        f"without them in {len(better)} of {len(named)} comparisons{_names(better)}"
    )
    cost = f"what gives the logits takes {ratio:.1f} times as long as training that student"
    if better:
        return f"{text}; {cost}."
    undecided = sum(c.decision == UNDECIDED for _, c in named)
    reason = f" (for {undecided} there is not enough evidence either way)" if undecided else ""
    return f"{text}{reason}; {cost}: here it is not shown to be worth that."


def _names(named: Sequence[tuple[Cell, Comparison]]) -> str:
    """The largest of the comparisons, in brackets."""
    if not named:
        return ""
    largest = sorted(named, key=lambda pair: -abs(pair[1].mean))
    texts = [f"{c.arm} on {cell.task} with {cell.student} {c.mean:+.2f}" for cell, c in largest]
    more = [f"{len(texts) - NAMED} more"] if len(texts) > NAMED else []
    return f" ({_listed([*texts[:NAMED], *more])})"


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
