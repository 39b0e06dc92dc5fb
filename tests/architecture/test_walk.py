"""Checks that the functions and classes that docs/en/architecture.md names exist. The page walks through the code in
steps such as `registry.app:create_app`."""

from __future__ import annotations

import importlib
import re
from functools import reduce

from tests.fakes.server_process import ROOT

PAGE = (ROOT / "docs" / "en" / "architecture.md").read_text()
STEPS = sorted(set(re.findall(r"`((?:registry|storage)[\w.]*):([\w.]+)`", PAGE)))


def test_the_walk_has_steps() -> None:
    """The regular expression finds the steps in the page."""
    assert len(STEPS) > 40


def test_steps_exist() -> None:
    """Each step `module:name` of the page can be imported, and the module defines the name itself."""
    assert [f"{module}:{name}" for module, name in STEPS if not _is_defined(module, name)] == []


def _is_defined(module: str, name: str) -> bool:
    """Returns whether `module` defines the object `name`, and does not only import it."""
    try:
        defined_object = reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return getattr(defined_object, "__module__", module) == module
