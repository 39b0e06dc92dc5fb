"""Checks that docs/en/security.md names a test for each promise, and that these tests exist."""

from __future__ import annotations

import ast
import re
from functools import cache

from tests.fakes.server_process import ROOT

PAGE = (ROOT / "docs" / "en" / "security.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@cache
def functions(path: str) -> set[str]:
    """Returns the names of the functions that a file defines at its top level."""
    return {
        found.name
        for found in ast.parse((ROOT / path).read_text()).body
        if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_the_page_names_tests() -> None:
    """The regular expression finds the names of tests in the page."""
    assert len(NAMED) > 60


def test_named_tests_exist() -> None:
    """Each test that the page names exists, and pytest can find it."""
    assert [f"{path}::{name}" for path, name in NAMED if not _is_found(path, name)] == []


def _is_found(path: str, name: str) -> bool:
    is_test = name.startswith("test_") and path.rpartition("/")[2].startswith("test_")
    return is_test and (ROOT / path).exists() and name in functions(path)


def test_each_promise_has_a_test() -> None:
    """Each row of the table of promises ends with the name of a test."""
    promises = PAGE.partition("## What is promised")[2].partition("\n## ")[0]
    rows = [row for row in promises.splitlines() if row.startswith("| ") and not row.startswith("| Promise ")]
    assert rows
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py::test_\w+` \|$", row)] == []
