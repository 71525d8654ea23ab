"""What a shell completes the values of options with.

A shell asks on every Tab, so nothing here imports torch: names that live in modules which do are
written out again, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import kdkernels

Complete = Callable[[str], list[str]]

OBJECTIVES = ("classification", "lm")
RECIPES = ("tinybert", "pkd", "minilm", "distilbert")
PRECISIONS = ("auto", "bf16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
ARMS = (
    *("ft", "swa", "kd", "kd-swa", "diito", "kd-time", "stark", "random"),
    *("own-tinybert", "own-metakd", "mixed-tinybert", "mixed-metakd"),
    *("meta-tinybert", "meta-metakd", "meta-no-weights", "meta-no-transfer", "meta-no-scores"),
    *("meta-no-hidden", "meta-no-attention", "meta-code"),
)
ALIGNMENTS = ("single_middle", "middle_late", "multilayer")
BACKENDS = ("native", "triton", "reference")
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("forward", "backward", "full")
TASKS = (
    *("sentiment", "r8", "r52", "20news", "ner", "qa", "lm", "mlm", "multiemo", "amazon"),
    *("cola", "sst-2", "mrpc", "qqp", "sts-b", "mnli", "qnli", "rte", "wnli"),
)


def ops() -> tuple[str, ...]:
    """The names of all ops: the folders that hold a contract."""
    return tuple(sorted(p.parent.name for p in Path(kdkernels.__path__[0]).glob("ops/*/op.py")))


def words(*values: str) -> Complete:
    """Completes one of some values."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def listed(*values: str) -> Complete:
    """Completes the last of several values with commas between them."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        taken = before.split(",")
        return [
            before + comma + value
            for value in values
            if value.startswith(last) and value not in taken
        ]

    return complete


def op_names(incomplete: str) -> list[str]:
    """Completes the name of an op."""
    return [name for name in ops() if name.startswith(incomplete)]


def run_folders(incomplete: str) -> list[str]:
    """Completes the folder of a run: one with a log, in ``runs`` or where the word leads."""
    folder = Path(incomplete)
    places = [folder, folder.parent] if incomplete else [Path("runs")]
    logs = {log for place in places if place.is_dir() for log in place.glob("*/log.jsonl")}
    return sorted(str(log.parent) for log in logs if str(log.parent).startswith(incomplete))
