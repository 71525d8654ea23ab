"""One op = one name in every room; adding one edits no central list but ``ops/__init__``."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from kdkernels import ops
from kdkernels._op import Primitive

ROOT = Path(__file__).parents[1]
OPS = ops.__all__
# Ops made of another op's kernels and the library's GEMMs.
COMPOSED = [
    op for op in OPS if hasattr(importlib.import_module(f"kdkernels.ops.{op}.op"), "COMPOSED_OF")
]


def test_every_folder_is_an_op_and_is_listed() -> None:
    folders = {path.parent.name for path in (ROOT / "kdkernels" / "ops").glob("*/op.py")}
    assert folders == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_room_is_there(op: str) -> None:
    rooms = [
        f"kdkernels/ops/{op}/op.py",
        f"kdkernels/ops/{op}/reference.py",
        f"kdkernels/ops/{op}/README.md",
        f"tests/ops/test_{op}.py",
        f"bench/cases/{op}.py",
    ]
    if op not in COMPOSED:
        rooms += [
            f"kdkernels/ops/{op}/triton_kernels.py",
            f"csrc/{op}/{op}_cpu.cpp",
            f"csrc/{op}/{op}_cuda.cu",
        ]
    for room in rooms:
        assert (ROOT / room).is_file(), f"{op} has no {room}"


@pytest.mark.parametrize("op", OPS)
def test_every_primitive_has_every_backend_and_the_op_explains_itself(op: str) -> None:
    module = importlib.import_module(f"kdkernels.ops.{op}.op")
    package = importlib.import_module(f"kdkernels.ops.{op}")
    primitives = [value for value in vars(module).values() if isinstance(value, Primitive)]
    own = [p for p in primitives if p.name.startswith(op)]
    assert own
    for primitive in own:
        assert {"native", "triton"} <= set(primitive.backends), primitive.name
    assert callable(package.unsupported)


def test_every_native_source_belongs_to_an_op() -> None:
    for pattern in ("*_cpu.cpp", "*_cuda.cu"):
        for path in (ROOT / "csrc").glob(f"*/{pattern}"):
            assert path.parent.name in {*OPS, "common"}, path


def test_public_losses_are_documented() -> None:
    import kdkernels

    for name in kdkernels.__all__:
        value = getattr(kdkernels, name)
        if callable(value) and getattr(value, "__module__", "").startswith("kdkernels"):
            assert value.__doc__, name


def test_readme_lists_every_op() -> None:
    text = (ROOT / "README.md").read_text()
    for op in OPS:
        if op != "scale_grad":  # an inner primitive, no user function
            assert op in text
