"""Checks that the imports of the product have no cycles: no two modules import each other, directly or through other
modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.fakes.server_process import ROOT


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for part in ("registry", "storage") for path in (ROOT / part).rglob("*.py")}


def imported_modules(path: Path) -> Iterator[str]:
    """Yields the modules of the product that a file imports: at its top, in functions, and for type annotations
    only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in MODULES:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in MODULES else node.module


def test_imports_have_no_cycles() -> None:
    """The imports have no cycle, so each module can be read, tested and moved without the modules that import it."""
    graph = {name: {other for other in imported_modules(path) if other != name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_imports_are_read_from_the_files() -> None:
    """`MODULES` has the modules of the product, and `imported_modules` finds their imports. Otherwise the test of
    cycles would check nothing."""
    assert "registry.http.exchange" in set(imported_modules(MODULES["registry.http.blobs"]))
    assert len(MODULES) > 150
