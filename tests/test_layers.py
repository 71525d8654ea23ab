"""Imports point one way: kdkernels.api -> kdkernels.ops -> kdkernels._*; an op imports no other
op's kernels.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _module(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    renamed = {"python_api": ["kdkernels", "api"], "bench": ["kdkernels", "bench"]}
    parts = renamed.get(parts[0], [parts[0]]) + parts[1:]
    return ".".join(parts).removesuffix(".__init__")


def _imports(path: Path) -> Iterator[str]:
    package = _module(path) if path.name == "__init__.py" else _module(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            if base != "kdkernels":  # the names imported from the façade tell the layer
                yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _room(module: str) -> str:
    """Which layer a module belongs to."""
    parts = module.split(".")
    if parts[0] != "kdkernels" or len(parts) < 2:
        return "facade" if module == "kdkernels" else "outside"
    return "machinery" if parts[1].startswith("_") else parts[1]


ALLOWED = {
    "machinery": {"machinery", "outside"},
    "ops": {"ops", "machinery", "outside"},
    "api": {"api", "ops", "machinery", "outside", "bench"},
    "bench": {"bench", "api", "ops", "machinery", "outside", "facade"},
}
FILES = sorted(
    path
    for folder in ("kdkernels", "python_api", "bench")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "kdkernels" / "__init__.py"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = _module(path)
    room = _room(module)
    if module == "kdkernels.__main__" or room == "outside":
        return
    for target in _imports(path):
        layer = _room(target)
        facade_from_above = layer == "facade" and room in ("api", "bench")
        assert layer in ALLOWED[room] or facade_from_above, f"{module} imports {target}"
        assert "python_api" not in target.split("."), f"{module} imports {target}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if "ops" in p.relative_to(ROOT).parts], ids=lambda p: str(p.name)
)
def test_an_op_uses_only_the_contract_of_another(path: Path) -> None:
    own = _module(path).split(".")[:3]
    for target in _imports(path):
        parts = target.split(".")
        if parts[:2] == ["kdkernels", "ops"] and len(parts) > 2 and parts[:3] != own:
            # What is one's definition, or launch, may be made of another's.
            contract = ("op", "spec", path.stem)
            shared = parts[2] == "_shared"
            assert shared or len(parts) == 3 or parts[3] in contract, f"{path} imports {target}"
