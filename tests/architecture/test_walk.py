"""docs/walk.md leads to code that exists."""

from __future__ import annotations

import importlib
import re
from functools import reduce

import pytest

from tests.fakes.server_process import ROOT

STEPS = sorted(set(re.findall(r"`((?:registry|storage)[\w.]*):([\w.]+)`", (ROOT / "docs" / "walk.md").read_text())))


def test_the_walk_has_steps() -> None:
    """The page is read as its author meant it."""
    assert len(STEPS) > 40


@pytest.mark.parametrize(("module", "name"), STEPS)
def test_step_exists(module: str, name: str) -> None:
    """Each `module:function` of the walk can be imported, from the module that defines it."""
    found = reduce(getattr, name.split("."), importlib.import_module(module))
    if hasattr(found, "__module__"):
        assert found.__module__ == module
