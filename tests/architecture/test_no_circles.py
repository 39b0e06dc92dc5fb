"""Checks that the imports of the product have no cycles: no two modules import each other, directly or through other
modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.architecture.product_code import MODULES, nodes_of
from tests.fakes.server_process import ROOT


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


PATHS = {module_name(path): path for path in MODULES}
"""The path of each module of the product, by the module's name."""


def imported_modules(path: Path) -> Iterator[str]:
    """Yields the modules of the product that a file imports: at its top, in functions, and for type annotations
    only."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in PATHS)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in PATHS:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in PATHS else node.module


def test_imports_have_no_cycles() -> None:
    """The imports have no cycle, so each module can be read, tested and moved without the modules that import it."""
    graph = {name: {other for other in imported_modules(path) if other != name} for name, path in PATHS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_imports_are_read_from_the_files() -> None:
    """`PATHS` has the modules of the product, and `imported_modules` finds their imports. Otherwise the test of
    cycles would check nothing."""
    assert "registry.http.exchange" in set(imported_modules(PATHS["registry.http.blobs"]))
    assert len(PATHS) > 150
