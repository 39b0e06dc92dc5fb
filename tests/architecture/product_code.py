"""The modules of the product, and the nodes of their syntax trees, for the tests that check rules for the code."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from tests.fakes.server_process import ROOT

MODULES = sorted(path for part in ("registry", "storage") for path in (ROOT / part).rglob("*.py"))


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Returns all nodes of a module's syntax tree. They are cached, because to walk through all trees takes seconds and
    each test needs them."""
    return tuple(ast.walk(ast.parse(path.read_text())))


def dotted_name(node: ast.AST) -> str:
    """Returns the source text of a name such as `asyncio.run`; an empty text for any other expression. `ast.unparse`
    would take ten times as long."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted_name(node.value)):
        return f"{owner}.{node.attr}"
    return ""
