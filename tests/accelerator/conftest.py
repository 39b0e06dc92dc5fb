from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.accelerator.site import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Nothing runs before `start`."""
    with ExitStack() as stack:
        yield Site(tmp_path, stack)
