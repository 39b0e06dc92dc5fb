"""Checks that a class name of the product has one meaning."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tests.architecture.product_code import MODULES, nodes_of
from tests.fakes.server_process import ROOT


def modules_by_class_name(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Returns, for each class name, the modules that define a class with this name. Finds also classes inside functions
    and inside other classes. A module that defines two such classes is listed twice."""
    modules = defaultdict(list)
    for path in paths:
        for node in nodes_of(path):
            if isinstance(node, ast.ClassDef):
                modules[node.name].append(path.relative_to(ROOT).as_posix())
    return modules


def test_no_two_classes_have_the_same_name() -> None:
    """No two classes of the product have the same name, so whoever reads or searches for a name finds one meaning. A
    Protocol is named for what it asks of an object. So its name differs from that of the class that implements it."""
    modules = modules_by_class_name(MODULES)
    assert {name: places for name, places in modules.items() if len(places) > 1} == {}
    assert len(modules) > 500, "the classes of the product were not found"
